"""What a run has done so far, under the key of all that decides its result; another key is told by what differs."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..files import flush_folder, write_atomically

VERSION = 1  # of what a run leaves in its journal


def key_of(settings: Mapping, inputs: Sequence[list], out: Path | None, sides: Mapping[str, Path]) -> dict:
    told = {
        "version": VERSION, "settings": dict(settings), "inputs": {str(i): one for i, one in enumerate(inputs)},
        "outputs": {"": None if out is None else out.name} | {name: path.name for name, path in sides.items()},
    }  # fmt: skip
    return json.loads(json.dumps(told))  # as it will be read again


def key_read(folder: Path) -> dict:
    """The key of a journal that is there."""
    return json.loads((folder / "key.json").read_text())


def refuse_existing(folder: Path, outputs: Sequence[Path]) -> None:
    """Outputs that are there and were not begun under this journal."""
    if (folder / "key.json").exists():
        return
    for path in outputs:
        empty = path.is_dir() and all(inner.name.startswith(".luthier") for inner in path.iterdir())
        if path.exists() and not empty:
            raise ConfigError(f"{path} exists: give another name, or remove it; nothing was written")


def finished(folder: Path) -> bool:
    return (folder / "done.json").is_file()


class Journal:
    """A folder with the key, an entry for each piece that is done, what those pieces wrote, and a mark at the end."""

    def __init__(self, folder: Path, key: dict):
        self.folder, self.key = folder, key

    @contextlib.contextmanager
    def open(self, outputs: Sequence[Path], say: Any) -> Iterator[bool]:
        """Whether everything was done before. Refuses outputs of another run, and a second process at the same.

        What has done nothing yet binds nobody: its journal is made anew, and goes where the run fails.
        """
        refuse_existing(self.folder, outputs)
        new = [folder for folder in self.folder.parents if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / "lock"):
            try:
                self._take(outputs)
                done = finished(self.folder)
                if done and (gone := [path for path in outputs if path.name in self._promised() and not path.exists()]):
                    raise CheckpointError(
                        f"{gone[0]} was made before and is gone; remove {self.folder} to make it again"
                    )
                yield done
            except BaseException:
                self._sweep()
                if not self._begun():
                    self.remove()
                    for folder in new:
                        with contextlib.suppress(OSError):  # what is not empty stays
                            folder.rmdir()
                raise

    def _take(self, outputs: Sequence[Path]) -> None:
        """The journal under this key, or an error that says what differs."""
        known = self._read()
        if known is not None and not self._begun():
            (self.folder / "key.json").unlink()
            refuse_existing(self.folder, outputs)
            known = None
        if known is not None and known != self.key and not self._mended(known):
            raise CheckpointError(
                f"{self.folder.parent if self.folder.name == '.luthier' else self.folder} was begun otherwise: "
                f"{inputs_differ(known, self.key) or difference(known, self.key)}. Give another output, or remove it "
                f"with its journal {self.folder}"
            )
        self._sweep()
        if known != self.key:
            write_atomically(self.folder / "key.json", json.dumps(self.key))

    def _begun(self) -> bool:
        """Whether any piece is done that has rows."""
        return finished(self.folder) or any(
            json.loads(path.read_text()).get("rows") for path in self.folder.glob("piece-*.json")
        )

    def _mended(self, known: dict) -> bool:
        """Whether only inputs differ of which nothing was done: a damaged file that was written again."""
        before, now = known.get("inputs", {}), self.key["inputs"]
        return (
            not finished(self.folder) and before.keys() == now.keys()
            and {**known, "inputs": now} == self.key
            and not any((self.folder / f"piece-{int(n):06}.json").is_file() for n in now if before[n] != now[n])
        )  # fmt: skip

    def _sweep(self) -> None:
        """What pieces were writing when they ended; on a full disk it takes the room that is wanted."""
        for path in self.folder.glob(".*"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _read(self) -> dict | None:
        try:
            return key_read(self.folder)
        except FileNotFoundError:
            return None
        except ValueError:
            raise CheckpointError(
                f"{self.folder / 'key.json'} is damaged; remove {self.folder} to start anew"
            ) from None

    def _promised(self) -> list[str]:
        return json.loads((self.folder / "done.json").read_text())["outputs"]

    @staticmethod
    def enter(folder: Path, number: int, entry: dict) -> None:
        write_atomically(folder / f"piece-{number:06}.json", json.dumps(entry))

    def entries(self, count: int) -> list[dict | None]:
        made: list[dict | None] = []
        for number in range(count):
            path = self.folder / f"piece-{number:06}.json"
            made.append(json.loads(path.read_text()) if path.is_file() else None)
        return made

    def finish(self, outputs: Sequence[str] = ()) -> None:
        """Mark it as done; what the pieces wrote has gone to its place."""
        write_atomically(self.folder / "done.json", json.dumps({"outputs": list(outputs)}))
        flush_folder(self.folder)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def inputs_differ(before: Mapping, now: Mapping) -> str | None:
    """The first file that differs between two keys, in words; None where files are the same."""
    was, is_now = (list(key.get("inputs", {}).values()) for key in (before, now))
    if before.get("version") != now.get("version") or was == is_now:
        return None
    for old, new in zip(was, is_now):
        if old[0] != new[0]:
            return f"its inputs had {old[0]} where {new[0]} is now"
        if old != new:
            return f"{new[0]} was changed since" + (
                f" ({old[1]:,} bytes then, {new[1]:,} now)" if isinstance(old[1], int) and old[1] != new[1] else ""
            )
    more, which = (is_now, "new") if len(is_now) > len(was) else (was, "gone")
    return f"{more[min(len(was), len(is_now))][0]} is {which} among its inputs"


def difference(before: Any, now: Any, path: str = "") -> str | None:
    """The first place at which two values of JSON differ, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(k for k in now if k not in before)]:
            if found := difference(before.get(key), now.get(key), f"{path}.{key}" if path else str(key)):
                return found
        return None
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return next((d for i, (a, b) in enumerate(zip(before, now)) if (d := difference(a, b, f"{path}[{i}]"))), None)
    return None if before == now else f"{path} was {_short(before)} and is now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:80] + "..."


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """While this process works there. The system frees it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process is at work there ({path.parent}); wait for it") from None
        except OSError:  # a file system without locks
            pass
        yield
