"""Code and its tests in a separate process with limits, in a folder of its own, and what came of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import RewardError

PROGRAM = Path(__file__).with_name("sandboxed.py")
FILE_MB = 8  # largest file that the code may write


@dataclass(frozen=True)
class Limits:
    cpu_seconds: float
    wall_seconds: float
    memory_mb: int
    confine: bool = True


def passed(code: str, tests: Sequence[str], entry_point: str | None, limits: Limits) -> list[bool]:
    """Which of the tests the code passes.

    A test has passed when the process says so with a word that only this call knows, so it does not matter how the
    process ends. RewardError where the code could not be run at all.
    """
    token = secrets.token_hex(16)
    request = {
        "code": code, "tests": list(tests), "entry_point": entry_point, "token": token, "confine": limits.confine,
        "cpu_seconds": math.ceil(limits.cpu_seconds), "memory_mb": limits.memory_mb, "file_mb": FILE_MB,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="luthier-tests-", ignore_cleanup_errors=True) as folder:
        said, ended = _run(json.dumps(request).encode("utf-8", "surrogatepass"), folder, limits.wall_seconds)
    told = [line.removeprefix(f"{token} ") for line in said.splitlines() if line.startswith(f"{token} ")]
    if told and told[0].startswith("unconfined"):
        why = told[0].removeprefix("unconfined ")
        raise RewardError(
            f"this system cannot keep the code from files, network and other processes ({why}): use Linux 5.13 or "
            "newer, or allow it with confine=false, in a container of its own"
        )
    if "ready" not in told:
        raise RewardError(f"the process for the tests did not start ({ended}): give it more wall_seconds or memory_mb")
    return [f"passed {number}" in told for number in range(len(tests))]


def _run(request: bytes, folder: str, seconds: float) -> tuple[str, str]:
    """What the process said before it ended, or was ended with all its group, and how that was."""
    reading, writing = os.pipe()
    environment = {
        "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    try:
        process = subprocess.Popen(
            # As with -I, but for the seed of hashes: nothing of the user's environment is in this one.
            [sys.executable, "-P", "-s", "-B", str(PROGRAM), str(writing)], cwd=folder, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(writing,),
            start_new_session=True,
        )  # fmt: skip
        try:
            with contextlib.suppress(BrokenPipeError):
                process.communicate(request, timeout=seconds)
            ended = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"not within {seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        os.set_blocking(reading, False)
        try:
            return os.read(reading, 1 << 16).decode("utf-8", "replace"), ended
        except BlockingIOError:
            return "", ended
    finally:
        os.close(reading)
        os.close(writing)
