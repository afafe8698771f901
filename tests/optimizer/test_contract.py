"""What torch.optim promises holds for a wrapped optimizer, whichever it exports."""

import inspect
import io
import pickle
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch

# Some optimizers take only a part of the parameters (Muon the matrices), and one needs the
# gradient of the sum (LBFGS): both is said.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the losses reach trainable parameters that no optimizer"),
    pytest.mark.filterwarnings("ignore:LBFGS takes .grad"),
]

EXPORTED: dict[str, Any] = {
    name: member
    for name, member in vars(torch.optim).items()
    if inspect.isclass(member) and issubclass(member, Optimizer) and member is not Optimizer
}
# SparseAdam takes sparse gradients alone, which cannot be integrated: its own test is below.
NAMES = sorted(EXPORTED.keys() - {"SparseAdam"})
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "foreach": {"foreach": True},
    "not foreach": {"foreach": False},
    "fused": {"fused": True},
    "maximize": {"maximize": True},
    "weight_decay": {"weight_decay": 0.1},
    "tensor lr": {"lr": torch.tensor(1e-2, dtype=torch.float64)},
}


def takes(name: str, options: dict[str, Any]) -> bool:
    parameters = inspect.signature(EXPORTED[name]).parameters
    tensor_lr = "Tensor" in str(parameters["lr"].annotation)
    return options.keys() <= parameters.keys() and (tensor_lr or "lr" not in options)


CASES = [(name, option) for name in NAMES for option in OPTIONS if takes(name, OPTIONS[option])]


def trained_by(name: str, model: nn.Module) -> list[nn.Parameter]:
    """All parameters; for Muon the matrices, the only ones that it takes."""
    return [param for param in model.parameters() if name != "Muon" or param.ndim == 2]


def build(name: str, model: nn.Module, options: dict[str, Any] | None = None) -> Any:
    return EXPORTED[name](trained_by(name, model), **{"lr": 1e-2, **(options or {})})


def batches(steps: int, seed: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = [audio_visual_batch() for _ in range(steps)]
    return iter(drawn)


def run(opt: MMParetoOptimizer, losses_of: Callable[[Any], Losses], data: Iterable[Any]) -> None:
    """Step by a closure, which every optimizer takes."""
    for batch in data:

        def closure(batch: Any = batch) -> Losses:
            opt.zero_grad()
            return losses_of(batch)

        opt.step(closure)


def state_of(opt: Optimizer) -> list[Tensor]:
    """Every tensor that the optimizer keeps."""
    tree = opt.state_dict()["state"]
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def assert_same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_the_table_holds_the_optimizers_of_torch() -> None:
    assert {"SGD", "Adam", "AdamW", "Adagrad", "LBFGS", "SparseAdam"} <= EXPORTED.keys()


# PyTorch 2.8 of its own LBFGS.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
@pytest.mark.parametrize(("name", "option"), CASES)
def test_one_loss_is_the_base_bit_for_bit(name: str, option: str) -> None:
    plain = LateFusion()
    model = deepcopy(plain)
    base = build(name, plain, OPTIONS[option])
    opt = MMParetoOptimizer(build(name, model, OPTIONS[option]))
    for batch in batches(3):

        def closure(batch: Any = batch) -> Tensor:
            base.zero_grad()
            loss = plain.losses(batch)["mm"]
            loss.backward()
            return loss

        base.step(closure)
    start = [param.clone() for param in model.parameters()]
    run(opt, lambda batch: {"mm": model.losses(batch)["mm"]}, batches(3))
    assert_same(model.parameters(), plain.parameters())
    assert_same(state_of(opt), state_of(base))
    assert not all(a.equal(b) for a, b in zip(start, model.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_resumes_bit_for_bit(name: str) -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(build(name, model))
    run(opt, model.losses, batches(2))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    run(opt, model.losses, batches(2, seed=2))

    resumed = LateFusion()
    again = MMParetoOptimizer(build(name, resumed, {"lr": 0.5}))  # the checkpoint's lr counts
    file.seek(0)
    saved = torch.load(file)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    run(again, resumed.losses, batches(2, seed=2))
    assert_same(resumed.parameters(), model.parameters())
    assert_same(state_of(again), state_of(opt))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", ["plain to wrapped", "wrapped to plain"])
def test_a_plain_checkpoint_is_a_wrapped_one(name: str, direction: str) -> None:
    one, two = LateFusion(), LateFusion()
    wrapped, base = MMParetoOptimizer(build(name, one)), build(name, two)
    source, target = (wrapped, base) if direction == "wrapped to plain" else (base, wrapped)
    model = one if source is wrapped else two
    for batch in batches(2):

        def closure(batch: Any = batch) -> Tensor:
            source.zero_grad()
            total = torch.stack(list(model.losses(batch).values())).sum()
            total.backward()
            return total

        source.step(closure)
    target.load_state_dict(source.state_dict())
    assert bool(state_of(target)) is (name != "SGD")  # which has none without momentum
    assert target.state_dict()["param_groups"] == source.state_dict()["param_groups"]
    assert_same(state_of(target), state_of(source))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"LBFGS"}))  # torch's loses its parameters
@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_copies_go_on_alike(name: str, kind: str) -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(build(name, model))
    run(opt, model.losses, batches(2))
    pair = (opt, model)
    twin, other = deepcopy(pair) if kind == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert_same(other.parameters(), model.parameters())
    run(opt, model.losses, batches(2, seed=2))
    run(twin, other.losses, batches(2, seed=2))
    assert_same(other.parameters(), model.parameters())
    assert_same(state_of(twin), state_of(opt))


@pytest.mark.parametrize("name", NAMES)
def test_hooks_run_before_and_after_the_step(name: str) -> None:
    model = LateFusion()
    opt = MMParetoOptimizer(build(name, model))
    weight = trained_by(name, model)[0]
    before = weight.detach().clone()
    seen: list[tuple[str, bool]] = []
    opt.register_step_pre_hook(lambda *_: seen.append(("before", weight.equal(before))))
    opt.register_step_post_hook(lambda *_: seen.append(("after", weight.equal(before))))
    run(opt, model.losses, batches(1))
    assert seen == [("before", True), ("after", False)]


def test_a_hook_may_replace_the_closure() -> None:
    model = LateFusion()
    other = deepcopy(model)
    batch, another = batches(2)

    def replace(opt: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        opt.backward(model.losses(another))
        return (args[0], None), kwargs

    opt = MMParetoOptimizer(build("SGD", model))
    opt.register_step_pre_hook(replace)
    run(opt, model.losses, [batch])
    run(MMParetoOptimizer(build("SGD", other)), other.losses, [another])
    assert_same(model.parameters(), other.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("named", [False, True])
def test_param_groups_may_be_generators(name: str, named: bool) -> None:
    model = LateFusion()
    other = deepcopy(model)

    def groups(model: LateFusion) -> Iterator[dict[str, Any]]:
        parts = [model] if name == "LBFGS" else [model.audio, model.visual]  # takes one group
        names = {param: key for key, param in model.named_parameters()}
        for part in parts:
            params = iter(trained_by(name, part))
            yield {"params": ((names[p], p) for p in params) if named else params}

    opt = MMParetoOptimizer(EXPORTED[name](groups(model), lr=1e-2))
    reference = MMParetoOptimizer(EXPORTED[name](list(groups(other)), lr=1e-2))
    run(opt, model.losses, batches(2))
    run(reference, other.losses, batches(2))
    assert list(opt.stats) == ["mm+audio", "mm+visual"]
    assert_same(model.parameters(), other.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_without_gradients_a_step_is_the_bases_own(name: str, set_to_none: bool) -> None:
    plain = LateFusion()
    model = deepcopy(plain)
    base, opt = build(name, plain), MMParetoOptimizer(build(name, model))
    run(opt, model.losses, batches(1))
    run(MMParetoOptimizer(base), plain.losses, batches(1))
    for optimizer in (base, opt):
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step(lambda: torch.tensor(0.0))
    assert_same(model.parameters(), plain.parameters())


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"Adafactor", "LBFGS", "Muon"}))
def test_what_no_loss_reaches_is_left_alone(name: str) -> None:
    """LBFGS moves all parameters as one vector; the other two do not take empty ones."""
    model, unused, empty = LateFusion(), nn.Linear(2, 2), nn.Parameter(torch.empty(0))
    before = deepcopy(unused)
    params = [*model.parameters(), *unused.parameters(), empty]
    options = {"weight_decay": 0.1} if takes(name, {"weight_decay": 0.1}) else {}
    opt = MMParetoOptimizer(EXPORTED[name](params, **options))
    for batch in batches(2):
        losses = model.losses(batch)
        opt.zero_grad()
        opt.step(losses={key: loss + empty.sum() for key, loss in losses.items()})
    assert_same(unused.parameters(), before.parameters())
    assert all(param.grad is None for param in unused.parameters())
    assert empty.grad is not None
    assert empty.grad.shape == (0,)
    assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("name", [n for n in NAMES if takes(n, {"differentiable": True})])
@pytest.mark.parametrize("retain_grad", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_differentiable_step_is_differentiable(name: str, retain_grad: bool) -> None:
    def derivative(wrap: bool) -> Tensor:
        start = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        param = start.clone()
        base = EXPORTED[name]([param], differentiable=True)
        if wrap:
            if retain_grad:
                param.retain_grad()
            MMParetoOptimizer(base).step(losses={"mm": param.square().sum()})
        else:
            param.grad = 2 * param.detach()
            base.step()
        (found,) = torch.autograd.grad(param.square().sum(), start)
        return found

    assert derivative(wrap=True).equal(derivative(wrap=False))
    assert derivative(wrap=True).count_nonzero() == 3


@pytest.mark.parametrize("name", [n for n in NAMES if takes(n, {"capturable": True})])
def test_capturable_is_the_bases_affair(name: str) -> None:
    """On the CPU torch refuses it at the step; the wrapper neither hides nor adds to that."""
    model = LateFusion()
    opt = MMParetoOptimizer(build(name, model, {"capturable": True}))
    with pytest.raises((AssertionError, RuntimeError), match="capturable"):
        run(opt, model.losses, batches(1))
    assert all(group["capturable"] for group in opt.param_groups)


def test_sparse_adam_is_refused_with_its_mend() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    opt = MMParetoOptimizer(torch.optim.SparseAdam(table.parameters()))
    with pytest.raises(TypeError, match=r"only dense gradients.*sparse=False"):
        opt.step(losses={"mm": table(torch.tensor([1, 2])).sum()})
