"""A file of prompts answered by the engine, in order, and after a kill from where it stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from ..data.conversations import BadRow, Conversation, check_roles
from ..data.formats import converted, recognise
from ..data.readers import Record, jsonl_range
from ..data.sources import Row as DataRow
from ..errors import ConfigError, DataError
from ..opened import Opened
from .engine import Engine, Limits
from .requests import Refused, Request, Stream

OWN = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
"""What a row may say for itself, by these keys."""
SHOWN = 5  # faults that an error lists
EVERY = 10.0  # seconds between two lines about how far it is
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """How rows are answered that do not say otherwise."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None  # of the first row; each further row has the next number
    stop: tuple[str, ...] = ()
    system: str | None = None


# ---------------------------------------------------------------------------- rows


def rows_of(file: Path) -> Iterator[tuple[int, Record]]:
    """The rows of a JSONL file, numbered from 0."""
    for number, record in enumerate(jsonl_range(file)):
        assert isinstance(record, Record)
        yield number, record


def check(file: Path) -> int:
    """How many rows there are. A DataError lists the first that cannot be understood."""
    faults, bad, count = [], 0, 0
    for number, record in rows_of(file):
        count += 1
        try:
            _understood(number, record)
        except (BadRow, DataError) as error:
            bad += 1
            if len(faults) < SHOWN:
                told = str(error)
                faults.append(told if told.startswith(record.place) else f"{record.place}: {told}")
    if bad:
        more = "" if bad == len(faults) else f"\nand {bad - len(faults)} more"
        raise DataError("\n".join(faults) + more)
    if not count:
        raise DataError(f"{file}: no rows; a line is a JSON object such as {{\"prompt\": \"...\"}}")
    return count


def _understood(number: int, record: Record) -> tuple[Conversation, dict[str, Any]]:
    """What a row asks, and what it says of how."""
    row = DataRow(number, record.values, record.place, record.fault)
    if record.fault is not None:
        raise BadRow("format", record.fault)
    conversation = converted(row, recognise(record.values, record.place, {}, "prompts"), {})
    if not conversation.messages or conversation.messages[-1]["role"] not in ("user", "tool"):
        raise BadRow("role_order", "a prompt ends with a user's or a tool's turn")
    own = {key: record.values[key] for key in OWN if record.values.get(key) is not None}
    stop = own.get("stop", ())
    own["stop"] = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop
    if not (isinstance(own["stop"], tuple) and all(isinstance(text, str) for text in own["stop"])):
        raise BadRow("format", f"stop is {record.values['stop']!r}, not a text or a list of texts")
    for key, kinds in (("max_new_tokens", int), ("top_k", int), ("seed", int), ("temperature", int | float),
                       ("top_p", int | float)):  # fmt: skip
        if key in own and (isinstance(own[key], bool) or not isinstance(own[key], kinds)):
            raise BadRow("format", f"{key} is {own[key]!r}, not a number")
    wrong = Request([0], **{k: v for k, v in own.items() if k != "stop"}, stop_texts=own["stop"]).problems()
    if wrong:
        raise BadRow("format", "; ".join(wrong))
    return conversation, own


def _request(made: Opened, asked: Asked, number: int, record: Record) -> Request:
    """BadRow where it cannot be written as the model reads it."""
    conversation, own = _understood(number, record)
    messages = list(conversation.messages)
    if asked.system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": asked.system})
    conversation = replace(conversation, messages=messages)
    check_roles(replace(conversation, messages=[*messages, {"role": "assistant", "content": "x"}]))
    made.renderer.check_texts(conversation)
    seed = own.get("seed", None if asked.seed is None else asked.seed + number)
    return Request(
        made.renderer.prompt_tokens(conversation, messages), own.get("max_new_tokens", asked.max_new_tokens),
        temperature=own.get("temperature", asked.temperature), top_p=own.get("top_p", asked.top_p),
        top_k=own.get("top_k", asked.top_k), seed=seed, stop=frozenset(made.renderer.stop_tokens()),
        stop_texts=(*asked.stop, *own["stop"]),
    )  # fmt: skip


# ---------------------------------------------------------------------------- what is kept on the way


class Kept:
    """Answers as they come, a line each in any order, in a file beside the one that is to be."""

    def __init__(self, out: Path, key: str):
        self.out, self.path = out, out.with_name(out.name + ".partial")
        self.places: dict[int, int] = {}  # row -> where its line begins
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file: IO[bytes] = open(self.path, "a+b")
        try:
            self._lock()
            self._read(key)
        except BaseException:
            self.file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"--out {self.out}: another process is writing it") from None

    def _read(self, key: str) -> None:
        self.file.seek(0)
        at = 0
        for line in self.file:
            if not line.endswith(b"\n"):  # cut by a kill
                break
            row = json.loads(line)
            if at == 0 and row != {"of": key}:
                raise ConfigError(
                    f"{self.path} is of another model, other rows or other settings: give another --out, or remove it"
                )
            if at:
                self.places[row["row"]] = at
            at += len(line)
        self.file.truncate(at)
        if at == 0:
            self.add({"of": key})

    def add(self, row: Mapping[str, Any]) -> None:
        at = self.file.seek(0, os.SEEK_END)
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()
        if "row" in row:
            self.places[row["row"]] = at

    def row(self, number: int) -> bytes:
        self.file.seek(self.places[number])
        return self.file.readline()

    def finish(self) -> None:
        """All answers in order, and the file on the way gone."""
        aside = self.out.with_name(f".{self.out.name}.{os.getpid()}")
        try:
            with open(aside, "wb") as file:
                for number in range(len(self.places)):
                    file.write(self.row(number))
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.out)
        finally:
            aside.unlink(missing_ok=True)
        self.path.unlink()

    def close(self) -> None:
        self.file.close()


class Told:
    """Answers that are handed on in order, those that came early being held back."""

    def __init__(self, tell: Callable[[dict], None]):
        self.tell, self.places, self.early = tell, {}, {}  # type: ignore[var-annotated]
        self.next = 0

    def add(self, row: dict) -> None:
        self.early[row["row"]] = row
        while self.next in self.early:
            self.tell(self.early.pop(self.next))
            self.next += 1

    def finish(self) -> None:
        assert not self.early

    def close(self) -> None:
        pass


def key_of(file: Path, made: Opened, asked: Asked) -> str:
    """Of all that decides the answers."""
    digest = hashlib.sha256()
    with open(file, "rb") as rows:
        digest.update(hashlib.file_digest(rows, "sha256").digest())
    digest.update(json.dumps(asdict(asked)).encode())
    for name, tensor in sorted(made.model.state_dict().items()):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // 16)][:17].cpu()
        digest.update(f"{name} {list(tensor.shape)} {[f'{float(v):.6g}' for v in some]}".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------- the work


def answer(
    made: Opened, file: Path, asked: Asked, out: Path | None = None, slots: int = 32,
    tell: Callable[[dict], None] = lambda row: None, say: Say = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Answer each row of a JSONL file: into `out`, or by `tell` in order. Returns what came of it, in numbers.

    A row is `row` (its number from 0), its `id` if it had one, `answer`, `finish_reason`, `prompt_tokens` and
    `answer_tokens`; or `error`. With `out`, a call that was cut short is gone on with by the same call.
    """
    total = check(file)
    if out is not None and out.exists():
        raise ConfigError(f"--out {out} exists: give another name, or remove it")
    kept = Told(tell) if out is None else Kept(out, key_of(file, made, asked))
    before, begun, shown = len(kept.places), time.monotonic(), time.monotonic()
    if before:
        say(f"{before} of {total} rows are answered already")
    counts = {"prompt_tokens": 0, "answer_tokens": 0, "errors": 0}
    ended: SimpleQueue[tuple[int, Record, Stream]] = SimpleQueue()
    flying = 0

    def note(row: dict[str, Any]) -> None:
        counts["errors"] += "error" in row
        for name in ("prompt_tokens", "answer_tokens"):
            counts[name] += row.get(name, 0)
        kept.add(row)

    try:
        with Engine(made.network, made.tokenizer, Limits(slots=slots, waiting=4 * slots), say=say) as engine:
            for number, record in rows_of(file):
                if number in kept.places:
                    continue
                while flying >= 2 * slots:
                    note(_row(*ended.get()))
                    flying -= 1
                try:
                    stream = engine.submit(_request(made, asked, number, record))
                except (BadRow, Refused) as error:
                    note({**_name(number, record), "error": str(error)})
                    continue
                stream.when_done(lambda stream, n=number, r=record: ended.put((n, r, stream)))
                flying += 1
                if time.monotonic() - shown > EVERY:
                    shown = time.monotonic()
                    say(f"{number - flying} of {total} rows, {_rate(counts, begun):.1f} tokens/s")
            for _ in range(flying):
                note(_row(*ended.get()))
        kept.finish()
    finally:
        kept.close()
    return {
        "rows": total, "before": before, **counts, "seconds": round(time.monotonic() - begun, 3),
        "tokens_per_second": round(_rate(counts, begun), 1), **({} if out is None else {"out": str(out)}),
    }  # fmt: skip


def _rate(counts: Mapping[str, int], begun: float) -> float:
    return counts["answer_tokens"] / max(time.monotonic() - begun, 1e-9)


def _name(number: int, record: Record) -> dict[str, Any]:
    return {"row": number} | ({"id": record.values["id"]} if "id" in record.values else {})


def _row(number: int, record: Record, stream: Stream) -> dict[str, Any]:
    made = stream.result()
    if made.finish_reason in ("error", "cancelled"):
        return {**_name(number, record), "error": made.error or made.finish_reason}
    return {
        **_name(number, record), "answer": made.text.strip(), "finish_reason": made.finish_reason,
        "prompt_tokens": len(stream.request.tokens), "answer_tokens": len(made.tokens),
    }  # fmt: skip

