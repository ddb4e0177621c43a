"""luthier data where things fail: damaged and mended files, full disks, pipes, outputs among inputs, kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.cli import main
from luthier.data import sources
from luthier.errors import CheckpointError, ConfigError, DataError, LuthierError
from luthier.prepare import looking, pieces
from luthier.prepare.audit import audit
from luthier.prepare.checks.personal_data import personal
from luthier.prepare.clean import clean
from luthier.prepare.recipe import recipe

CHEAP = {"checks": {"structure": "drop", "exact_duplicates": "drop"}}


def rows(start: int, count: int) -> list[dict]:
    told = "The {}. number is followed by {}, as that is how one counts."
    return [{"text": told.format(n, n + 1)} for n in range(start, start + count)]


def write(path: Path, made) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def told(capsys, *arguments) -> tuple[int, str]:
    code = main(["data", *map(str, arguments), "--quiet"])
    return code, capsys.readouterr().err


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------- mended and go on


def test_a_run_that_did_nothing_leaves_nothing_and_binds_nobody(tmp_path, capsys):
    source, out = tmp_path / "rows.csv", tmp_path / "out.jsonl"
    source.write_text('text,label\n"not closed,1\nb,2\n')
    assert told(capsys, "clean", source, out, "--workers", 1)[0] == 3
    assert visible(tmp_path) == ["rows.csv"]
    code, message = told(capsys, "audit", source, "--out", tmp_path / "a" / "b", "--workers", 1)
    assert code == 3
    assert "rows.csv:3" in message
    assert visible(tmp_path) == ["rows.csv"]
    source.write_text('text,label\n"closed",1\nb,2\n')
    assert told(capsys, "clean", source, out, "--set", "checks.length.min=1", "--workers", 1)[0] == 0
    assert len(list(sources.read(str(out)))) == 2


def test_a_damaged_shard_that_is_mended_goes_on_with_the_others_done(tmp_path, capsys):
    for n in range(3):
        write(tmp_path / "in" / f"{n}.jsonl", rows(10 * n, 10))
    whole = clean(str(tmp_path / "in"), tmp_path / "whole", recipe(CHEAP), workers=1)
    good = (tmp_path / "in" / "1.jsonl").read_bytes()
    (tmp_path / "in" / "1.jsonl").write_bytes(bytes(200))
    said: list[str] = []
    with pytest.raises(DataError, match=r"1\.jsonl: zero bytes"):
        clean(str(tmp_path / "in"), tmp_path / "out", recipe(CHEAP), workers=1)
    (tmp_path / "in" / "1.jsonl").write_bytes(good)
    done = clean(str(tmp_path / "in"), tmp_path / "out", recipe(CHEAP), workers=1, say=said.append)
    assert "going on: 1 of 3 pieces were done before" in said
    assert {**done, "out": ""} == {**whole, "out": ""}
    for n in range(3):
        assert (tmp_path / "out" / f"{n}.jsonl").read_bytes() == (tmp_path / "whole" / f"{n}.jsonl").read_bytes()


def test_inputs_that_differ_are_told_by_name(tmp_path):
    first, second = write(tmp_path / "a.jsonl", rows(0, 5)), write(tmp_path / "b.jsonl", rows(5, 5))
    clean([str(first)], tmp_path / "o.jsonl", recipe(CHEAP), workers=1)
    with pytest.raises(CheckpointError, match=r"b\.jsonl is new among its inputs"):
        clean([str(first), str(second)], tmp_path / "o.jsonl", recipe(CHEAP), workers=1)
    with pytest.raises(CheckpointError, match=r"its inputs had .*a\.jsonl where .*b\.jsonl is now"):
        clean([str(second)], tmp_path / "o.jsonl", recipe(CHEAP), workers=1)
    size = first.stat().st_size
    write(first, rows(0, 6))
    with pytest.raises(CheckpointError, match=rf"a\.jsonl was changed since \({size} bytes then"):
        clean([str(first)], tmp_path / "o.jsonl", recipe(CHEAP), workers=1)


def test_other_sizes_of_a_split_need_no_other_folder(tmp_path, capsys):
    source, out = write(tmp_path / "rows.jsonl", rows(0, 20)), tmp_path / "out"
    code, message = told(capsys, "split", source, out, "--sizes", "train,test=0.001", "--workers", 1)
    assert code == 3
    assert "no rows of 20" in message
    assert told(capsys, "split", source, out, "--sizes", "train,test=0.1", "--workers", 1)[0] == 0


# ---------------------------------------------------------------------------- files that change


class Growing(pieces.Work):
    """Writes to the file that it reads."""

    def row(self, row):
        path = Path(row.place.rpartition(":")[0])
        with open(path, "a") as file:
            file.write("\n")
        yield "", row.values


class Vanishing(pieces.Work):
    def row(self, row):
        Path(row.place.rpartition(":")[0]).unlink(missing_ok=True)
        yield "", row.values


@pytest.mark.parametrize("work", [Growing, Vanishing])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, work):
    source = write(tmp_path / "rows.jsonl", rows(0, 3))
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was read"):
        pieces.run(str(source), tmp_path / "out.jsonl", work, settings={}, workers=1)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("verb", ["clean", "audit"])
def test_a_file_that_changes_between_two_passes_is_an_error(tmp_path, monkeypatch, verb):
    """What the first pass decided by row number would be done to other rows."""
    source = write(tmp_path / "rows.jsonl", [*rows(0, 9), *rows(0, 2)])
    module = sys.modules[f"luthier.prepare.{verb}"]
    decided = looking.decided

    def meddled(*arguments):
        made = decided(*arguments)
        write(source, [*rows(50, 1), *rows(0, 9), *rows(0, 2)])
        return made

    monkeypatch.setattr(module, "decided", meddled)
    made = {"clean": clean, "audit": audit}[verb]
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was read"):
        made(str(source), tmp_path / ("out.jsonl" if verb == "clean" else "out"), recipe(CHEAP), workers=1)
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / "out" / "verdict.json").exists()


# ---------------------------------------------------------------------------- the disk


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from luthier.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("verb", "limit"), [("clean", 30_000), ("clean", 3_000), ("audit", 3_000), ("split", 3_000), ("collect", 30_000)]
)
def test_a_full_disk_is_told_with_its_place_and_gives_the_room_back(tmp_path, verb, limit):
    """A limit on the size of files is met as a full disk is: while rows, and while arrays are written."""
    source = write(tmp_path / "rows.jsonl", rows(0, 1000))
    out = tmp_path / ("out.jsonl" if verb in ("clean", "collect") else "out")
    named = ["--out", str(out)] if verb == "audit" else [str(out)]
    arguments = ["data", verb, str(source), *named, "--workers", "1", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *arguments], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert str(tmp_path) in done.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path != source]
    assert not [path for path in left if ".rows" in path.name]
    assert sum(path.stat().st_size for path in left) < 40_000  # of which the arrays of a first pass that is whole
    assert main(arguments) in (0, 8)


def test_a_full_disk_names_the_remedy(tmp_path):
    remedy = r"/there: No space left on device: make room there.*the same command"
    with pytest.raises(LuthierError, match=remedy), pieces.room(Path("/there")):
        raise OSError(28, "No space left on device")


def test_what_a_killed_run_was_writing_is_swept(tmp_path):
    source, out = write(tmp_path / "rows.jsonl", rows(0, 10)), tmp_path / "out.jsonl"
    journal = pieces.journal_of(out)
    clean(str(source), out, recipe(CHEAP), workers=1)
    (journal / "done.json").unlink()
    (journal / ".piece-000000.rows.1").write_text("half")
    clean(str(source), out, recipe(CHEAP), workers=1)
    assert not list(journal.glob(".piece*"))


# ---------------------------------------------------------------------------- what is no source, what is no output


def test_a_pipe_is_refused_and_does_not_hang(tmp_path, capsys):
    os.mkfifo(tmp_path / "rows.jsonl")
    for arguments in (["audit"], ["clean"], ["split"]):
        more = [] if arguments == ["audit"] else [tmp_path / "out.jsonl"]
        code, message = told(capsys, *arguments, tmp_path / "rows.jsonl", *more, "--workers", 1)
        assert code == 3
        assert "a pipe or device and no file" in message


@pytest.mark.parametrize("out", ["in", "in/out", "in/out.jsonl", "in/deep/er/out.jsonl"])
def test_an_output_in_a_folder_that_is_read_is_refused(tmp_path, out):
    write(tmp_path / "in" / "rows.jsonl", rows(0, 5))
    with pytest.raises(ConfigError, match="would be read as rows of it from then on"):
        clean(str(tmp_path / "in"), tmp_path / out, recipe(CHEAP), workers=1)
    with pytest.raises(ConfigError, match="give an output elsewhere"):
        audit(str(tmp_path / "in"), tmp_path / out, recipe(CHEAP), workers=1)
    assert visible(tmp_path / "in") == ["rows.jsonl"]


def test_a_hidden_output_in_a_folder_is_not_read(tmp_path):
    write(tmp_path / "in" / "rows.jsonl", rows(0, 5))
    for _ in range(2):
        assert audit(str(tmp_path / "in"), tmp_path / "in" / ".audit", recipe(CHEAP), workers=1)["rows"] == 5


def test_a_source_that_is_the_output_is_refused(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", rows(0, 5))
    before = source.read_bytes()
    code, message = told(capsys, "clean", source, source)
    assert code == 2
    assert "exists" in message
    assert source.read_bytes() == before
    assert visible(tmp_path) == ["rows.jsonl"]


# ---------------------------------------------------------------------------- nothing stays, nothing was meant


def test_a_cleaning_that_keeps_nothing_fails(tmp_path, capsys):
    source = tmp_path / "rows.jsonl"
    source.write_bytes('{"text": "café"}\n'.encode("latin-1") * 5)
    code, message = told(capsys, "clean", source, tmp_path / "out.jsonl")
    assert code == 3
    assert "no row is kept" in message
    assert "out.removed.jsonl" in message
    code, _ = told(capsys, "clean", source, tmp_path / "out.jsonl")
    assert code == 3


def test_a_column_that_no_row_has_is_refused(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", [{"review": f"The {n}. film was long.", "stars": n % 2} for n in range(5)])
    for verb in (["audit", source], ["clean", source, tmp_path / "out.jsonl"]):
        code, message = told(capsys, *verb, "--set", "columns={text: review, label: star}", "--workers", 1)
        assert code == 3
        assert "columns.label: no row" in message
        assert "'star'; it has 'review', 'stars'" in message
    assert told(capsys, "audit", source, "--set", "columns={text: review, label: stars}", "--workers", 1)[0] == 0


def test_rows_of_no_known_format_among_others_are_told_of(tmp_path):
    """Training would refuse them, row by row, late."""
    made = [{"txt": "a name mistyped"} if n in (3, 7) else row for n, row in enumerate(rows(0, 10))]
    source = write(tmp_path / "rows.jsonl", made)
    verdict = audit(str(source), tmp_path / "out", recipe(CHEAP), workers=1)["checks"]["structure"]
    assert (verdict["what"], verdict["sound"], verdict["acting"]) == ({"other_format": 2}, True, 0)
    assert [found["row"] for found in verdict["examples"]] == [3, 7]
    assert clean(str(source), tmp_path / "kept.jsonl", recipe(CHEAP), workers=1)["removed"] == 1  # an equal row
    drop = {"checks": {"structure": {"action": "drop", "actions": {"other_format": "drop"}}}}
    done = clean(str(source), tmp_path / "once.jsonl", recipe(drop), workers=1)
    assert done["why_removed"] == {"structure": {"other_format": 2}}
    assert clean(str(tmp_path / "once.jsonl"), tmp_path / "twice.jsonl", recipe(drop), workers=1)["removed"] == 0
    other = write(tmp_path / "other.jsonl", [{"txt": f"all of them are so, {n}"} for n in range(5)])
    assert audit(str(other), tmp_path / "of-other", recipe(CHEAP), workers=1)["checks"]["structure"]["rows"] == 0
    assert clean(str(other), tmp_path / "all.jsonl", recipe(drop), workers=1)["kept"] == 5


@pytest.mark.parametrize(
    ("label", "message"), [("", "'label' is empty, which is no class"), (None, "'label' is null"), (" ", "is empty")]
)
def test_an_empty_class_is_no_class_to_stratify_by(tmp_path, capsys, label, message):
    made = [{"text": f"text {n}", "label": label if n == 3 else "ab"[n % 2]} for n in range(20)]
    code, said = told(capsys, "split", write(tmp_path / "rows.jsonl", made), tmp_path / "out", "--stratify", "label")
    assert code == 3
    assert message in said
    assert "rows.jsonl:4" in said
    assert visible(tmp_path) == ["rows.jsonl"]


def test_words_that_only_begin_like_telephone_name_no_number():
    for before in ("the dialog addon", "from a TelePrompTer", "a callable", "of celluloid"):
        assert personal(f"{before} (5473143)") == []
    for before in ("call me on", "Tel.:", "Telefonnummer", "teléfono:", "my cell phone:", "Mobil:", "telefax"):
        assert [what for what, *_ in personal(f"{before} 5473143")] == ["phone"]


# ---------------------------------------------------------------------------- two at once, kills


SLOW = """
import sys, time
from pathlib import Path
from luthier.prepare import pieces
from luthier.prepare.clean import clean
from luthier.prepare.recipe import recipe
def say(text):
    print(text, flush=True)
    sys.stdin.readline()
clean(sys.argv[1], Path(sys.argv[2]), recipe({"checks": {"structure": "drop"}}), workers=1, say=say)
"""


def test_a_second_run_at_the_same_output_is_refused_and_the_first_ends(tmp_path):
    for n in range(2):
        write(tmp_path / "in" / f"{n}.jsonl", rows(10 * n, 10))
    out = tmp_path / "out.jsonl"
    first = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / "in"), str(out)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert first.stdout is not None
    assert "1 of 2 pieces" in first.stdout.readline()
    with pytest.raises(CheckpointError, match="another process is at work there"):
        clean(str(tmp_path / "in"), out, recipe({"checks": {"structure": "drop"}}), workers=1)
    first.communicate("\n" * 9)
    assert first.returncode == 0
    assert [row.values for row in sources.read(str(out))] == rows(0, 20)


AUDITED = """
import sys
from pathlib import Path
from luthier.prepare.audit import audit
from luthier.prepare.recipe import recipe
audit(sys.argv[1], Path(sys.argv[2]), recipe(), workers=1, say=lambda text: print(text, flush=True))
"""


@pytest.mark.parametrize("words", [1, 3, 6])
def test_an_audit_killed_at_any_moment_ends_with_the_same_findings(tmp_path, words):
    for n in range(6):
        write(tmp_path / "in" / f"{n}.jsonl", [*rows(10 * n, 10), {"text": f"Write to ann{n}@corp.com."}, *rows(0, 2)])
    whole = audit(str(tmp_path / "in"), tmp_path / "whole", recipe(), workers=1)
    process = subprocess.Popen([sys.executable, "-c", AUDITED, str(tmp_path / "in"), str(tmp_path / "out")],
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    for _ in range(words):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = audit(str(tmp_path / "in"), tmp_path / "out", recipe(), workers=1)
    for name in ("findings.jsonl", "recipe.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    paths = ("findings", "page", "recipe")
    assert {k: v for k, v in again.items() if k not in paths} == {k: v for k, v in whole.items() if k not in paths}
