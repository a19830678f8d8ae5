"""The published mechanisms, one file each, and their names."""

from importlib import import_module

from linfusion.attention.method import Method

_HOME = {
    "linfusion": "linfusion.attention.linfusion.method",
    "lit": "linfusion.attention.lit",
    "mate": "linfusion.attention.mate.processor",
    "clear": "linfusion.attention.clear",
}


def names() -> list[str]:
    """What `get_method` takes."""
    return list(_HOME)


def get_method(name: str) -> Method:
    """The mechanism of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in _HOME:
        raise ValueError(f"method: {name!r} is not one of {sorted(_HOME)}")
    method: Method = import_module(_HOME[name]).METHOD
    return method
