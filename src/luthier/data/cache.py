"""Documents kept on the disk between runs: keyed by all that decides them, written whole or not at all, checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..errors import DataError
from ..files import flush_folder, write_atomically
from . import (
    Data,
    Source,
    conversations,
    formats,
    kinds,
    labelled,
    masks,
    preferences,
    prompts,
    readers,
    shards,
    sources,
    tokenise,
    unpaired,
    whole_pairs,
)
from .shards import Shard
from .tokenise import Fault

SMALL = 4 << 20  # bytes of data that are tokenised anew each time: it takes a few seconds
Say = Callable[[str], None]
DECIDING = (  # our own code that makes tokens of rows
    conversations, formats, kinds, labelled, masks, preferences, prompts, readers, shards, sources, tokenise,
    unpaired, whole_pairs,
)  # fmt: skip
# What decides no token. A setting that is not named here is part of the key, so that a new one cannot be forgotten.
WITHOUT_EFFECT = {
    "train", "validation", "limit", "seed", "on_bad_row", "cache", "cache_dir", "num_proc", "streaming",
    "shuffle_buffer",
}  # fmt: skip


def files_of(source: Source) -> list[Path] | None:
    """The files of a source; None of one on the hub, which has no bytes here to go by."""
    names = [source.path] if isinstance(source.path, str) else source.path
    found = [sources.files_of(name, source.split or "train") for name in names]
    return None if any(f is None for f in found) else [path for f in found for path in f or ()]


def size_of(files: Sequence[Path] | None) -> int | None:
    return None if files is None else sum(path.stat().st_size for path in files)


def wanted(data: Data, files: Sequence[Path] | None) -> bool:
    """Whether to keep the tokens of these files: by itself, where tokenising them takes more than seconds."""
    if files is None:
        return False
    return (size_of(files) or 0) >= SMALL if data.cache == "auto" else data.cache


def root_of(data: Data) -> Path:
    """`data.cache_dir`, else LUTHIER_CACHE, else `luthier` in the user's cache folder (XDG_CACHE_HOME)."""
    named = data.cache_dir or os.environ.get("LUTHIER_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "luthier"


def key_of(data: Data, source: Source, files: Sequence[Path], renderer: Any) -> str:
    """A name that changes with any byte of the data, the tokenizer, the template, the options, and our own code."""
    contents = {}
    for path in files:
        with open(path, "rb") as file:
            contents[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    code = [Path(module.__file__ or "").read_bytes() for module in DECIDING]
    told = {
        "files": contents,  # their names stand in what is said of bad rows
        "source": source.model_dump(exclude={"path", "weight", "limit"}),
        "options": data.model_dump(exclude=WITHOUT_EFFECT),
        "renderer": of_renderer(renderer),
        "tokenizer": of_tokenizer(renderer.tokenizer),
        "code": hashlib.sha256(b"".join(code)).hexdigest(),
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
    }  # fmt: skip
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]


def of_renderer(renderer: Any) -> dict:
    return {k: v for k, v in vars(renderer).items() if isinstance(v, str | int | float | bool | tuple | None)}


def of_tokenizer(tokenizer: Any) -> list:
    """All that decides its tokens and its template."""
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, names]


def identity(data: Data, renderer: Any) -> str:
    """Changes with all that decides the rows of a run while this process lives: files are known by size and time."""
    entries = [*data.sources(), *([data.complete(data.validation)] if isinstance(data.validation, str) else [])]
    stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for entry in entries for p in files_of(entry) or ()]
    told = [data.model_dump(), stats, of_renderer(renderer), of_tokenizer(renderer.tokenizer)]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


Kept = tuple[list[Shard], list[Fault], str]  # shards, bad rows, the format that was found


def read(folder: Path) -> tuple[Kept | None, str | None]:
    """What is kept at `folder`, and why it must not be used if it is there and not as it was written."""
    if not folder.exists():
        return None, None
    if reason := checkpoint.damage(folder):
        return None, reason
    index = json.loads((folder / "index.json").read_text())
    found = [Shard(shards.mapped(folder / file), digest) for file, digest in index["shards"]]
    with open(folder / "faults.jsonl", encoding="utf-8") as file:
        faults = [Fault(**json.loads(line)) for line in file]
    return (found, faults, index["found"]), None


def kept(root: Path, key: str, make: Callable[[Path], Kept], say: Say, warn: Say) -> Kept:
    """What is kept under `key`, made first by `make(folder)` where it is not there or damaged.

    Of several processes that want the same, one makes it and the others wait. Where files cannot be locked, each
    makes its own and the first to finish is kept.
    """
    folder = root / key
    try:
        found, _ = read(folder)
        if found is None:
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / f".{key}.lock", say):
                found, reason = read(folder)  # by now somebody else may have made it
                if reason is not None:
                    warn(f"the tokens kept in {folder} are not used, and made again: {reason}")
                    _removed(folder)
                if found is None:
                    return _made(folder, make)
    except OSError as error:
        raise DataError(
            f"{error.filename or root}: tokens cannot be kept there ({error.strerror or error}): give another "
            "data.cache_dir, or data.cache=false"
        ) from None
    say(f"tokens of an earlier run: {folder}")
    return found


def _made(folder: Path, make: Callable[[Path], Kept]) -> Kept:
    mark = f".{folder.name}.{socket.gethostname()}."
    for left in folder.parent.glob(f"{mark}*"):  # of a process that was killed: under the lock, none is at work
        shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name(f"{mark}{os.getpid()}")
    aside.mkdir()
    try:
        made, faults, found = make(aside)
        write_atomically(aside / "faults.jsonl", "".join(json.dumps(asdict(fault)) + "\n" for fault in faults))
        files = sorted(path.name for path in aside.glob("*.safetensors"))
        index = {"found": found, "shards": [[file, shard.digest] for file, shard in zip(files, made)]}
        write_atomically(aside / "index.json", json.dumps(index))
        manifest = {path.name: _bytes_and_hash(path) for path in sorted(aside.iterdir())}
        write_atomically(aside / checkpoint.MANIFEST, json.dumps(manifest))
        with contextlib.suppress(OSError):  # somebody without the lock was first: the same bytes
            os.rename(aside, folder)
            flush_folder(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    kept, reason = read(folder)
    if kept is None:
        raise DataError(f"the tokens written to {folder} are not there as written ({reason}): use data.cache=false")
    return kept


def _bytes_and_hash(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _removed(folder: Path) -> None:
    """Renamed first: half-removed, it must not look like one."""
    gone = folder.with_name(f".{folder.name}.{socket.gethostname()}.removed")
    with contextlib.suppress(OSError):
        os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """While this process has the lock. The system frees it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: whoever renames first wins
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is making these tokens; waiting for it ({path.parent})")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
