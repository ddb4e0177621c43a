"""Records from one file, lazily: JSONL, JSON, CSV, Parquet, Arrow and plain text, each plain or compressed.

A record that cannot be read is a record with a `fault`, so that it is counted as a bad row; a file whose records can no
longer be told apart is an error. Every reader can pass over records without making objects of them.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..errors import DataError

COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": lambda path: gzip.open(path, "rb"),
    ".bz2": lambda path: bz2.open(path, "rb"),
    ".xz": lambda path: lzma.open(path, "rb"),
    ".zst": lambda path: _zstd(path),
}
TEXTS = (
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql",
)  # fmt: skip
LONGEST_LINE = 128 << 20  # bytes of a line, a paragraph or a field; what is longer is passed over or refused, unread
LONGEST_FILE = 2 << 30  # bytes of what is one value as a whole: a list of rows in JSON, a text that is one document
SLICE = 1024  # rows of a columnar file that are Python objects at a time
WIDE = ((b"\xff\xfe\x00\x00", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
BINARY = (  # what files begin with that are often taken for rows
    (b"PAR1", "Parquet"), (b"ARROW1", "Arrow"), (b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstandard"),
    (b"PK\x03\x04", "a zip archive"), (b"%PDF", "PDF"), (b"\x89PNG", "a picture"), (b"\xff\xd8\xff", "a picture"),
    (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"SQLite", "a database"), (b"\x7fELF", "a program"),
)  # fmt: skip
UNDECODED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8


class Record(NamedTuple):
    """A row as it stands in its file, or why it could not be read."""

    values: dict
    place: str  # file and line or row, for messages
    fault: str | None = None


Item = Record | int  # a number: so many rows were passed over


def kind_of(path: Path) -> tuple[str, str]:
    """(suffix of the format, suffix of the compression or "")."""
    suffixes = [s.lower() for s in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


def shown(path: object) -> str:
    """A path for messages: names that are not UTF-8 can be printed, too."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def parse_json(text: str) -> Any:
    """`json.loads`, but a key given twice and too deep a nesting are a ValueError, too."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"the key {Counter(k for k, _ in pairs).most_common(1)[0][0]!r} is given twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # made once: `json.loads` makes one for each text

# ---------------------------------------------------------------------------- bytes and lines


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # type: ignore[arg-type]


def _open(path: Path) -> Any:
    compression = kind_of(path)[1]
    return COMPRESSIONS[compression](path) if compression else open(path, "rb")


def _refuse_binary(path: Path, start: bytes) -> None:
    """What is no text in UTF-8, by how it begins; a text has no zero bytes."""
    for mark, name in WIDE:
        if start.startswith(mark):
            raise DataError(f"{shown(path)}: the file is {name}; save it as UTF-8")
    for mark, name in BINARY:
        if start.startswith(mark):
            raise DataError(f"{shown(path)}: the file is {name} and no {kind_of(path)[0][1:]}; name it for what it is")
    if b"\0" in start[:4096]:
        raise DataError(f"{shown(path)}: zero bytes: the file is binary, or UTF-16 without a mark; save it as UTF-8")


def _too_long(limit: int) -> str:
    return f"longer than {limit >> 20:,} MiB; part it into shorter ones"


def _lines(path: Path, start: int = 0, stop: int | None = None, number: int = 1) -> Iterator[tuple[int, bytes | None]]:
    """(number, line), without the byte order mark; None of a line longer than `LONGEST_LINE`, which is not held.

    With `start` and `stop`, which stand at borders of lines, those in between; the first of them is line `number`.
    """
    with _open(path) as file:
        if start:
            file.seek(start)
        at = start
        for line in iter(partial(file.readline, LONGEST_LINE), b""):
            if at == 0:
                _refuse_binary(path, line[:4096])
            at += len(line)
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                while rest := file.readline(1 << 20):
                    at += len(rest)
                    if rest.endswith(b"\n"):
                        break
                line = None
            elif number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield number, line
            number += 1
            if stop is not None and at >= stop:
                return


def _whole(file: Any) -> bytes | None:
    """All of a file; None where it is longer than `LONGEST_FILE`, of which no more is read."""
    content = file.read(LONGEST_FILE + 1)
    return None if len(content) > LONGEST_FILE else content


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); save the file as UTF-8"


# ---------------------------------------------------------------------------- rows as objects


def _record(value: object, place: str) -> Record:
    if not isinstance(value, dict):
        return Record({}, place, f"expected an object with named fields, found {type(value).__name__}")
    return Record(value, place)


def _jsonl(path: Path, skip: int, sample_by: str) -> Iterator[Item]:
    yield from jsonl_range(path, skip)


def jsonl_range(path: Path, skip: int = 0, start: int = 0, stop: int | None = None, number: int = 1) -> Iterator[Item]:
    """The rows of a JSONL file between two borders of lines, the first of which has this number."""
    for at, line in _lines(path, start, stop, number):
        if line is not None and not line.strip():
            continue
        if skip:
            skip -= 1
            yield 1
            continue
        place = f"{shown(path)}:{at}"
        if line is None:
            yield Record({}, place, f"the line is {_too_long(LONGEST_LINE)}")
            continue
        try:
            yield _record(parse_json(line.decode()), place)
        except UnicodeDecodeError as error:
            yield Record({}, place, _not_utf8(error))
        except ValueError as error:
            yield Record({}, place, f"not JSON ({error}); mend or remove the line")


def _json(path: Path, skip: int, sample_by: str) -> Iterator[Item]:
    """The one reader that holds its whole file: a list has no lines to go by."""
    with _open(path) as file:
        _refuse_binary(path, file.peek(4096)[:4096])
        content = _whole(file)
    if content is None:
        raise DataError(
            f"{shown(path)}: longer than {LONGEST_FILE >> 20:,} MiB, and a list of rows in JSON has to be held whole; "
            "write it as .jsonl, a row to a line"
        )
    try:
        value = parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)}: {_not_utf8(error)}") from None
    except ValueError as error:
        if "Extra data" in str(error):  # JSON lines under the name of JSON
            yield from _jsonl(path, skip, sample_by)
            return
        raise DataError(f"{shown(path)}: not JSON ({error}); mend the file") from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if len(lists) != 1 or "messages" in value or "conversations" in value:
            raise DataError(
                f"{shown(path)}: expected a list of rows, found one object with the keys {sorted(value)}; "
                "put [ ] around it, or name the file .jsonl"
            )
        value = lists[0]
    if not isinstance(value, list):
        raise DataError(f"{shown(path)}: expected a list of rows, found {type(value).__name__}")
    yield min(skip, len(value))
    for number, record in enumerate(value[skip:], start=skip):
        yield _record(record, f"{shown(path)}[{number}]")


def _csv(path: Path, skip: int, sample_by: str) -> Iterator[Item]:
    """Strict about quotes: after a wrong one, nobody knows where the next row begins."""
    with _open(path) as raw:
        _refuse_binary(path, raw.peek(4096)[:4096])
        csv.field_size_limit(LONGEST_LINE)
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        delimiter = "\t" if kind_of(path)[0] == ".tsv" else ","
        reader = csv.reader(_short_lines(path, text), delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            _check_header(path, header)
            for fields in reader:
                if not fields:
                    continue
                if skip:
                    skip -= 1
                    yield 1
                    continue
                place = f"{shown(path)}:{reader.line_num}"
                if len(fields) != len(header):
                    yield Record({}, place, f"{len(fields)} fields, but the header has {len(header)}: {header}")
                elif any(UNDECODED.search(field) for field in fields):
                    yield Record({}, place, "not UTF-8; save the file as UTF-8")
                else:
                    yield Record(dict(zip(header, fields)), place)
        except csv.Error as error:
            raise DataError(
                f"{shown(path)}:{reader.line_num}: {error}; a field with quotes, commas or line breaks stands between "
                'quotes, and a quote in it is written twice ("")'
            ) from None


def _short_lines(path: Path, text: IO[str]) -> Iterator[str]:
    """Lines for the CSV reader, which takes them of any length; after too long a one, nobody knows where a row is."""
    for number, line in enumerate(iter(partial(text.readline, LONGEST_LINE), ""), start=1):
        if len(line) == LONGEST_LINE and not line.endswith("\n"):
            raise DataError(f"{shown(path)}:{number}: the line is {_too_long(LONGEST_LINE)}")
        yield line


def _check_header(path: Path, header: list[str]) -> None:
    if any(UNDECODED.search(name) for name in header):
        raise DataError(f"{shown(path)}:1: the header is not UTF-8; save the file as UTF-8")
    _refuse_twice(path, header)


def _refuse_twice(path: Path, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{shown(path)}: the column {twice[0]!r} is there twice; rename or remove one")


# ---------------------------------------------------------------------------- columns


def _parquet(path: Path, skip: int, sample_by: str) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    with _open(path) as file:
        source = file if not kind_of(path)[1] else pyarrow.BufferReader(file.read())
        parquet = pyarrow.parquet.ParquetFile(source)
        first, passed = 0, 0
        while first < parquet.num_row_groups:
            count = parquet.metadata.row_group(first).num_rows
            if passed + count > skip:
                break
            first, passed = first + 1, passed + count
        yield passed
        groups = range(first, parquet.num_row_groups)
        batches = parquet.iter_batches(SLICE, row_groups=groups) if groups else ()
        yield from _rows(path, parquet.schema_arrow, batches, passed, skip)


def _arrow(path: Path, skip: int, sample_by: str) -> Iterator[Item]:
    """Both forms of Arrow's own format: streams, which `datasets` writes, and files, which Feather is."""
    import pyarrow

    with pyarrow.memory_map(str(path)) if not kind_of(path)[1] else _open(path) as file:
        magic = file.read(6) if not kind_of(path)[1] else file.peek(6)[:6]
        if magic.startswith(b"FEA1"):
            raise DataError(f"{shown(path)}: the first version of Feather; write it again with a current pyarrow")
        if magic == b"ARROW1":
            source = file if not kind_of(path)[1] else pyarrow.BufferReader(file.read())
            opened = pyarrow.ipc.open_file(source)
            batches: Iterable = (opened.get_batch(i) for i in range(opened.num_record_batches))
        else:
            if not kind_of(path)[1]:
                file.seek(0)
            batches = opened = pyarrow.ipc.open_stream(file)
        yield from _rows(path, opened.schema, batches, 0, skip)


def _rows(path: Path, schema: Any, batches: Iterable, number: int, skip: int) -> Iterator[Item]:
    """The rows of record batches from row `skip` on, the first batch beginning with row `number`."""
    import pyarrow

    _refuse_twice(path, schema.names)
    nested = any(pyarrow.types.is_nested(kind) for kind in schema.types)
    for batch in batches:
        passed = min(max(0, skip - number), batch.num_rows)
        yield passed
        number += passed
        for start in range(passed, batch.num_rows, SLICE):
            part = batch.slice(start, SLICE)
            values: Iterable | Exception = _objects(part)
            if isinstance(values, Exception):  # one value among them: a text that is not UTF-8, a date past 9999
                values = (one if isinstance(one := _objects(part.slice(i, 1)), Exception) else one[0]
                          for i in range(part.num_rows))  # fmt: skip
            for value in values:
                place = f"{shown(path)}[{number}]"
                number += 1
                if isinstance(value, Exception):
                    yield Record({}, place, f"a value cannot be read: {value}")
                else:
                    yield Record(without_nulls(value) if nested else value, place)


def _objects(part: Any) -> list[dict] | Exception:
    """The rows of a part as Python objects, once its offsets were found to lie inside it."""
    try:
        part.validate(full=True)
        return part.to_pylist()
    except Exception as error:
        return error


def without_nulls(row: dict) -> dict:
    """The row without the empty fields of its inner objects.

    Columns give each object in a list the fields of all: a message without `tool_calls` comes back with
    `tool_calls: null`, and so do the arguments of a call, which would be learnt.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if v is not None}
        return [clean(v) for v in value] if isinstance(value, list) and value and _inner(value[0]) else value

    return {key: clean(value) for key, value in row.items()}


def _inner(value: object) -> bool:
    return value is None or isinstance(value, dict | list)


# ---------------------------------------------------------------------------- text


def _text(path: Path, skip: int, sample_by: str) -> Iterator[Item]:
    """A file as one document, or its paragraphs (parted by blank lines) or lines that are not blank."""
    if sample_by == "document":
        if skip:
            yield 1
            return
        with _open(path) as file:
            content = _whole(file)
        if content is None:
            yield Record({}, shown(path), f"the text is {_too_long(LONGEST_FILE)}")
        else:
            yield _decoded(content.removeprefix(b"\xef\xbb\xbf"), shown(path))
        return
    for number, text in _paragraphs(path) if sample_by == "paragraph" else _lines(path):
        if text is not None and not text.strip():
            continue
        if skip:
            skip -= 1
            yield 1
        elif text is None:
            yield Record({}, f"{shown(path)}:{number}", f"the {sample_by} is {_too_long(LONGEST_LINE)}")
        else:
            yield _decoded(text.removesuffix(b"\n").removesuffix(b"\r"), f"{shown(path)}:{number}")


def _paragraphs(path: Path) -> Iterator[tuple[int, bytes | None]]:
    lines: list[bytes] | None = []  # None once it is too long
    first, size = 1, 0
    for number, line in _lines(path):
        if line is None or line.strip():
            size += LONGEST_LINE if line is None else len(line)
            lines = None if lines is None or line is None or size > LONGEST_LINE else _added(lines, line)
            continue
        yield first, None if lines is None else b"".join(lines)
        lines, first, size = [], number + 1, 0
    yield first, None if lines is None else b"".join(lines)


def _added(lines: list[bytes], line: bytes) -> list[bytes]:
    lines.append(line)
    return lines


def _decoded(content: bytes, place: str) -> Record:
    try:
        return Record({"text": content.decode()}, place)
    except UnicodeDecodeError as error:
        return Record({}, place, _not_utf8(error))


ROWS = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
    ".arrow": _arrow, ".feather": _arrow,
}  # fmt: skip
READERS: dict[str, Callable[[Path, int, str], Iterator[Item]]] = {**ROWS, **dict.fromkeys(TEXTS, _text)}
