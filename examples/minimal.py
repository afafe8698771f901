"""Two encoders, three losses and one optimizer; needs only PyTorch and mmpareto_optim.

The data are synthetic: 512 samples of 10 classes, each the centre of its class plus noise.
"""

from argparse import ArgumentParser

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmpareto_optim import MMParetoOptimizer

ArgumentParser(usage="%(prog)s", description=__doc__.split("\n")[0]).parse_args()
torch.manual_seed(0)
label = torch.randint(10, (512,))
sound = 0.4 * torch.randn(10, 20)[label] + torch.randn(512, 20)
image = 0.3 * torch.randn(10, 50)[label] + torch.randn(512, 50)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sound_net = nn.Sequential(nn.Linear(20, 64), nn.ReLU())
        self.image_net = nn.Sequential(nn.Linear(50, 64), nn.ReLU())
        self.sound_head, self.image_head = nn.Linear(64, 10), nn.Linear(64, 10)
        self.joint_head = nn.Linear(128, 10)

    def forward(self, sound: Tensor, image: Tensor) -> dict[str, Tensor]:
        s, i = self.sound_net(sound), self.image_net(image)
        joint = self.joint_head(torch.cat([s, i], dim=1))
        return {"mm": joint, "sound": self.sound_head(s), "image": self.image_head(i)}


model = Model()
opt = MMParetoOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.05, momentum=0.9))
conflicts = {"mm+sound": 0, "mm+image": 0}  # the encoders, by the losses that reach them

for epoch in range(1, 31):
    for batch in torch.randperm(512).split(64):
        logits = model(sound[batch], image[batch])
        losses = {name: cross_entropy(x, label[batch]) for name, x in logits.items()}
        opt.zero_grad()
        opt.step(losses=losses)  # instead of sum(losses.values()).backward() and opt.step()
        for block, stats in opt.stats.items():
            conflicts[block] += int(stats.conflict)
    if epoch % 10 == 0:
        print(f"epoch {epoch}:", ", ".join(f"{name} {x.item():.3f}" for name, x in losses.items()))

print(f"\nSteps in conflict, of 240: {conflicts}. The last step:")
for block, stats in opt.stats.items():
    print(f"{block}\n{stats}")
