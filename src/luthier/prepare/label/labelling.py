"""Whole sets labelled by rules or by a model, through the engine of pieces; what came of it, as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError
from .. import agreement
from ..journal import finished
from ..outputs import beside
from ..pieces import Done, Say, inputs_of, journal_of, pieces_of, run
from .judge import VOTES, Judging, ask, expanded
from .plan import Plan
from .rules import ASIDE, Ruling

COUNTED = ("rows", "overlaps", "conflicts")  # of each rule
VERSION = 1  # of what the same settings make of the same rows


class Labelled(dict):
    """What was done, as JSON; `exit_code` is for pipelines: where no row has a label, nothing can be trained on."""

    @property
    def exit_code(self) -> int:
        return 0 if self["labelled"] or self["kept"] else DataError.exit_code


def by_rules(
    source: str | Sequence[str], out: Path, plan: Plan, *, workers: int | None = None, say: Say = lambda text: None,
    split: str = "train",
) -> Labelled:  # fmt: skip
    _check(plan, "rules")
    assert plan.rules is not None
    settings = {"what": "label rules", "version": VERSION, "plan": plan.model_dump(mode="json", exclude={"judge"})}
    work = partial(Ruling, plan.task, plan.rules, plan.existing)
    done = run(
        source, out, work, settings=settings, workers=workers, say=say, sides={ASIDE: beside(out, ASIDE)}, split=split
    )
    told = _told(done, out, (ASIDE,))
    told["rules"] = []
    for i, name in enumerate(plan.rules.names()):
        counts = _sum(done, lambda end, i=i: end["rules"][i])
        told["rules"].append({"name": name, **{key: counts[key] for key in COUNTED}, **_right(counts)})
    return Labelled(told)


def by_model(
    source: str | Sequence[str], out: Path, plan: Plan, *, workers: int | None = None, say: Say = lambda text: None,
    split: str = "train",
) -> Labelled:  # fmt: skip
    """Rows are asked about in this process, each answer is kept at once, and labels are made of them in pieces."""
    _check(plan, "judge")
    judge = plan.judge
    assert judge is not None
    folder = journal_of(out).with_name(f"{journal_of(out).name}.answers")
    told_model = judge.model_dump(mode="json") | {"identity": judge.model.identity()}
    told_model["model"] = {
        k: v for k, v in told_model["model"].items() if k not in ("parallel", "timeout", "retries", "api_key_env")
    }
    whole = plan.model_dump(mode="json", exclude={"rules", "judge"})
    settings = {"what": "label model", "version": VERSION, "plan": whole, "judge": told_model}
    pieces = pieces_of(source, split)
    before = [inputs_of(piece) for piece in pieces]
    if not finished(journal_of(out)):
        sides = [out, beside(out, ASIDE), beside(out, VOTES)]
        if not journal_of(out).exists() and (there := next((path for path in sides if path.is_file()), None)):
            raise ConfigError(f"{there} exists: give another name, or remove it; nothing was written")
        ask(pieces, plan.task, judge, plan.existing, folder, say)
    if before != [inputs_of(piece) for piece in pieces_of(source, split)]:
        raise ConfigError("the source changed while the model was asked; the same command goes on with what is new")
    work = partial(Judging, plan.task, judge, plan.existing, folder)
    done = run(pieces, out, work, settings=settings, workers=workers, say=say,
               sides={ASIDE: beside(out, ASIDE), VOTES: beside(out, VOTES)})  # fmt: skip
    told = _told(done, out, (ASIDE, VOTES))
    counts, patterns = _sum(done, lambda end: end["counts"]), _sum(done, lambda end: end["patterns"])
    asked = counts["asked"]
    told |= {"asked": asked, "votes": counts["votes"], "not_understood": counts["not_understood"],
             "mean_agreement": round(sum(d.end["sum"] for d in done) / asked, 4) if asked else None}  # fmt: skip
    alpha = agreement.krippendorff_of(expanded(patterns))
    return Labelled(told | {"krippendorff": None if alpha != alpha else round(alpha, 4)})


def _check(plan: Plan, way: Any) -> None:
    if problems := plan.wanting(way):
        raise ConfigError(problems)


def _sum(done: Sequence[Done], of: Any) -> Counter:
    made: Counter = Counter()
    for d in done:
        made.update(of(d.end))
    return made


def _told(done: Sequence[Done], out: Path, sides: Sequence[str]) -> dict:
    counts = _sum(done, lambda end: end["counts"])
    told: dict[str, Any] = {
        "rows": sum(d.rows for d in done), "labelled": counts["labelled"], "kept": counts["kept"],
        "labels": dict(_sum(done, lambda end: end["labels"]).most_common()),
        "aside": dict(_sum(done, lambda end: end["aside"]).most_common()), "out": str(out), **_right(counts),
    }  # fmt: skip
    return told | {f"{name}_rows": str(path) for name in sides if (path := beside(out, name)).exists()}


def _right(counts: Mapping[str, int]) -> dict:
    """On rows that had a label before: how often it is the same."""
    known = counts.get("known", 0)
    return {"known": known, "same_as_known": round(counts.get("right", 0) / known, 4)} if known else {}
