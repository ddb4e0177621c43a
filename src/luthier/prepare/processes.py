"""Processes that work on pieces: started as `python -m luthier.prepare.processes`, so a user's script is not run again.

They are asked through their standard input and answer through their standard output, in Python's own serialisation:
only a process and its own child talk there, nothing is ever read from a file. They end with their parent.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from ..errors import LuthierError

Job = Callable[[Any, Callable[[int], None]], int]  # (task, what to call with rows done so far) -> rows
Tell = Callable[[int, int, bool], None]  # (number of the task, rows so far, whether it is finished)


class Processes:
    """Runs a job on tasks in `count` processes, or here where that is 0."""

    def __init__(self, count: int, job: Job):
        self.count, self.job = count, job
        self.running: list[subprocess.Popen] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            process.kill()
        for process in self.running:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                try:
                    if pipe is not None:
                        pipe.close()
                except BrokenPipeError:  # of what was still to be written
                    pass

    def run(self, tasks: Sequence[tuple], tell: Tell) -> None:
        """All tasks; the first error of one ends the others."""
        if not self.count:
            for task in tasks:
                rows = self.job(task, lambda so_far, number=task[0]: tell(number, so_far, False))
                tell(task[0], rows, True)
            return
        idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        for _ in range(self.count):
            idle.put(self._started())
        said: SimpleQueue = SimpleQueue()
        with ThreadPoolExecutor(self.count) as threads:
            for task in tasks:
                threads.submit(self._ask, task, idle, said)
            left = len(tasks)
            try:
                while left:
                    number, answer, finished = said.get()
                    if isinstance(answer, Exception):
                        raise answer
                    tell(number, answer, finished)
                    left -= finished
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                for process in self.running:
                    process.kill()
                raise

    def _started(self) -> subprocess.Popen:
        paths = os.pathsep.join(path for path in sys.path if path)
        process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        self.running.append(process)
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(self.job))
        process.stdin.flush()
        return process

    def _ask(self, task: tuple, idle: SimpleQueue, said: SimpleQueue) -> None:
        """Have one process do the task; (number, rows so far or what went wrong, whether it is done) for each word."""
        process = idle.get()
        try:
            pickle.dump(task, process.stdin, protocol=5)
            process.stdin.flush()
            kind = ""
            while kind not in ("done", "error"):
                kind, answer = pickle.load(process.stdout)
                said.put((task[0], answer, kind == "done"))
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            problem = LuthierError(
                f"a process that worked on rows ended with {process.wait()} (-9: killed, most often for want of "
                "memory): use fewer --workers; the same command goes on"
            )
            said.put((task[0], problem, False))
        finally:
            idle.put(process)


def main() -> None:
    """Take the job, then tasks, until the input ends. Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get into the answers
    asked = sys.stdin.buffer
    job = pickle.load(asked)

    def say(kind: str, what: Any) -> None:
        try:
            answers.write(pickle.dumps((kind, what), protocol=5))
            answers.flush()
        except BrokenPipeError:  # the parent is gone
            os._exit(1)

    while True:
        try:
            task = pickle.load(asked)
        except EOFError:
            return
        try:
            say("done", job(task, lambda rows: say("rows", rows)))
        except Exception as error:
            say("error", _travelling(error))


def _travelling(error: Exception) -> Exception:
    """An exception as it is where it can be sent, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
