"""Classes that build the base and wrap it, for frameworks that want a class and keywords."""

import copyreg
import inspect
from typing import Any
from weakref import WeakValueDictionary

from torch.optim import Optimizer


class AroundType(type):
    """The type of the classes that ``around`` makes, which are pickled by its arguments."""

    _around: tuple[Any, type[Optimizer], tuple[tuple[str, Any], ...]]


def class_around(cls: Any, /, base: type[Optimizer], **options: Any) -> Any:  # noqa: D417
    """A subclass that builds its base: for frameworks that take a class and its keywords.

    ::

        Adam = MMParetoOptimizer.around(torch.optim.Adam, integration="upgrad")
        opt = Adam(model.parameters(), lr=1e-3)

    is ``MMParetoOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), integration="upgrad")``.
    The class and its instances can be pickled and copied; the same arguments give the same class.

    Args:
        base: a class of optimizers.
        options: keyword arguments of :class:`MMParetoOptimizer`, whose values are checked when an
            instance is made.

    Returns:
        A class whose instances are made of ``(params, **keywords)``, as those of the base are.

    Raises:
        TypeError: ``base`` is not a class of optimizers, or wraps one already; an unknown option.
    """
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise TypeError(
            f"base must be a class of optimizers, such as torch.optim.Adam, got {base!r}: wrap an "
            f"optimizer that is built by {cls.__name__}(optimizer)"
        )
    if isinstance(cls, AroundType) or hasattr(base, "around"):
        wrapper = cls if isinstance(cls, AroundType) else base
        raise TypeError(
            f"{wrapper.__name__} has a base already, or takes one that is built: call "
            "MMParetoOptimizer.around() with the class of the base"
        )
    inspect.signature(cls).bind(None, **options)  # a misspelt one is told of here
    arguments = (cls, base, tuple(sorted(options.items())))
    try:
        known = _made.get(arguments)
    except TypeError:  # an option that has no hash, as a dict of modules
        return _make(*arguments)
    return known or _made.setdefault(arguments, _make(*arguments))


_made: WeakValueDictionary[Any, AroundType] = WeakValueDictionary()


def _make(cls: Any, base: Any, options: tuple[tuple[str, Any], ...]) -> AroundType:
    def init(self: Any, params: Any, **keywords: Any) -> None:
        cls.__init__(self, base(params, **keywords), **dict(options))

    name = f"{cls.__name__.removesuffix('Optimizer')}[{base.__name__}]"
    doc = f"{cls.__name__} around {base.__name__}, which it builds."
    members = {"__init__": init, "__doc__": doc, "__module__": __name__}
    return AroundType(name, (cls,), {**members, "_around": (cls, base, options)})


def _reduced(cls: AroundType) -> Any:
    """How ``pickle`` takes such a class; one that inherits from it has a name of its own."""
    if "_around" not in vars(cls):
        return cls.__qualname__
    owner, base, options = cls._around
    return _again, (owner, base, dict(options))


def _again(owner: Any, base: type[Optimizer], options: dict[str, Any]) -> Any:
    return owner.around(base, **options)


copyreg.pickle(AroundType, _reduced)
