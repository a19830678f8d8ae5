"""The published mechanisms, one file each, and their names."""

from importlib import import_module

from linfusion.attention.method import Method

_HOME = {
    "linfusion": "linfusion.attention.linfusion.method",
    "lit": "linfusion.attention.lit",
    "mate": "linfusion.attention.mate.method",
    "clear": "linfusion.attention.clear.method",
    "hybrid": "linfusion.attention.hybrid.method",
}


_REGISTERED: dict[str, Method] = {}


def names() -> list[str]:
    """What `get_method` takes."""
    return [*_HOME, *_REGISTERED]


def register(method: Method) -> None:
    """Make a mechanism of your own known: to `linearize`, the trainer and the command line.

    Args:
        method: what it offers; `docs/add-a-mechanism.md` shows one.

    Raises:
        ValueError: there is another one of that name.
    """
    if method.name in _HOME or _REGISTERED.get(method.name, method) != method:
        raise ValueError(f"method: there is a mechanism {method.name!r} already")
    _REGISTERED[method.name] = method


def get_method(name: str) -> Method:
    """The mechanism of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in _HOME:
        raise ValueError(f"method: {name!r} is not one of {sorted(names())}")
    method: Method = import_module(_HOME[name]).METHOD
    return method
