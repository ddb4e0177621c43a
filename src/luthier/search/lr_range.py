"""A learning rate from one short run: it rises exponentially until the loss does (arXiv:1506.01186)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config
from ..errors import ConfigError, NonFiniteError, SearchError
from ..files import write_atomically
from ..monitor import Console
from ..optim import Constant, NoAveraging
from ..optim.schedule import Scheduler
from ..train import Trainer
from .plots import document

SMOOTHING = 0.9  # of the loss: its share of what it was
DIVERGED = 4.0  # times the least smoothed loss: the run ends there
LEAST = 10  # steps
WINDOW = 8  # a straight line is laid through one part in so many of the curve


@dataclass(frozen=True)
class LrRange:
    """What was found, and where it stands: `lr_range.json` and `lr_range.html` in `folder`."""

    folder: Path
    report: dict[str, Any]

    def told(self) -> str:
        r = self.report
        ended = f"it diverges at {r['diverged']:.2e}" if r["diverged"] else "it did not diverge"
        return (
            f"the loss falls fastest at a rate of {r['steepest']:.2e}, and is least at {r['least']:.2e}; {ended}\n"
            f"try  optim.learning_rate={r['steepest']:.1e}\nplot {self.folder / 'lr_range.html'}"
        )


class Ramp(Scheduler):
    """The rate itself, whatever the peak: from `low` to `high`, each step the same multiple of the one before."""

    def __init__(self, peak: float, low: float, high: float, steps: int):
        super().__init__(Constant(), steps)  # type: ignore[call-arg]
        self.peak, self.low, self.high = peak, low, high

    def factor(self, step: int) -> float:
        return self.low * (self.high / self.low) ** (step / (self.total - 1)) / self.peak


def lr_range(
    config: Config, console: Console | None = None, folder: str | Path | None = None, low: float = 1e-7,
    high: float = 1.0, steps: int = 100,
) -> LrRange:  # fmt: skip
    """Train `steps` steps at rates that rise from `low` to `high`, and say where the loss falls fastest.

    Groups with rates of their own keep their share of optim.learning_rate. Nothing that was trained is kept.
    """
    if not 0 < low < high:
        raise ConfigError(f"--lr-from {low:g} --lr-to {high:g}: expected two rates above 0, the lower one first")
    if steps < LEAST:
        raise ConfigError(f"--lr-steps {steps}: a curve needs at least {LEAST} steps")
    if config.objective.rolls_out:
        raise ConfigError(f"--lr-range follows the loss, which with method={config.method} does not say what is learnt")
    console = console or Console()
    out = Path(folder or f"{config.output_dir.rstrip('/')}-lr-range")
    shutil.rmtree(out / "run", ignore_errors=True)
    rates, losses = _run(_short(config, out / "run", steps), console, low, high, steps)
    shutil.rmtree(out / "run", ignore_errors=True)
    report = found(rates, losses)
    write_atomically(out / "lr_range.json", json.dumps(report, indent=1))
    write_atomically(out / "lr_range.html", page(report, config))
    return LrRange(out, report)


def _short(config: Config, folder: Path, steps: int) -> Config:
    """The run with nothing in it but its steps."""
    return config.model_copy(
        update={
            "schedule": Constant(), "averaging": NoAveraging(), "early_stopping": None, "max_steps": steps,
            "evaluation": config.evaluation.model_copy(update={"every": None, "generate": 0, "tasks": []}),
            "checkpoint": config.checkpoint.model_copy(update={"every": None}),
            "monitor": config.monitor.model_copy(update={"report_to": [], "on_nonfinite": "stop"}),
            "output_dir": str(folder), "search": None,
        }
    )  # fmt: skip


def _run(config: Config, console: Console, low: float, high: float, steps: int) -> tuple[list[float], list[float]]:
    trainer = Trainer(config, console)
    trainer.schedule = Ramp(config.optim.learning_rate, low, high, steps)
    trainer.evaluations.last = 0  # the base is not asked about
    rates: list[float] = []
    losses: list[float] = []
    taken: Any = trainer.loop()
    with trainer.signals:
        try:
            for step in taken:
                rates.append(step.learning_rate)
                losses.append(step.loss)
                smooth = averaged(losses)
                if step.step == steps or (len(losses) >= LEAST and smooth[-1] > DIVERGED * min(smooth)):
                    break
        except NonFiniteError:
            rates.append(config.optim.learning_rate * trainer.schedule.factor(len(rates)))
            losses.append(math.inf)
        finally:
            taken.close()
    return rates, losses


def averaged(losses: Sequence[float]) -> list[float]:
    """The exponential average of the losses so far, without its pull to 0 at the start: it lags, and needs no later
    ones."""
    out, average = [], 0.0
    for count, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        out.append(average / (1 - SMOOTHING**count))
    return out


def lines(rates: Sequence[float], losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(value, slope) at each rate of the straight line through the losses around it, over the logarithm (base 10) of
    the rate, by least squares: smooth, and without a lag that would put the fall at too great a rate."""
    x, y = np.log10(rates), np.asarray(losses)
    half = _width(len(y)) // 2
    values, slopes = np.empty(len(y)), np.empty(len(y))
    for i in range(len(y)):
        start = min(max(0, i - half), max(0, len(y) - 2 * half - 1))  # as wide at the ends
        part = slice(start, start + 2 * half + 1)
        slopes[i], offset = np.polyfit(x[part], y[part], 1)
        values[i] = slopes[i] * x[i] + offset
    return values, slopes


def _width(count: int) -> int:
    """Points that a line is laid through: odd, and 5 at least."""
    return 2 * max(2, count // WINDOW // 2) + 1


def found(rates: Sequence[float], losses: Sequence[float]) -> dict[str, Any]:
    """The rate at which the smoothed loss falls fastest over the logarithm of the rate, where it is least, and where it
    diverged; SearchError where it never falls."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < LEAST:
        raise SearchError(
            f"the loss is not finite after {len(finite)} steps, at a rate of {rates[-1]:.1e}: give a lower --lr-from"
        )
    average = averaged(finite)
    over = len(finite) < len(losses) or average[-1] > DIVERGED * min(average)
    smooth, slopes = lines(rates[: len(finite)], finite)
    least = int(np.argmin(smooth))
    steepest = int(np.argmin(slopes[: least + 1]))
    before = slice(0, max(LEAST, least + 1))
    spread = float(np.std(np.asarray(finite)[before] - smooth[before]))  # of rows around the curve
    if smooth[0] - smooth[least] <= 3 * spread * 2 / math.sqrt(_width(len(finite))):  # a line's end has twice the error
        raise SearchError(
            f"the loss does not fall at any rate from {rates[0]:.1e} to {rates[-1]:.1e} by more than rows differ: "
            "begin lower (--lr-from), end higher (--lr-to), take more steps (--lr-steps), or look at the data"
        )
    return {
        "steepest": rates[steepest], "least": rates[least], "diverged": rates[-1] if over else None,
        "rates": list(rates), "losses": [loss if math.isfinite(loss) else None for loss in losses],
        "smoothed": smooth.tolist(),
    }  # fmt: skip


# ---------------------------------------------------------------------------- the plot


def page(report: dict[str, Any], config: Config) -> str:
    diverged = f", diverged at {report['diverged']:.2e}" if report["diverged"] else ""
    body = (
        f"<h1>Learning rates of {escape(config.output_dir)}</h1>\n<p>The smoothed loss falls fastest at <strong>"
        f"{report['steepest']:.2e}</strong> and is least at {report['least']:.2e}{diverged}.</p>\n{_svg(report)}"
    )
    return document("Learning rates", body)


def _svg(report: dict[str, Any], width: int = 900, height: int = 320) -> str:
    smooth, rates = report["smoothed"], report["rates"]
    shown = [min(loss, 2 * smooth[0]) for loss in smooth]  # what diverges would flatten all else
    low, high = min(shown), max(shown)
    begin, end = math.log10(rates[0]), math.log10(rates[-1])
    left, top, across, up = 70, 20, width - 90, height - 60

    def x(rate: float) -> float:
        return left + across * (math.log10(rate) - begin) / (end - begin)

    def y(loss: float) -> float:
        return top + up * (1 - (loss - low) / ((high - low) or 1))

    corners = " ".join(f"{x(r):.1f},{y(loss):.1f}" for r, loss in zip(rates, shown))
    marks = ""
    for i, name in enumerate(("steepest", "least")):
        at = x(report[name])
        anchor, beside = ("end", at - 4) if at > width / 2 else ("start", at + 4)
        marks += (
            f'<path class=best-so-far d="M{at:.1f} {top}V{top + up}"/><text x="{beside:.1f}" y="{top + 12 + 14 * i}" '
            f'text-anchor={anchor}>{name} {report[name]:.1e}</text>\n'
        )
    ticks = "".join(
        f'<text x="{x(10.0**e):.1f}" y="{top + up + 16}" text-anchor="middle">1e{e}</text>'
        for e in range(math.ceil(begin - 1e-9), math.floor(end + 1e-9) + 1)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role=img aria-label="Smoothed loss over the learning rate">\n'
        f'<path class=axis d="M{left} {top}V{top + up}H{left + across}"/>\n<polyline class=curve points="{corners}"/>\n'
        f"{marks}{ticks}\n<text x={left - 6} y={top + 4} text-anchor=end>{high:.3g}</text>\n"
        f"<text x={left - 6} y={top + up} text-anchor=end>{low:.3g}</text>\n"
        f'<text class=name x="{left + across}" y="{height - 8}" text-anchor="end">learning rate</text></svg>\n'
    )
