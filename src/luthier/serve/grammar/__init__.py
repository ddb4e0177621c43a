"""Answers of a given form: which tokens may come next, for JSON, a JSON schema, or a tool's call."""

from __future__ import annotations

from .expressions import Grammar, Unsupported
from .guide import Guide, Machines, Triggered
from .schema import json_object, of_schema
from .vocabulary import Vocabulary

__all__ = [
    "Grammar", "Guide", "Machines", "Triggered", "Unsupported", "Vocabulary", "json_object", "of_schema",
]  # fmt: skip
