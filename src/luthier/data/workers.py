"""Helper processes that tokenise: started as `python -m luthier.data.workers`, so a user's script is not run again.

A helper is asked through its standard input and answers through its standard output, in Python's own serialisation:
only a process and its own child talk there, nothing is ever read from a file. It ends with its parent, however that
one ends, as its input does.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from ..errors import LuthierError
from .masks import Renderer
from .tokenise import Made, Task, tokenise

WORTH = 16 << 20  # bytes of data from which helpers are started unasked: 10 s of work, of which 2 to 3 s start them
MOST = 16  # helpers started unasked: reading the rows keeps up with about so many


def helpers(num_proc: int | None, size: int | None) -> int:
    """How many processes to start beside this one, for data of `size` bytes; None where that is not known."""
    if num_proc is not None:
        return 0 if num_proc == 1 else num_proc
    cores = _cores()
    return min(MOST, cores) if cores > 1 and size is not None and size >= WORTH else 0


def helpers_of_a_stream(num_proc: int | None, size: int | None) -> int:
    """The same for a stream, which is tokenised beside the training: in a thread where data or cores are few."""
    if num_proc is not None:
        return 0 if num_proc == 1 else num_proc
    return min(MOST, _cores() // 4) if size is None or size >= WORTH else 0


def _cores() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class Workers:
    """Tokenises tasks in `count` helper processes, or here where that is 0; results come in the order of the tasks."""

    def __init__(self, count: int, renderer: Renderer):
        self.count, self.renderer = count, renderer
        self.processes: list[subprocess.Popen] = []
        self.idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self.threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def map(self, tasks: Iterable[Task]) -> Iterator[Made]:
        """No more than two tasks for each helper wait at a time, so that memory stays bounded."""
        if not self.count:
            yield from (tokenise(task, self.renderer) for task in tasks)
            return
        if self.threads is None:
            self._start()
        assert self.threads is not None
        waiting: deque[Future[Made]] = deque()
        for task in tasks:
            waiting.append(self.threads.submit(self._ask, task))
            if len(waiting) >= 2 * self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        self.kill()
        if self.threads is not None:
            self.threads.shutdown(wait=True, cancel_futures=True)
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # of what was still to be written
                        pipe.close()
        self.processes, self.threads = [], None

    def _start(self) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = os.environ | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
        self.threads = ThreadPoolExecutor(self.count)
        first = pickle.dumps(self.renderer)
        for _ in range(self.count):
            process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
            self.processes.append(process)
            self.threads.submit(self._greet, process, first)

    def _greet(self, process: subprocess.Popen, first: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # told by the first task
            process.stdin.write(first)  # type: ignore[union-attr]
        self.idle.put(process)

    def _ask(self, task: Task) -> Made:
        process = self.idle.get()
        try:
            pickle.dump(task, process.stdin, protocol=5)  # type: ignore[arg-type]
            process.stdin.flush()  # type: ignore[union-attr]
            done, answer = pickle.load(process.stdout)  # type: ignore[arg-type]
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise LuthierError(  # not about the data: other ranks do not meet it
                f"a process that tokenises rows ended with {process.wait()} (-9: killed, most often for want of "
                "memory): use a smaller data.num_proc, or data.num_proc=1"
            ) from None
        finally:
            self.idle.put(process)
        if not done:
            raise answer
        return answer


def main() -> None:
    """Take the renderer, then tasks, until the input ends. Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get into the answers
    asked = sys.stdin.buffer
    renderer = pickle.load(asked)
    while True:
        try:
            task = pickle.load(asked)
        except EOFError:
            return
        try:
            data = pickle.dumps((True, tokenise(task, renderer)), protocol=5)
        except Exception as error:
            data = _error(error)
        try:
            answers.write(data)
            answers.flush()
        except BrokenPipeError:  # the parent is gone
            os._exit(1)


def _error(error: Exception) -> bytes:
    """An exception as it is where it can travel, else its text."""
    try:
        data = pickle.dumps((False, error))
        pickle.loads(data)
    except Exception:
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
    return data


if __name__ == "__main__":
    main()
