"""Trackers behind one interface: each is opened lazily, local by default, and never stops a run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError
from ..files import write_atomically

PACKAGES = {  # `monitor.report_to` -> the package that is imported, and what pip calls it
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "trackio": ("trackio", "trackio"),
}


@dataclass(frozen=True)
class About:
    """The run that is tracked. `resumed_at` is 0 for one that begins, `settings` are flat and dotted."""

    folder: Path
    project: str
    name: str
    resumed_at: int
    settings: Mapping[str, Any]
    id: str = ""
    """The tracker's own name of this run: kept in the run's folder, so that a resumed run goes on there."""


@dataclass(frozen=True)
class Histogram:
    """`counts` [B] of the values between `edges` [B + 1], and the sums that some trackers want."""

    counts: list[int]
    edges: list[float]
    total: float = field(default=0.0)
    squares: float = field(default=0.0)


class Tracker(Protocol):
    """What every tracker can show. `new_id` names a run that begins; with `rewinds`, redone steps replace old ones."""

    rewinds: bool

    def __init__(self, about: About): ...
    @staticmethod
    def new_id(about: About) -> str: ...
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def samples(self, step: int, rows: Sequence[Mapping]) -> None: ...
    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None: ...
    def finish(self, figures: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def missing(names: Sequence[str]) -> list[str]:
    """A line for each tracker whose package is not installed, with the command that installs it."""
    return [
        f"monitor.report_to: {name} is not installed: pip install {PACKAGES[name][1]} (or take it out of the list)"
        for name in names
        if not _installed(PACKAGES[name][0])
    ]


def _installed(package: str) -> bool:
    """A folder that merely has its name, as `wandb/` of other runs, is no package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def check(names: Sequence[str]) -> None:
    if problems := missing(names):
        raise ConfigError(problems)


class Trackers:
    """All trackers of a run as one. One that fails while the run goes on is named once and left out from there."""

    def __init__(
        self, names: Sequence[str], about: About, warn: Callable[[str], None], sent: Collection[tuple[str, int]] = ()
    ):
        self.warn, self.sent = warn, set(sent)
        self.open: dict[str, Tracker] = {}
        check(names)
        path = about.folder / "trackers.json"
        ids = json.loads(path.read_text()) if about.resumed_at and path.exists() else {}
        for name in names:
            kind = importlib.import_module(f".{name}", __package__).TRACKER
            resumed_at = about.resumed_at if name in ids else 0  # one that is added to a run under way begins here
            try:
                if name not in ids:
                    ids[name] = kind.new_id(about)
                    write_atomically(path, json.dumps(ids, indent=1))  # before it is used: a kill must not orphan it
                self.open[name] = kind(replace(about, id=ids[name], resumed_at=resumed_at))
            except Exception as error:
                raise ConfigError(
                    f"monitor.report_to: {name} could not begin: {_short(error)}; take it out of the list, or mend that"
                ) from error

    def _tell(self, record: tuple[str, int] | None, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            if record in self.sent and not tracker.rewinds:
                continue
            try:
                tell(tracker)
            except Exception as error:
                del self.open[name]
                self.warn(f"{name} failed and is told no more ({_short(error)}); metrics.jsonl goes on")

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        named = {f"{kind}/{key}": value for key, value in values.items()}
        if named:
            self._tell((kind, step), lambda tracker: tracker.scalars(step, named))

    def samples(self, step: int, rows: Sequence[Mapping]) -> None:
        self._tell(("evaluation", step), lambda tracker: tracker.samples(step, rows))

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        self._tell(("histograms", step), lambda tracker: tracker.histograms(step, found))

    def confusion(self, step: int, names: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
        """A confusion matrix, for trackers that can show one."""

        def show(tracker: Any) -> None:
            if hasattr(tracker, "confusion"):
                tracker.confusion(step, names, counts)

        self._tell(("evaluation", step), show)

    def finish(self, figures: Mapping[str, float]) -> None:
        self._tell(None, lambda tracker: tracker.finish(figures))

    def close(self) -> None:
        self._tell(None, lambda tracker: tracker.close())
        self.open.clear()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def random_id(about: About) -> str:
    """Eight hexadecimal digits that no other run has; the generators of training are not asked for them."""
    return uuid.uuid4().hex[:8]


def table(rows: Sequence[Mapping]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of held-out answers."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return columns, [[str(row.get(column, "")) for column in columns] for row in rows]
