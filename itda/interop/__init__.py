"""Bridges to other libraries, one module each; none is imported before it is asked for (`itda.interop.saelens`).

What enters here turns a dictionary into what another library reads, or what that has made into a system for `eval`.
May use evaluation and all below.
"""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name in ("saelens", "saebench"):
        return import_module(f"itda.interop.{name}")
    raise AttributeError(f"module 'itda.interop' has no attribute {name!r}")
