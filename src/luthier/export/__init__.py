"""Write a trained model as others read it, load it again in a fresh process, compare, and only then call it done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError
from ..files import new_folder, write_atomically
from .formats import FORMATS, KINDS

if TYPE_CHECKING:
    from ..document import Document

__all__ = ["FORMATS", "KINDS", "export", "keep_probe"]
PROBE_DOCUMENTS, PROBE_TOKENS = 8, 512

Say = Callable[[str], None]


def export(
    source: str | Path, out: Path, kind: str, dtype: str | None = None, say: Say = lambda text: None,
    bound: float | None = None,
) -> dict:  # fmt: skip
    """Export a run's best checkpoint, or a model that lies in a folder, on the hub or in a GGUF file, into the new
    folder `out`; returns what was compared: differences, tolerance, files.

    `dtype` is one that the format has; without it floating point stays in that it computes in. `bound` is by how much
    of itself perplexity may grow where the format rounds, in place of what its types allow.
    """
    if kind not in FORMATS:
        raise ExportError(f"as={kind!r}: known are {', '.join(KINDS)}")
    form, source = FORMATS[kind], str(source)
    if bound is not None and not (form.bounded and bound > 0):
        rounding = ", ".join(f"as={name}" for name, one in FORMATS.items() if one.bounded)
        raise ExportError(f"bound={bound:g}: a number above 0, of formats that round ({rounding}); nothing was written")
    config = _config(source, kind)
    home = import_module(f".{form.home}", __name__)
    home.check(source, config, kind, dtype)
    with new_folder(Path(out)) as aside:
        found, chosen = _opened(source, config, say)
        compared = home.write(found, Path(aside), kind, dtype, **({} if bound is None else {"bound": bound}))
    told = {"checkpoint": str(chosen)} if chosen is not None else {}
    files = sorted(p.name for p in Path(out).iterdir())
    return {"out": str(out), "as": kind, **told, **compared, "files": files}


def _config(source: str, kind: str) -> Any:
    """Of a run; None of a model."""
    from ..config import read_run
    from ..opened import is_run, problem

    if FORMATS[kind].runs_only and not is_run(source) and Path(source).is_dir() and problem(source) is None:
        raise ExportError(f"as={kind}: {source} is a model and no run; of those there are {', '.join(_of_models())}")
    if FORMATS[kind].runs_only or is_run(source):
        return read_run(Path(source).expanduser())
    if text := problem(source):
        from ..errors import ModelError

        raise ModelError(text)
    return None


def _of_models() -> list[str]:
    return [f"as={name}" for name, form in FORMATS.items() if not form.runs_only]


def _opened(source: str, config: Any, say: Say) -> tuple[Any, Path | None]:
    """What is exported, and the checkpoint that it was read from."""
    from ..assemble import restore
    from ..opened import Opened, opened

    if config is None:
        return opened(source, say), None
    made, chosen = restore(Path(source).expanduser(), say)
    return Opened(source, made.network, made.renderer, made), chosen


def keep_probe(run: Path, documents: Sequence[Document]) -> None:
    """A few held-out documents, on which every export of the run will be compared."""
    kept: list[Any] = []
    for d in documents[:PROBE_DOCUMENTS]:
        tokens = d.tokens[:PROBE_TOKENS].tolist()
        kept.append(tokens if d.types is None else {"tokens": tokens, "types": d.types[:PROBE_TOKENS].tolist()})
    write_atomically(run / "probe.json", json.dumps(kept))
