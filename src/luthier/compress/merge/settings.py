"""How models are merged: the settings, checked without PyTorch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...settings import Settings

OF_CHANGES = ("ties", "dare", "dare_ties")
RANDOM = ("dare", "dare_ties")


class Merging(Settings):
    """One way of making one model of several."""

    by: Literal["linear", "slerp", "ties", "dare", "dare_ties"]
    """A weighted sum; along the arc between two; TIES (arXiv:2306.01708); DARE (arXiv:2311.03099), summed or with the
    signs of TIES."""
    weights: list[float] | None = None
    """One for each source: by default equal ones that add up to 1 (linear, slerp), or 1 for each."""
    density: float | None = Field(None, gt=0, le=1)
    """Share of each change that stays; by default 0.2 (ties, its paper's), 0.5 (dare)."""
    rank: int | None = Field(None, ge=1)
    """Of a merged adapter by ties or dare; by default the ranks of the sources added up."""
    seed: int = Field(0, ge=0)
    """Of what DARE drops."""

    def problems(self, sources: int) -> list[str]:
        """All that does not go together."""
        found = []
        if sources < 2:
            found.append("to merge takes two sources or more, and OUT")
        if self.by == "slerp" and sources != 2:
            found.append(
                f"--by slerp: goes between two sources, and {sources} are given: use another, or merge in pairs"
            )
        if self.weights is not None and len(self.weights) != sources:
            found.append(f"--weights: {len(self.weights)} numbers for {sources} sources; give each one")
        if self.by == "slerp" and self.weights is not None and (min(self.weights) < 0 or not sum(self.weights)):
            found.append(
                "--weights: of slerp they say where between the two, so none is negative and their sum is not 0"
            )
        for name, ways in (("density", OF_CHANGES), ("rank", OF_CHANGES), ("seed", RANDOM)):
            if name in self.model_fields_set and self.by not in ways:
                found.append(f"--{name}: of --by {', '.join(ways)}, and --by is {self.by}: leave it out")
        return found

    def factors(self, sources: int) -> list[float]:
        """The weight of each source."""
        if self.weights is not None:
            return self.weights
        return [1.0] * sources if self.by in OF_CHANGES else [1 / sources] * sources

    @property
    def kept(self) -> float:
        """The density."""
        return self.density if self.density is not None else 0.2 if self.by == "ties" else 0.5
