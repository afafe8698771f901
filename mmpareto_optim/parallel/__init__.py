"""Several processes that act as one: averaged, sharded; and one process, which is the plain case.

Each way is an object with the same methods, chosen once a backward: ``failing_together``,
``rows``, ``averaged``, ``largest``, ``on_all``, ``flat``, ``grams``, ``grams_at_features``,
``same`` and ``mean``. :class:`~mmpareto_optim.parallel.alone.Alone` says what they are.
"""
