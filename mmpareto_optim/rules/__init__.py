"""From a Gram matrix of gradients to the coefficients of their sum: a family of rules a file."""
