"""The version; a file of its own, so that what is below `linfusion` can read it."""

__version__ = "0.2.0"
