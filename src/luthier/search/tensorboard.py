"""A search in TensorBoard: one run for each trial, with its settings as hyper-parameters and its metric over steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any

from ..monitor import trackers
from .plan import Plan


def write(plan: Plan, report: Mapping) -> bool:
    """`tensorboard/` in the search's folder, whole and anew; False where TensorBoard is not installed."""
    if trackers.missing(["tensorboard"]):
        return False
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    root = plan.folder / "tensorboard"
    shutil.rmtree(root, ignore_errors=True)
    for row in report["trials"]:
        if not row["settings"]:
            continue
        writer: Any = SummaryWriter(str(root / f"{row['trial']:04}"))
        settings = {key: _plain(value) for key, value in row["settings"].items()}
        values = {f"search/{name}": value for name, value in (row["values"] or {}).items()}
        for summary in hparams({**settings, "state": row["state"]}, values):
            writer._get_file_writer().add_summary(summary)
        for name, value in values.items():
            writer.add_scalar(name, value, row["trial"])
        for step, value in row["curve"]:
            writer.add_scalar(f"evaluation/{plan.metrics[0].name}", value, step)
        writer.close()
    return True


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else json.dumps(value)
