"""Weights & Biases: kept in `wandb/` of the run's folder, sent nowhere unless WANDB_MODE=online says so.

It writes from a process of its own: what waits there at a SIGKILL is missing in it, never in metrics.jsonl.
`wandb sync RUN/wandb/offline-run-*` uploads it later; what a resumed run wrote has the same id. https://docs.wandb.ai/guides/track/environment-variables
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .trackers import About, Histogram, random_id, table


class WandB:
    rewinds = False
    new_id = staticmethod(random_id)

    def __init__(self, about: About):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb  # type: ignore[import-not-found]

        self.wandb: Any = wandb
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        quiet = wandb.Settings(
            console="off", silent=True, x_disable_stats=True, x_disable_meta=True, disable_git=True, save_code=False
        )
        self.run: Any = wandb.init(
            project=about.project, name=about.name, id=about.id, resume="allow", dir=str(about.folder),
            mode=mode, config=dict(about.settings), settings=quiet,
            reinit="create_new",
        )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def samples(self, step: int, rows: Sequence[Mapping]) -> None:
        columns, cells = table(rows)
        self.run.log({"answers": self.wandb.Table(columns=columns, data=cells)}, step=step)

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        made = {key: self.wandb.Histogram(np_histogram=(h.counts, h.edges)) for key, h in found.items()}
        self.run.log(made, step=step)

    def finish(self, figures: Mapping[str, float]) -> None:
        self.run.summary.update({f"final/{key}": value for key, value in figures.items()})

    def close(self) -> None:
        self.run.finish()


TRACKER = WandB
