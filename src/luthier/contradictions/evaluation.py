"""What does not go together in what is measured, and in what a run says while it runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..data import sources
from ..fields import ON_ANSWERS, PYTHON_DOCS, Config


def problems(config: Config) -> list[str]:
    found = []
    if config.data.validation is None and (config.evaluation.every or config.evaluation.generate):
        found.append("evaluation needs held-out rows: give data.validation, for example data.validation=0.05")
    if config.early_stopping and not config.evaluation.every:
        found.append("early_stopping goes by evaluations: give evaluation.every, a number of steps")
    return [*found, *_of_monitoring(config), *_of_evaluation(config)]


def _of_monitoring(config: Config) -> list[str]:
    monitor, found = config.monitor, []
    if len(set(monitor.report_to)) < len(monitor.report_to):
        found.append(f"monitor.report_to={monitor.report_to}: name each tracker once")
    if monitor.histogram_every and not monitor.report_to:
        found.append(
            f"monitor.histogram_every={monitor.histogram_every} has nowhere to go: name a tracker in monitor.report_to"
        )
    if monitor.profile_steps and not 1 <= monitor.profile_steps[0] < monitor.profile_steps[1]:
        found.append(
            f"monitor.profile_steps={monitor.profile_steps}: should be [start, stop) with 1 <= start < stop, "
            "for example [3, 5] for steps 3 and 4"
        )
    return found


def _of_evaluation(config: Config) -> list[str]:
    e, found = config.evaluation, []
    if config.data.validation is None and (e.forgetting or e.tasks):
        named = "forgetting" if e.forgetting else "tasks"
        found.append(
            f"evaluation.{named} is measured with the held-out rows: give data.validation, for example 0.05"
        )
    if not e.generate and e.metrics != ["exact_match"]:
        found.append(f"evaluation.metrics={e.metrics} scores answers: give evaluation.generate, the number of prompts")
    if twice := sorted({m for m in e.metrics if e.metrics.count(m) > 1}):
        found.append(f"evaluation.metrics: {', '.join(twice)} is named twice")
    if "bleu" in e.metrics and not find_spec("sacrebleu"):
        found.append("evaluation.metrics: bleu is counted by sacrebleu: pip install 'luthier[eval]'")
    if e.every and e.metric_for_best_model in ON_ANSWERS and not (e.generate and e.generate_every):
        found.append(
            f"evaluation.metric_for_best_model={e.metric_for_best_model!r} is counted on answers, so every evaluation "
            "has to answer: give evaluation.generate, and evaluation.generate_every=true"
        )
    if e.forgetting not in (None, PYTHON_DOCS) and (problem := sources.missing(e.forgetting)):
        found.append(f"evaluation.forgetting: {problem}; give a file of rows, or {PYTHON_DOCS}")
    if e.tasks and not find_spec("lm_eval"):
        found.append("evaluation.tasks are done with lm-evaluation-harness: pip install 'luthier[eval]'")
    for task in e.tasks:
        path = Path(task).expanduser()
        if (path.suffix in (".yaml", ".yml") or len(path.parts) > 1) and not path.exists():
            found.append(f"evaluation.tasks: there is no {path}; give a task's name, its YAML file or a folder of them")
        elif path.exists() and not e.trust_task_files:
            found.append(
                f"evaluation.tasks: {path} is a file or folder of task files, which may run Python of their own: read "
                "them, then set evaluation.trust_task_files=true"
            )
    return found
