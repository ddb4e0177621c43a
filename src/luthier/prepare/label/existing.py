"""A row before it is labelled: whether it can be, and what becomes of the label that it has."""

from __future__ import annotations

from ...data.sources import Row
from ...errors import DataError
from .tasks import Label, Task


def settled(task: Task, row: Row, existing: str) -> tuple[dict, Label | None, str | None]:
    """(the values by the names of formats, the label that the row has, why it cannot be labelled)."""
    if row.fault is not None:
        return {}, None, f"unreadable: {row.fault}"
    values = task.values(row.values)
    if (fault := task.fault(values)) is not None:
        return values, None, f"unfit: {fault}"
    if not task.labelled(values):
        return values, None, None
    if existing == "refuse":
        named = " and ".join(task.adds)
        raise DataError(
            f"{row.place}: the row has {named} already; with `existing: replace` or `existing: keep` it may"
        )
    label = task.before(values)
    if label is None and existing == "keep":
        return values, None, f"unfit: it has a label that the task does not know ({task.adds[0]})"
    return values, label, None
