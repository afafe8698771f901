"""Several processes that act as one: data-parallel, sharded; and one process, the plain case.

Each way is an object with the methods of :class:`~mmpareto_optim.distributed.processes.Processes`,
chosen once a backward.
"""
