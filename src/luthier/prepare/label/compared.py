"""How far files agree that label the same rows, each by one annotator; rows are matched by all but their labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from ...data import sources
from ...errors import ConfigError, DataError
from .. import agreement
from ..encoded import dumps
from .tasks import AnyTask, Edit, Label, Preference


def compared(files: Sequence[str], task: AnyTask) -> dict:
    """The agreement of the files' labels on the rows that are in several."""
    if len(files) < 2:
        raise ConfigError("give two files at least, each with the labels of one annotator")
    if isinstance(task, Edit):
        raise ConfigError("task.kind='edit': texts that people write are not counted alike")
    names = [str(Path(file)) for file in files]
    if len(set(names)) < len(names):
        raise ConfigError("a file is given twice")
    votes: dict[str, dict] = {name: {} for name in names}
    seen: Counter[bytes] = Counter()
    for name in names:
        times: Counter[bytes] = Counter()
        for row in sources.read(name):
            if row.fault is not None:
                raise DataError(f"{row.place}: {row.fault}")
            values, label = _label(task, task.values(row.values))
            if label is None:
                raise DataError(f"{row.place}: the row has no label of the task")
            what = sha256(
                dumps({k: v for k, v in values.items() if k not in task.adds}).encode("utf-8", "replace")
            ).digest()
            times[what] += 1
            seen[what] += times[what] == 1
            votes[name].update({(what, times[what], i): vote for i, vote in enumerate(task.votes(label, values))})
    if max(seen.values()) < 2:
        raise DataError(f"no row of {names[0]} is in another file, too, when labels are left out")
    unit = "words" if task.kind == "spans" else "rows"
    return {"agreement": agreement.summary(votes) | {"of": unit}}


def _label(task: AnyTask, values: dict) -> tuple[dict, Label | None]:
    """The row and its label. Two answers that were compared are put into one order, whichever is the chosen one."""
    if isinstance(task, Preference) and task.answers[0] not in values and {"chosen", "rejected"} <= values.keys():
        pair = sorted((values["chosen"], values["rejected"]), key=dumps)
        values = {**values, task.answers[0]: pair[0], task.answers[1]: pair[1]}
    return values, task.before(values)
