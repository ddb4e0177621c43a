"""Several workers: processes on this machine with one GPU each, or wherever Ray has room."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ..errors import ConfigError, Interrupted, LuthierError
from ..files import write_atomically
from ..monitor import Console
from ..signals import Signals, Stopped
from .plan import Plan
from .storage import ADDRESS, ATTEMPTS, Storage
from .study import Clock


class WorkerError(LuthierError):
    """A worker ended with an error, which it has said."""

    def __init__(self, code: int):
        super().__init__("a worker of the search ended with an error: see above")
        self.exit_code = code


def launch(plan: Plan, storage: Storage, console: Console, clock: Clock) -> None:
    """Start the workers and wait for them; one that was killed is started again, as long as trials are left."""
    path = plan.folder / "search.yaml"
    section = plan.settings.model_dump(mode="json") | {
        "workers": 1, "launcher": "local", "folder": str(plan.folder), "trials": plan.trials, "storage": None,
    }  # fmt: skip
    write_atomically(path, yaml.safe_dump({**plan.sources[0], "search": section}, sort_keys=False, allow_unicode=True))
    start = {"local": _local, "ray": _ray}[plan.settings.launcher]
    for _ in range(ATTEMPTS + 1):
        command = [sys.executable, "-m", "luthier", "search", str(path), "--worker", *plan.places]
        if clock.end is not None:
            command += ["--hours", str(max(clock.left(), 1.0) / 3600)]
        codes = start(command, plan, console)
        errors = [code for code in codes if code > 0 and code not in (130, 143)]
        if errors:
            raise WorkerError(errors[0])
        if not any(codes) or clock.over() or not storage.left(plan.trials):
            return
        console.warn(f"a worker was ended from outside ({', '.join(_told(c) for c in codes if c)}); starting again")


def _told(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _local(command: Sequence[str], plan: Plan, console: Console) -> list[int]:
    """The exit codes of the workers, each of which sees one GPU, where there are any, and its share of the cores."""
    workers, devices = plan.settings.workers, _devices(plan)
    environments: list[Mapping[str, str]] = []
    for i in range(workers):
        own = _address(plan) | ({"CUDA_VISIBLE_DEVICES": devices[i]} if devices else {})
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // workers))
        environments.append(os.environ | {"OMP_NUM_THREADS": threads} | own)
    signals = Signals()
    with signals:
        processes = [subprocess.Popen(command, env=dict(env)) for env in environments]
        try:
            with signals.breakable():
                return [p.wait() for p in processes]
        except Stopped:
            for p in processes:
                p.send_signal(signal.SIGTERM)
            for p in processes:
                p.wait()
            assert signals.caught is not None
            name = signal.Signals(signals.caught).name
            raise Interrupted(
                f"stopped by {name}; each worker saved its trial; the same command goes on.", signals.caught
            ) from None


def _devices(plan: Plan) -> list[str]:
    """The GPUs of this machine; none where trials run on the CPU. ConfigError where there are fewer than workers."""
    if plan.config.parallel.device == "cpu":
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if not torch.cuda.is_available() or not found:
        return []
    if len(found) < plan.settings.workers:
        raise ConfigError(
            f"search.workers={plan.settings.workers}, and here are {len(found)} GPUs, of which each takes one: use "
            f"workers={len(found)}, and start the same command on other machines that share the folder"
        )
    return found


def _ray(command: Sequence[str], plan: Plan, console: Console) -> list[int]:
    """The same through Ray (RAY_ADDRESS, else on this machine): a task for each worker, which it gives a GPU where the
    cluster has some. The search's folder, or its storage and data, must be the same on all machines."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of a search is told to anybody
    import ray  # type: ignore[import-not-found]

    ray.init(ignore_reinit_error=True)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    console.say(f"Ray: {plan.settings.workers} workers, {gpus} GPUs")
    task: Any = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=0)(_of_ray)
    told = (list(command), os.getcwd(), _address(plan))
    return ray.get([task.remote(*told) for _ in range(plan.settings.workers)])


def _of_ray(command: list[str], folder: str, told: dict[str, str]) -> int:
    return subprocess.run(command, cwd=folder, env=os.environ | told).returncode


def _address(plan: Plan) -> dict[str, str]:
    return {ADDRESS: plan.settings.storage} if plan.settings.storage else {}
