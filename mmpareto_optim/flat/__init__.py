"""The gradients of a block as rows: flatten, Gram matrix, combine, unflatten; their memory."""
