"""Luthier fine-tunes language models: every method on one loop, fast, correct, and with evidence."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import adapters
    from .config import Config, configure
    from .errors import LuthierError
    from .explain import Explanation, explain
    from .export import export
    from .methods import METHODS
    from .results import Result, Step, open_run
    from .search import search
    from .train import steps, train

_HOMES = {
    "Config": "config",
    "Explanation": "explain",
    "LuthierError": "errors",
    "METHODS": "methods",
    "Result": "results",
    "Step": "results",
    "configure": "config",
    "explain": "explain",
    "export": "export",
    "open_run": "results",
    "search": "search",
    "steps": "train",
    "train": "train",
}
_MODULES = ("adapters",)  # several adapters on one model
__all__ = [
    "METHODS", "Config", "Explanation", "LuthierError", "Result", "Step", "adapters", "configure", "explain", "export",
    "open_run", "search", "steps", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The public names, each imported when it is first asked for, so that importing luthier costs nothing."""
    if name in _MODULES:
        from importlib import import_module

        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `luthier.train` the function: importing the file train.py would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
