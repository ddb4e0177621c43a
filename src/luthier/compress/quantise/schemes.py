"""The schemes of quantisation: bits, numbers, activations, and what each may cost; no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ...settings import Settings

WHOLE_ROW = -1
GROUPS = (128, 64, 32)  # where none is given: the first that divides the inputs of every layer


@dataclass(frozen=True)
class Scheme:
    """What a weight becomes, and what is done to the inputs of its layer."""

    name: str
    bits: int
    numbers: Literal["int", "float", "nf4"] = "int"
    activations: Literal["int8", "float8"] | None = None
    """With a scale for each token, made when the layer is asked."""
    grouped: bool = False
    """Whether weights share a scale in groups, unless told otherwise; else all of a row do."""
    bound: float = 0.03
    """Largest rise of held-out perplexity, as a share of the source's, unless told otherwise."""
    formats: tuple[str, ...] = ("compressed-tensors",)
    caption: str = ""


TABLE = (
    Scheme("int8", 8, bound=0.005, formats=("compressed-tensors", "torchao"), caption="8-bit weights"),
    Scheme("int8_dynamic", 8, activations="int8", bound=0.02, caption="8-bit weights and inputs"),
    Scheme("int4", 4, grouped=True, caption="4-bit weights in groups"),
    Scheme("fp8", 8, "float", "float8", bound=0.02, caption="float8 (e4m3) weights and inputs"),
    Scheme("nf4", 4, "nf4", bound=0.05, formats=("bitsandbytes",), caption="4-bit NormalFloat in blocks of 64"),
)
SCHEMES = {scheme.name: scheme for scheme in TABLE}
FORMATS = ("compressed-tensors", "bitsandbytes", "torchao")


class Quantising(Settings):
    """One way of giving weights fewer bits."""

    scheme: Literal["int8", "int8_dynamic", "int4", "fp8", "nf4"]
    """What the linear layers inside the network's blocks become; head, embeddings and norms stay as they are."""
    rounding: Literal["nearest", "gptq", "awq"] = "nearest"
    """Each weight by itself; or so that the layer's outputs on the calibration rows stay (arXiv:2210.17323); or with
    inputs scaled first, so that the weights of large ones lose less (arXiv:2306.00978)."""
    group_size: int | None = None
    """Neighbouring weights of a row that share a scale, -1 for all of it; by default the largest of 128, 64 and 32 that
    divides every layer for 4-bit integers, else -1."""
    ranges: Literal["min_max", "mse"] = "mse"
    """Of a group: to its extremes, or as much narrower as makes the squared error smallest."""
    per_tensor: bool = False
    """Of fp8: one scale for a whole weight."""
    format: Literal["compressed-tensors", "bitsandbytes", "torchao"] | None = None
    """Of the files; by default the first that the scheme has."""
    bits: float | None = Field(None, gt=0)
    """With 4-bit integers: a budget, on average over the quantised weights with their scales; layers that matter most,
    as measured on the calibration rows, get 8 bits."""
    samples: int = Field(32, ge=1)
    """Rows of calibration."""
    sample_tokens: int = Field(512, ge=2)
    """Of each of them, at most."""
    damping: float = Field(0.01, gt=0)
    """Of GPTQ: share of the mean of the Hessian's diagonal that is added to it."""

    @property
    def kind(self) -> Scheme:
        return SCHEMES[self.scheme]

    @property
    def written_as(self) -> str:
        return self.format or self.kind.formats[0]

    @property
    def calibrated(self) -> bool:
        """Whether it looks at rows."""
        return self.rounding != "nearest" or self.bits is not None

    def problems(self) -> list[str]:
        """All that does not go together."""
        found, kind, given = [], self.kind, self.model_fields_set
        if self.format is not None and self.format not in kind.formats:
            found.append(f"--format={self.format}: --scheme {self.scheme} is written as {' or '.join(kind.formats)}")
        if kind.numbers == "nf4":
            for name in ("rounding", "group_size", "ranges"):
                if name in given and getattr(self, name) != type(self).model_fields[name].default:
                    found.append(f"--{name.replace('_', '-')}: nf4 is bitsandbytes' own rounding: leave it out")
        if kind.numbers == "float":
            if self.rounding != "nearest" or "ranges" in given:
                found.append("--rounding, --ranges: of integers; fp8 rounds to the nearest: leave them out")
            if self.group_size not in (None, WHOLE_ROW):
                found.append(f"--group-size={self.group_size}: fp8 has a scale for each output (-1), or --per-tensor")
        if "damping" in given and self.rounding != "gptq":
            found.append(f"--damping={self.damping:g}: of --rounding gptq, and it is {self.rounding}: leave it out")
        for name in ("samples", "sample_tokens"):
            if name in given and not self.calibrated:
                flag = f"--{name.replace('_', '-')}"
                found.append(f"{flag}: of rows that are calibrated on (gptq, awq, --bits): leave it out")
        if self.per_tensor and kind.numbers != "float":
            found.append("--per-tensor: of --scheme fp8")
        if self.group_size is not None and self.group_size != WHOLE_ROW and self.group_size < 8:
            found.append(f"--group-size={self.group_size}: -1, or at least 8")
        if self.group_size not in (None, WHOLE_ROW) and kind.activations:
            found.append(f"--group-size={self.group_size}: with rounded inputs a scale for each output (-1) it must be")
        if self.bits is not None and (self.scheme != "int4" or self.written_as != "compressed-tensors"):
            found.append("--bits: a budget of --scheme int4 as compressed-tensors, of which some layers get 8 bits")
        if self.bits is not None and not 4 < self.bits <= 8.5:
            found.append(f"--bits={self.bits:g}: more than 4, as scales count too, and at most 8.5")
        if self.written_as == "torchao" and self.group_size not in (None, WHOLE_ROW):
            found.append(f"--group-size={self.group_size}: torchao's 8-bit layers have a scale for each output (-1)")
        return found
