"""The loop of a search, as each of its workers runs it: claim a trial, run it, tell, until none is left."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from ..errors import Interrupted, SearchError
from ..monitor import Console
from ..shared import Shared
from . import trials as trials_
from .metrics import front
from .plan import Plan
from .sampling import distribution, propose
from .storage import Claimed, Lost, Storage
from .trials import Outcome, TimeOver


@dataclass(frozen=True)
class Clock:
    """The hours of a search; what the comparison at its end will take is kept free."""

    end: float | None

    @classmethod
    def of(cls, plan: Plan) -> Clock:
        hours = plan.settings.hours
        return cls(None if hours is None else time.monotonic() + hours * 3600)

    def left(self) -> float:
        return math.inf if self.end is None else self.end - time.monotonic()

    def over(self) -> bool:
        return self.left() <= 0

    def until(self, plan: Plan, storage: Storage) -> float:
        """When trials end, on time.monotonic: twice a trial's time for each fresh seed before the hours do."""
        if self.end is None:
            return math.inf
        taken = [t.user_attrs["seconds"] for t in storage.trials() if t.state == storage.states.COMPLETE]
        return self.end - 2 * plan.settings.fresh_seeds * (sum(taken) / len(taken) if taken else 0.0)


ALIKE = 3  # trials that fail for the same reason, and no other: so would all


def open_storage(plan: Plan) -> Storage:
    """The storage of a search with all its trials planned; ConfigError where it holds another search."""
    storage = Storage(
        plan.folder, plan.settings.storage, plan.folder.resolve().name, plan.directions, plan.build_pruner()
    )  # fmt: skip
    storage.agree(plan.told())
    storage.plan(plan.trials)
    return storage


def work(plan: Plan, storage: Storage, console: Console, clock: Clock) -> bool:
    """Run trials until none waits, or the hours are over; returns whether there is none left.

    Raises SearchError where all fail alike, and what is no trial's own fault.
    """
    shared, said = Shared(), set[str]()
    states = storage.states

    def chosen(number: int, others: list) -> dict[str, Any]:
        s = plan.settings
        return propose(plan.space, others, number, s.seed, s.sampler, plan.directions, plan.trials, plan.default)

    def spread(key: str) -> Any:
        return distribution(plan.space.by_key[key])

    while time.monotonic() < (until := clock.until(plan, storage)):
        claimed = storage.claim(plan.trials, chosen, spread)
        if claimed is None:
            return True
        try:
            outcome = trials_.run(plan, claimed, storage, shared, console, said, until)
            _tell(storage, claimed, outcome)
        except TimeOver:
            storage.release(claimed)
            return False
        except Lost:
            console.warn(f"trial {claimed.number}: another process has it, as this one was silent for long")
            continue
        except (Interrupted, KeyboardInterrupt):
            storage.release(claimed)
            raise
        except Exception as error:
            storage.finish(claimed.id, "failed", states.FAIL, reason=f"{type(error).__name__}: {error}"[:500])
            raise
        console.say(line(plan, storage, claimed, outcome))
        _keep_the_best(plan, storage)
        _check_hopeless(storage)
    return False


def _tell(storage: Storage, claimed: Claimed, outcome: Outcome) -> None:
    states = storage.states
    told = {"seconds": outcome.seconds, "steps": outcome.step, "costs": dict(outcome.costs or {})}
    if outcome.kind == "complete":
        storage.finish(claimed.id, "complete", states.COMPLETE, outcome.values, **told)
    elif outcome.kind == "pruned":
        seen = storage.storage.get_trial(claimed.id).intermediate_values
        last = seen[max(seen)] if seen else math.nan
        storage.finish(claimed.id, "pruned", states.PRUNED, None if math.isnan(last) else [last], **told)
    else:
        storage.finish(claimed.id, outcome.kind, states.FAIL, reason=outcome.reason, **told)


def line(plan: Plan, storage: Storage, claimed: Claimed, outcome: Outcome) -> str:
    """What is said of a trial when it has ended."""
    values = plan.space.values(claimed.labels)
    told = ", ".join(f"{key}={_brief(value)}" for key, value in values.items())
    found = storage.trials()[: plan.trials]
    done = sum(t.state.is_finished() for t in found)
    if outcome.kind == "complete":
        how = ", ".join(f"{m.name} {v:.4g}" for m, v in zip(plan.metrics, outcome.values or ()))
    elif outcome.kind == "pruned":
        how = f"ended at step {outcome.step}: worse than others there"
    else:
        how = f"{outcome.kind}: {outcome.reason}"
    best = front(plan.metrics, {t.number: t.values for t in found if t.state == storage.states.COMPLETE})
    stands = f"; best is trial {best[0]}" if best and len(plan.metrics) == 1 else ""
    return f"trial {claimed.number} ({done} of {plan.trials}, {outcome.seconds:.0f} s): {told}: {how}{stands}"


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _keep_the_best(plan: Plan, storage: Storage) -> None:
    """Checkpoints of trials that are beaten are removed; of Pareto's front all are kept."""
    found = storage.trials()[: plan.trials]
    best = front(plan.metrics, {t.number: t.values for t in found if t.state == storage.states.COMPLETE})
    for trial in found:
        if trial.state.is_finished() and trial.number not in best:
            trials_.drop_weights(plan.trial_folder(trial.number))


def _check_hopeless(storage: Storage) -> None:
    ended = [t for t in storage.trials() if t.state.is_finished()]
    reasons = {t.user_attrs.get("reason") for t in ended}
    if len(ended) >= ALIKE and len(reasons) == 1 and all(t.state == storage.states.FAIL for t in ended):
        raise SearchError(
            f"the first {len(ended)} trials all failed for the same reason, so the search ends here: {reasons.pop()}"
        )
