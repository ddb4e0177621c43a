"""The source files that a configuration runs: the loop, and on each axis the files of its answers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from ..config import Config

PACKAGE = Path(__file__).parents[1]
LOOP = "train.py"
ASIDE = ("cli", "explain", "export", "generate.py", "models/skeleton.py")  # no part of a run's steps


def running(config: Config) -> dict[str, list[str]]:
    """axis -> files, the loop and what it stands on first; told from the imports in the source."""
    chosen = {type(section).__name__ for section in _sections(config)}
    found: dict[Path, None] = {}
    waiting = [PACKAGE / LOOP]
    while waiting:
        path = waiting.pop(0)
        if path in found or path.relative_to(PACKAGE).as_posix().startswith(ASIDE):
            continue
        found[path] = None
        waiting += _imported(path, chosen)
    groups: dict[str, list[str]] = {"loop": []}
    for path in found:
        name = path.relative_to(PACKAGE)
        if name.name != "__init__.py":
            groups.setdefault(name.parts[0] if len(name.parts) > 1 else "loop", []).append(name.as_posix())
    return {axis: [names[0], *sorted(names[1:])] if axis == "loop" else sorted(names) for axis, names in groups.items()}


def _sections(section: object) -> Iterator[BaseModel]:
    """All settings objects inside a configuration."""
    if isinstance(section, BaseModel):
        yield section
        for name in type(section).model_fields:
            yield from _sections(getattr(section, name))
    elif isinstance(section, list | tuple):
        for item in section:
            yield from _sections(item)


def _imported(path: Path, chosen: set[str]) -> list[Path]:
    """The files of this package that a file imports; in a class of settings only if the configuration has one."""
    made = []
    for node in _reached(ast.parse(path.read_text(encoding="utf-8")), chosen, path.name == "__init__.py"):
        folder = path.parent
        for _ in range(node.level - 1):
            folder = folder.parent
        base = folder.joinpath(*(node.module.split(".") if node.module else []))
        for candidate in (base, *(base / alias.name for alias in node.names)):
            made += [p for p in (candidate.with_suffix(".py"), candidate / "__init__.py") if p.is_file()]
    made = [p for p in made if p != PACKAGE / "__init__.py"]
    return [p for p in made if (path.parent == p.parent and path.name != "__init__.py") or _wanted(p, chosen)]


def _wanted(path: Path, chosen: set[str]) -> bool:
    """Whether a file that another axis, or the head of its own, names is not one of answers that were not chosen."""
    if path.name == "__init__.py":
        return True
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    answers = {c.name for c in classes for n in c.body if getattr(getattr(n, "target", None), "id", "") == "kind"}
    return not answers or bool(answers & chosen)


def _reached(tree: ast.AST, chosen: set[str], axis: bool) -> Iterator[ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                yield node
        elif isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        elif not (axis and isinstance(node, ast.ClassDef) and node.name not in chosen):
            yield from _reached(node, chosen, axis)
