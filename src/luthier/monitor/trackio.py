"""Trackio: its own local store, which `trackio show --project luthier` opens; TRACKIO_SPACE_ID sends it to a Space.

It writes from a thread, twice a second: what waits there at a SIGKILL is missing in it, never in metrics.jsonl.
https://huggingface.co/docs/trackio
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .trackers import About, Histogram, random_id, table


class Trackio:
    rewinds = False

    def __init__(self, about: About):
        import trackio

        self.trackio: Any = trackio
        with contextlib.redirect_stdout(sys.stderr):  # what a command prints is its answer
            self.run: Any = trackio.init(
                project=about.project, name=about.id, resume="allow", config=dict(about.settings), embed=False,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip

    @staticmethod
    def new_id(about: About) -> str:
        """It knows runs by their names, so that a name has to be one run's only."""
        return f"{about.name}-{random_id(about)}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def samples(self, step: int, rows: Sequence[Mapping]) -> None:
        columns, cells = table(rows)
        self.run.log({"answers": self.trackio.Table(columns=columns, data=cells)}, step=step)

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        self.run.log(
            {key: self.trackio.Histogram(np_histogram=(h.counts, h.edges)) for key, h in found.items()}, step=step
        )

    def finish(self, figures: Mapping[str, float]) -> None:
        self.run.log({f"final/{key}": value for key, value in figures.items()})

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.trackio.finish()  # not the run's own: that would be finished again, aloud, at exit


TRACKER = Trackio
