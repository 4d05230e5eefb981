"""Bridges to other libraries, one module each; none is imported before it is asked for (`itda.interop.saelens`)."""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name in ("saelens", "saebench"):
        return import_module(f"itda.interop.{name}")
    raise AttributeError(f"module 'itda.interop' has no attribute {name!r}")
