"""GGUF: one file with weights, tokenizer and chat template, as llama.cpp and Ollama read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...config import Config
    from ...opened import Opened

FILE = "model.gguf"


def check(source: str, config: Config | None, kind: str, dtype: str | None) -> None:
    """What can be refused before anything heavy is loaded."""
    from ...errors import ExportError
    from . import library, numbers

    if dtype is not None and dtype not in numbers.TABLE:
        raise ExportError(f"as={kind}: dtype={dtype!r}: known are {', '.join(numbers.TABLE)}; nothing was written")
    if not library.installed():
        raise ExportError(library.INSTALL)
    if config is None:
        return
    if config.objective.ends_in != "tokens":
        raise ExportError(
            f"as={kind}: the run is one of method={config.method}, whose network gives scores; llama.cpp is given "
            "those that predict tokens: use as=merged or as=full"
        )
    from ..plain import check_kind

    if kind == "gguf":
        check_kind(config, kind)


def write(
    found: Opened, out: Path, kind: str, dtype: str | None, bound: float | None = None
) -> dict[str, Any]:  # fmt: skip
    """Write `out`/model.gguf and a Modelfile; compare in llama.cpp."""
    from . import checked, model, modelfile

    dtype = dtype or model.usual(found)
    remarks = model.write(found, out / FILE, dtype)
    compared = checked.whole(found, out / FILE, dtype, bound=bound)
    (out / "Modelfile").write_text(modelfile.text(found, f"./{FILE}"))
    return {**compared, "dtype": dtype, "remarks": [*remarks, *compared.pop("remarks", [])]}
