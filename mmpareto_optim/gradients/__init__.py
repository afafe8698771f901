"""From losses to one gradient for each loss: at the parameters, or at the encoders' outputs."""
