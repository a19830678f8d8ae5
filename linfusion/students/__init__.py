"""What a method learned, beside the base model: the format, loading and saving."""

from importlib import import_module

_HOME = {
    "LinFusion": "student",
    "learned": "saving",
    "push": "saving",
    "relaid": "saving",
    "save": "saving",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
