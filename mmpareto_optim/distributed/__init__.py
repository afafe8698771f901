"""Several processes that act as one: data-parallel, sharded; and one process, the plain case."""
