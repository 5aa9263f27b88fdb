"""Subclasses made of a live model's class, under its own name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def subclass_named_as(base: Any, mixin: type, maker: Callable[[Any], type]) -> Any:
    """A subclass of `base` with `mixin` in front, under the name of `base`; `maker(base)` gives it again.

    A saved config names the class, so the name stays. Pickle would look the class up by that name and find `base`, so
    instances say how to make it instead.
    """

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return make_empty, (maker, base), object.__reduce_ex__(self, protocol)[2]

    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": mixin.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "config_class": base.config_class,
    }
    return type(base.__name__, (mixin, base), names)


def make_empty(maker: Callable[[Any], type], base: type) -> Any:
    """An instance without state, for pickle to fill."""
    made: Any = maker(base)
    return made.__new__(made)
