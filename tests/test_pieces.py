"""The engine of luthier data: pieces, processes, journals, and outputs that appear whole."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from luthier.data import readers, sources
from luthier.errors import CheckpointError, ConfigError, DataError
from luthier.prepare import outputs, pieces

ROWS = 5000


class Odd(pieces.Work):
    """Odd rows go to the side, with their numbers."""

    def __init__(self, key: str = "n"):
        self.key, self.seen = key, 0

    def row(self, row):
        self.seen += 1
        if row.values[self.key] % 2:
            yield "odd", {"row": row.number, "place": row.place, **row.values}
        else:
            yield "", row.values

    def end(self):
        return {"seen": self.seen}


def write(path: Path, rows, **options) -> Path:
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def numbers(path: Path) -> list[int]:
    return [row.values["n"] for row in sources.read(str(path))]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 20_000)
    monkeypatch.setattr(pieces, "BLOCK", 3_000)


@pytest.fixture
def large(tmp_path, small_pieces):
    return write(tmp_path / "in" / "rows.jsonl", ({"n": n, "text": "x" * (n % 37)} for n in range(ROWS)))


def test_ranges_of_a_large_file_are_its_rows_with_their_places(large):
    cut = pieces.pieces_of(str(large))
    assert len(cut) > 5
    assert [cut[0].start, *(p.stop for p in cut[:-1])] == [p.start for p in cut]
    assert all(p.stop - p.start >= 20_000 for p in cut[:-1])
    assert cut[-1].stop == large.stat().st_size
    whole = [(row.values, row.place) for row in sources.read(str(large))]
    assert [(row.values, row.place) for piece in cut for row in pieces.rows_of(piece)] == whole


@pytest.mark.parametrize(
    ("name", "workers"), [("out.jsonl", 1), ("out.jsonl.gz", 1), ("out.jsonl.zst", 1), ("out", 1), ("out.jsonl.zst", 2)]
)
def test_outputs_are_whole_in_order_and_the_same_for_any_number_of_workers(large, tmp_path, name, workers):
    out = tmp_path / name
    side = outputs.beside(out, "odd")
    done = pieces.run(str(large), out, Odd, settings={}, workers=workers, sides={"odd": side})
    assert numbers(out) == list(range(0, ROWS, 2))
    found = [(row.values["row"], row.values["place"], row.values["n"]) for row in sources.read(str(side))]
    assert found == [(n, f"{large}:{n + 1}", n) for n in range(1, ROWS, 2)]
    assert [d.first for d in done][:2] == [0, done[0].rows]
    assert sum(d.end["seen"] for d in done) == ROWS
    if name == "out":
        assert sorted(p.name for p in out.glob("*.jsonl")) == [f"rows-{i:05}.jsonl" for i in range(len(done))]
    left = [p for p in (tmp_path / f".{name}.luthier", out / ".luthier") if p.exists()]
    assert [p for folder in left for p in folder.glob("*.rows")] == []


def test_a_folder_of_shards_keeps_its_names(tmp_path):
    for shard, name in enumerate(("a.jsonl", "b.jsonl.gz", "sub/c.jsonl")):
        write(tmp_path / "in" / name, [{"n": 10 * shard + i} for i in range(4)])
    pieces.run(str(tmp_path / "in"), tmp_path / "out", Odd, settings={}, workers=1, sides={"odd": tmp_path / "o.jsonl"})
    assert sorted(p.name for p in (tmp_path / "out").glob("*.jsonl")) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert numbers(tmp_path / "out" / "b.jsonl") == [10, 12]
    assert numbers(tmp_path / "o.jsonl") == [1, 3, 11, 13, 21, 23]
    assert [row.values["row"] for row in sources.read(str(tmp_path / "o.jsonl"))] == [1, 3, 5, 7, 9, 11]


def test_the_same_run_is_known_and_another_is_told_by_what_differs(large, tmp_path):
    out, said = tmp_path / "out.jsonl", []
    run = partial(pieces.run, str(large), out, Odd, workers=1, sides={"odd": tmp_path / "odd.jsonl"}, say=said.append)
    first = run(settings={"a": {"b": 1}})
    before = out.read_bytes()
    assert run(settings={"a": {"b": 1}}) == first
    assert "done before" in said[-1]
    with pytest.raises(CheckpointError, match=r"settings\.a\.b was 1 and is now 2"):
        run(settings={"a": {"b": 2}})
    os.utime(large, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"rows\.jsonl was changed since"):
        run(settings={"a": {"b": 1}})
    assert out.read_bytes() == before
    other = write(tmp_path / "there.jsonl", [{"n": 1}])
    with pytest.raises(ConfigError, match="exists"):
        pieces.run(str(large), other, Odd, settings={}, workers=1)
    with pytest.raises(ConfigError, match=r"written are \.jsonl"):
        pieces.run(str(large), tmp_path / "rows.jsonl.bz2", Odd, settings={}, workers=1)


class Failing(Odd):
    def row(self, row):
        if row.values["n"] == 4000 and os.environ.get("FAIL"):
            raise DataError(f"{row.place}: this one")
        return super().row(row)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_leaves_nothing_half_written_and_the_next_run_goes_on(large, tmp_path, monkeypatch, workers):
    out, said = tmp_path / "out.jsonl", []
    run = partial(pieces.run, str(large), out, Failing, settings={}, workers=workers,
                  sides={"odd": tmp_path / "odd.jsonl"}, say=said.append)  # fmt: skip
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(DataError, match=r"rows\.jsonl:4001: this one"):
        run()
    assert not out.exists()
    assert not (tmp_path / "odd.jsonl").exists()
    monkeypatch.delenv("FAIL")
    run()
    assert any(text.startswith("going on") for text in said)
    assert numbers(out) == list(range(0, ROWS, 2))


SLOW = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_pieces
from luthier.prepare import pieces
pieces.PIECE, pieces.BLOCK = 20_000, 3_000
test_pieces.run_and_tell(sys.argv[2], Path(sys.argv[3]))
"""


def run_and_tell(source: str, out: Path) -> None:
    pieces.run(source, out, Odd, settings={}, workers=1, sides={"odd": out.with_name("odd.jsonl")},
               say=lambda text: print(text, flush=True))  # fmt: skip


def test_killed_it_goes_on_with_the_same_bytes(large, tmp_path):
    whole = tmp_path / "whole" / "out.jsonl"
    whole.parent.mkdir()
    run_and_tell(str(large), whole)
    out = tmp_path / "killed" / "out.jsonl"
    out.parent.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(Path(__file__).parent), str(large), str(out)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("1 of")
    process.kill()
    process.wait()
    process.stdout.close()
    assert not out.exists()
    said = []
    pieces.run(str(large), out, Odd, settings={}, workers=1, sides={"odd": out.with_name("odd.jsonl")}, say=said.append)
    assert said[0].startswith("going on")
    for name in ("out.jsonl", "odd.jsonl"):
        assert (out.parent / name).read_bytes() == (whole.parent / name).read_bytes()


def test_a_line_without_end_is_passed_over_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    path = tmp_path / "rows.jsonl"
    lines = [b'{"text": "a"}', b'{"text": "' + b"x" * 5000 + b'"}', b'{"text": "b"}']
    path.write_bytes(b"\n".join(lines))
    found = list(sources.read(str(path)))
    assert [row.values for row in found] == [{"text": "a"}, {}, {"text": "b"}]
    assert found[1].place.endswith(":2")
    assert "longer than" in found[1].fault
