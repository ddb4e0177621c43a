"""The trials of a search in an Optuna storage, which any number of processes share: planned, claimed, told, taken over.

All trials are there from the start, waiting. A process claims the first that waits, or whose process has died, so that
there are never more than were asked for. What is written is what Optuna reads: its dashboard shows a search as it runs.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError

BEAT = 20.0  # seconds between signs of life
DEAD = 180.0  # seconds without one after which a process on another machine is taken for dead
ATTEMPTS = 3  # processes that may die of the same trial
JOURNAL = "journal.log"
ADDRESS = "LUTHIER_SEARCH_STORAGE"  # tells workers the storage in their environment: it can hold a password
PASSWORD = re.compile(r"(://[^:/@]*:)[^@/]*@")


def optuna() -> Any:
    """The library; ConfigError names what to install where it is missing."""
    if not find_spec("optuna"):
        raise ConfigError("`luthier search` is built on Optuna: pip install 'luthier[search]'")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass(frozen=True)
class Claimed:
    """A trial of this process's own."""

    number: int
    id: int
    labels: dict[str, Any]
    attempt: int
    """How many processes have had it, this one included."""


class Lost(Exception):
    """Another process has taken the trial over, as this one gave no sign of life for too long."""


class Storage:
    """One search. `url` is Optuna's; without one, a journal in `folder`, which several machines may share."""

    def __init__(self, folder: Path, url: str | None, name: str, directions: Sequence[str], pruner: Any = None):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ConfigError(f"search.folder='{folder}' is a file: name a folder (--folder)") from None
        library = optuna()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", library.exceptions.ExperimentalWarning)
            self.storage = _open(library, folder, url)
            with self.locked():
                self.study = library.create_study(
                    storage=self.storage, study_name=name, directions=list(directions), load_if_exists=True,
                    sampler=library.samplers.RandomSampler(0), pruner=pruner or library.pruners.NopPruner(),
                )  # fmt: skip
        self.study_id = self.storage.get_study_id_from_name(name)
        found = [d.name.lower() for d in self.storage.get_study_directions(self.study_id)]
        if found != [d.lower() for d in directions]:
            raise ConfigError(
                f"the storage holds a search {name!r} that minimises or maximises otherwise ({', '.join(found)}): give "
                "another search.folder (--folder)"
            )
        self.states = library.trial.TrialState

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While no other process that shares the folder plans or claims; the system frees it of one that dies."""
        try:
            import fcntl
        except ImportError:  # Windows: what is claimed twice is found out by `beat`
            yield
            return
        with open(self.folder / ".lock", "w") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # ------------------------------------------------------------------ the plan
    def agree(self, told: dict[str, Any]) -> None:
        """What the search is of, told by the first process; another one's must be the same."""
        with self.locked():
            known = self.storage.get_study_user_attrs(self.study_id).get("search")
            if known is None:
                self.storage.set_study_user_attr(self.study_id, "search", told)
                return
        changed = [
            f"{key}: {json.dumps(known.get(key))} there, {json.dumps(told.get(key))} here"
            for key in {**known, **told}
            if known.get(key) != told.get(key)
        ]
        if changed:
            raise ConfigError(
                f"{self.folder} holds a search of something else ({'; '.join(changed)}): give another search.folder "
                "(--folder), or the same settings to go on with it"
            )

    def plan(self, count: int) -> None:
        """Let there be `count` trials, no fewer; those that are there already count."""
        with self.locked():
            there = len(self.trials())
            for _ in range(there, count):
                self.storage.create_new_trial(self.study_id, template_trial=_waiting(self.states))

    def trials(self) -> list[Any]:
        """Optuna's frozen trials, in the order of their numbers."""
        return self.storage.get_all_trials(self.study_id)

    def left(self, count: int) -> bool:
        """Whether trials wait, or were given back, or have lost their process."""
        return any(
            t.state == self.states.WAITING
            or (t.state == self.states.RUNNING and not _alive(t.user_attrs.get("owner")))
            for t in self.trials()[:count]
        )

    def others_work(self, count: int) -> bool:
        """Whether processes, of which this one is none any more, have trials."""
        return any(
            t.state == self.states.RUNNING and _alive(t.user_attrs.get("owner")) for t in self.trials()[:count]
        )

    # ------------------------------------------------------------------ one trial
    def claim(self, count: int, propose: Callable[[int, list], dict[str, Any]], spread: Any) -> Claimed | None:
        """The first of `count` trials that nobody works at; None where there is none. `propose` says what it tries,
        of its number and the others; `spread` gives a setting's distribution."""
        with self.locked():
            found = self.trials()
            for trial in found[:count]:
                if trial.state == self.states.RUNNING and not _alive(trial.user_attrs.get("owner")):
                    attempt = trial.user_attrs.get("attempt", 1) + bool(trial.user_attrs.get("owner"))
                    if attempt > ATTEMPTS:
                        with contextlib.suppress(Lost):
                            self.finish(
                                trial._trial_id, "died", self.states.FAIL,
                                reason=f"its process died {ATTEMPTS} times (killed, or out of the computer's memory?)",
                            )
                        continue
                elif trial.state == self.states.WAITING:
                    attempt = 1
                    if not self.storage.set_trial_state_values(trial._trial_id, self.states.RUNNING):
                        continue
                else:
                    continue
                self.tell(trial._trial_id, owner=_me(), attempt=attempt)
                others = [t for t in found if t.number != trial.number and t.user_attrs.get("proposed")]
                labels = self._labels(trial, lambda n=trial.number, o=others: propose(n, o), spread)
                return Claimed(trial.number, trial._trial_id, labels, attempt)
        return None

    def _labels(self, trial: Any, propose: Callable[[], dict], spread: Any) -> dict[str, Any]:
        if trial.user_attrs.get("proposed"):
            return trial.params
        labels = propose()
        for key, label in labels.items():
            if key not in trial.params:
                made = spread(key)
                self.storage.set_trial_param(trial._trial_id, key, made.to_internal_repr(label), made)
        self.tell(trial._trial_id, proposed=True)
        return labels

    def tell(self, trial_id: int, **attributes: Any) -> None:
        """Raises Lost of a trial that has ended."""
        with _ours():
            for key, value in attributes.items():
                self.storage.set_trial_user_attr(trial_id, key, value)

    def report(self, claimed: Claimed, step: int, value: float) -> bool:
        """A trial's metric at an evaluation; returns whether the trial is to end there."""
        with _ours():
            self.storage.set_trial_intermediate_value(claimed.id, step, value)
        return self.study.pruner.prune(self.study, self.storage.get_trial(claimed.id))

    def finish(
        self, trial_id: int, outcome: str, state: Any, values: Sequence[float] | None = None, **attributes: Any
    ) -> None:
        """The end of a trial; the state comes last, as nothing can be told of a finished one. Raises Lost where another
        process has told its end."""
        self.tell(trial_id, outcome=outcome, **attributes)
        with _ours():
            self.storage.set_trial_state_values(trial_id, state, values)

    def release(self, claimed: Claimed) -> None:
        """Give a trial back that was stopped: whoever is next goes on with it."""
        with contextlib.suppress(Lost):
            self.tell(claimed.id, owner=None)

    @contextlib.contextmanager
    def owning(self, claimed: Claimed) -> Iterator[Callable[[], None]]:
        """Signs of life while a trial runs; what is given raises Lost where another process has it now."""
        over, lost = threading.Event(), threading.Event()

        def live() -> None:
            while not over.wait(BEAT):
                try:
                    owner = self.storage.get_trial(claimed.id).user_attrs.get("owner") or {}
                    if (owner.get("host"), owner.get("pid")) != (_me()["host"], _me()["pid"]):
                        lost.set()
                        return
                    self.tell(claimed.id, owner=_me())
                except Exception:  # a storage that is away for a moment must not end a trial
                    continue

        def check() -> None:
            if lost.is_set():
                raise Lost

        thread = threading.Thread(target=live, daemon=True, name=f"trial {claimed.number}")
        thread.start()
        try:
            yield check
        finally:
            over.set()
            thread.join()


@contextlib.contextmanager
def _ours() -> Iterator[None]:
    """Lost where the trial has ended: of machines that share a database and no folder, two may have taken one."""
    try:
        yield
    except optuna().exceptions.UpdateFinishedTrialError:
        raise Lost from None


def _open(library: Any, folder: Path, url: str | None) -> Any:
    if url is None:
        from optuna.storages.journal import JournalFileBackend

        path = folder / JOURNAL
        lock: Any = _Flock(path)
        return library.storages.JournalStorage(JournalFileBackend(str(path), lock))
    try:
        return library.storages.get_storage(url)
    except Exception as error:  # of any database driver
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"search.storage={hidden(url)!r} cannot be opened: {hidden(told)}; give a URL such as sqlite:///search.db"
        ) from None


def hidden(url: str) -> str:
    """An address without its password."""
    return PASSWORD.sub(r"\1***@", url)


def told_address() -> str | None:
    """The storage that a worker was told of."""
    return os.environ.get(ADDRESS)


class _Flock:
    """The journal's lock, which the system frees when its process dies: Optuna's own is waited for half a minute."""

    def __init__(self, path: Path):
        self.file: io.TextIOBase
        self.path, self.file = path.with_name(f".{path.name}.lock"), io.StringIO()

    def acquire(self) -> bool:
        self.file = open(self.path, "a")
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self.file.close()


def _waiting(states: Any) -> Any:
    from optuna.trial import FrozenTrial

    return FrozenTrial(
        number=-1, trial_id=-1, state=states.WAITING, value=None, values=None, datetime_start=None,
        datetime_complete=None, params={}, distributions={}, user_attrs={}, system_attrs={}, intermediate_values={},
    )  # fmt: skip


def _me() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": _host(), "pid": pid, "born": _born(pid), "beat": time.time()}


def _host() -> str:
    """This machine since it was started: process numbers mean nothing elsewhere or after a restart."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}".strip()


def _born(pid: int) -> str | None:
    """When a process began, in ticks since the machine's start; None where there is no such process, or no telling."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]  # of one that has ended, and whose end nobody has asked about


def _alive(owner: dict | None) -> bool:
    """Whether the process that has a trial is at work: known on this machine, told by its signs of life elsewhere."""
    if not owner:
        return False
    if owner["host"] == _host() and owner["born"] is not None:
        return _born(owner["pid"]) == owner["born"]
    return time.time() - owner["beat"] < DEAD


def opened(folder: Path, url: str | None, name: str) -> Any:
    """Optuna's own view of a search that is there."""
    library = optuna()
    if url is None and not (folder / JOURNAL).exists():
        raise CheckpointError(f"{folder} holds no search: it has no {JOURNAL}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", library.exceptions.ExperimentalWarning)
        return library.load_study(study_name=name, storage=_open(library, folder, url))
