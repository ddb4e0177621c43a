"""The cache of tokens and the helpers that make it: the same bytes by any way, nothing stale, nothing torn."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from conftest import ROWS, TEMPLATE, make_tokenizer, write_rows

from luthier.data import Data, Source, cache, dataset, shards, sources, tokenise, workers
from luthier.data.conversations import Conversation
from luthier.data.masks import Renderer
from luthier.document import Document
from luthier.errors import DataError, LuthierError

BAD = [{"prompt": "x", "completion": ""}, {"prompt": "y", "completion": "<|im_end|>"}]
MIXED = [*ROWS[:10], BAD[0], *ROWS[10:], BAD[1], {"prompt": "é", "completion": "ü☃"}]


@pytest.fixture
def data(tmp_path):
    write_rows(tmp_path / "rows.jsonl", MIXED)
    return Data(train=str(tmp_path / "rows.jsonl"), cache=True, cache_dir=str(tmp_path / "cache"), max_length=64)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(tokenise, "STRETCH_ROWS", 7)


def renderer_of(data, template=TEMPLATE, cls=Renderer):
    return cls(make_tokenizer(template), data.train_on, data.max_length)


def load(data, renderer=None, told=None):
    told = [] if told is None else told
    return dataset.load(data, data.sources()[0], renderer or renderer_of(data), told.append, told.append)


def content(found):
    documents = [(d.tokens.tolist(), d.weights.tolist(), d.row) for d in found.documents]
    return documents, list(found.conversations), found.faults, found.found, found.fingerprint(), list(found.lengths)


class Refusing(Renderer):
    def documents(self, rows):
        raise AssertionError("tokenised although it was kept")


def test_a_second_run_reads_what_the_first_one_wrote(data, small_shards):
    plain = load(data.model_copy(update={"cache": False}))
    told = []
    first = load(data)
    again = load(data, renderer_of(data, cls=Refusing), told)
    assert content(plain) == content(first) == content(again)
    assert [f.kind for f in again.faults] == ["empty_answer", "special_token"]
    assert again.rows == len(MIXED)
    assert told[0].startswith("tokens of an earlier run")
    assert not again.documents.shards[0].arrays["tokens"].flags.owndata
    assert not again.documents.shards[0].arrays["tokens"].flags.writeable
    assert len(again.documents.shards) == 5


def test_any_change_of_what_decides_tokens_makes_them_anew(data, tmp_path):
    def key(data, renderer=None):
        source = data.sources()[0]
        return cache.key_of(data, source, cache.files_of(source), renderer or renderer_of(data))

    def with_(**changes):
        return data.model_copy(update=changes)

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    keys = [
        key(data),
        key(with_(max_length=65)),
        key(with_(train_on="last")),
        key(with_(format="prompt_completion")),
        key(with_(columns={"prompt": "prompt"})),
        key(data, renderer_of(data, TEMPLATE.replace("assistant", "model"))),
        key(data, Renderer(tokenizer, "all", 64)),
    ]
    path = Path(data.train)
    before, times = path.read_bytes(), path.stat()
    path.write_bytes(before.replace(b"one 0", b"one 9"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size and time
    keys.append(key(data))
    path.write_bytes(before)

    class Newer(Data):
        option: int = 0  # of a later version, which nobody thought of here

    keys.append(key(Newer(**data.model_dump())))
    same = {key(with_(seed=5, limit=3, num_proc=2, cache=False, on_bad_row="skip", validation=0.5)), key(data)}
    assert same == {keys[0]}
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("harm", ["torn", "changed", "missing", "faults", "manifest"])
def test_damage_is_noticed_and_made_again(data, harm, small_shards):
    first = content(load(data))
    (folder,) = [p for p in Path(data.cache_dir).iterdir() if p.is_dir()]
    shard = folder / "00000001.safetensors"
    if harm == "torn":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif harm == "changed":
        written = bytearray(shard.read_bytes())
        written[-1] ^= 1
        shard.write_bytes(written)
    elif harm == "missing":
        shard.unlink()
    elif harm == "faults":
        (folder / "faults.jsonl").write_text("")
    else:
        (folder / "manifest.json").unlink()
    told = []
    assert content(load(data, told=told)) == first
    assert "are not used, and made again" in told[0]
    assert cache.read(folder)[1] is None
    assert not [p for p in folder.parent.glob(".*") if p.is_dir()]


def test_where_it_is_kept(data, monkeypatch, tmp_path):
    for name in ("LUTHIER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    free = data.model_copy(update={"cache_dir": None})
    assert cache.root_of(free) == Path("~/.cache/luthier").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.root_of(free) == tmp_path / "x" / "luthier"
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "y"))
    assert cache.root_of(free) == tmp_path / "y"
    assert cache.root_of(data) == tmp_path / "cache"
    automatic = data.model_copy(update={"cache": "auto"})
    files = cache.files_of(automatic.sources()[0])
    assert not cache.wanted(automatic, files)  # a few kilobytes
    monkeypatch.setattr(cache, "SMALL", 100)
    assert cache.wanted(automatic, files)


def test_a_place_that_cannot_be_written_is_named_or_done_without(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    blocked = data.model_copy(update={"cache_dir": str(tmp_path / "file" / "below")})
    with pytest.raises(DataError, match=r"cannot be kept there .*data\.cache=false"):
        load(blocked)
    monkeypatch.setattr(cache, "SMALL", 100)
    told = []
    found = load(blocked.model_copy(update={"cache": "auto"}), told=told)
    assert len(found)
    assert "cannot be written; give data.cache_dir" in told[0]


# ---------------------------------------------------------------------------- shards


def test_weights_of_any_value_come_back_exactly():
    rng = np.random.default_rng(0)
    documents = []
    for row in range(50):
        length = int(rng.integers(1, 30))
        weights = rng.choice(np.float32([0, 1, 0.3, -2.5]), length)
        weights[0] = 0
        documents.append(Document(rng.integers(0, 1 << 30, length, dtype=np.int32), weights, row * 3))
    made = shards.Documents.of(documents)
    assert list(made.lengths()) == [d.inputs for d in documents]
    assert made.tokens() == sum(len(d.tokens) for d in documents)
    assert made.trained_tokens() == sum(np.count_nonzero(d.weights) for d in documents)
    for one, other in zip(made, documents, strict=True):
        assert (one.tokens.dtype, one.weights.dtype) == (np.int32, np.float32)
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.weights.tolist() == other.weights.tolist()
        assert one.row == other.row
    chosen = made.select([4, 2, 40]).select([2, 0])
    assert [d.row for d in chosen] == [120, 12]
    assert [d.row for d in chosen[-1:]] == [12]
    assert chosen.tokens() == len(documents[40].tokens) + len(documents[4].tokens)
    changed = [documents[0]._replace(weights=documents[0].weights * 0.5), *documents[1:]]
    prints = [made, made.select(range(49)), made.select(range(50)), shards.Documents.of(changed)]
    assert len({d.fingerprint() for d in prints}) == 4


def test_a_row_can_be_several_documents(data):
    class Halving(Renderer):
        def documents(self, rows):
            return [
                [Document(d[0].tokens[:-1], d[0].weights[:-1], d[0].row), *d] if isinstance(d, list) else d
                for d in super().documents(rows)
            ]

    found = load(data.model_copy(update={"cache": False}), renderer_of(data, cls=Halving))
    assert len(found) == 2 * (found.rows - len(found.faults))
    assert [d.row for d in found.documents[:4]] == [0, 0, 1, 1]
    assert found.conversations[2] == found.conversations[3] == Conversation(
        [{"role": "user", "content": "three 0"}, {"role": "assistant", "content": "0 eerht"}]
    )  # fmt: skip
    assert [astuple(f)[2] for f in found.faults] == ["empty_answer", "special_token"]


# ---------------------------------------------------------------------------- several sources


def test_sources_have_their_own_formats_limits_and_row_numbers(tmp_path):
    write_rows(tmp_path / "a.jsonl", [*ROWS[:5], BAD[0], *ROWS[5:9]])
    write_rows(tmp_path / "b.jsonl", [{"q": "2+2", "a": "4"}] * 6)
    train = [str(tmp_path / "a.jsonl"), Source(path=str(tmp_path / "b.jsonl"), limit=2,
             columns={"prompt": "q", "completion": "a"})]  # fmt: skip
    data = Data(train=train, max_length=64, on_bad_row="skip", validation=3)
    said = []
    training, validation = dataset.open_rows(data, renderer_of(data), tmp_path, said.append, said.append)
    rows = sorted(d.row for part in (training, validation) for d in part.documents)
    assert set(rows) <= set(range(16)) - {5}  # numbered over both sources; 5 is bad
    assert training.parts[1] == (str(tmp_path / "b.jsonl"), 2)
    assert len(training) == training.parts[0][1] + 2
    assert len(validation) == 3
    assert json.loads((tmp_path / "skipped_rows.jsonl").read_text())["row"] == 5
    assert said[0] == f"{tmp_path / 'a.jsonl'}: 10 rows, prompt_completion (told by the keys prompt, completion)"


# ---------------------------------------------------------------------------- helpers


def test_helpers_write_the_same_bytes_as_one_process(data, tmp_path, small_shards):
    folders = []
    for count in (1, 2):
        one = data.model_copy(update={"num_proc": count, "cache_dir": str(tmp_path / f"cache{count}")})
        load(one)
        (folder,) = [p for p in Path(one.cache_dir).iterdir() if p.is_dir()]
        folders.append({p.name: p.read_bytes() for p in folder.iterdir()})
    assert folders[0] == folders[1]
    assert "00000004.safetensors" in folders[0]
    in_memory = load(data.model_copy(update={"num_proc": 2, "cache": False}))
    assert content(in_memory) == content(load(data))


class Telling(Renderer):
    def documents(self, rows):
        raise DataError("told by a helper")


class Dying(Renderer):
    def documents(self, rows):
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_helper_raises_or_suffers_is_told(data, small_shards):
    data = data.model_copy(update={"num_proc": 2, "cache": False})
    with pytest.raises(DataError, match=r"^told by a helper$"):
        load(data, renderer_of(data, cls=Telling))
    with pytest.raises(LuthierError, match=r"ended with -9 .*data\.num_proc=1"):
        load(data, renderer_of(data, cls=Dying))


def test_how_many_helpers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert workers.helpers(1, 1 << 40) == 0
    assert workers.helpers(3, 0) == 3
    assert workers.helpers(None, 1 << 20) == 0
    assert workers.helpers(None, 1 << 30) == 8
    assert workers.helpers(None, None) == 0
    assert [workers.helpers_of_a_stream(n, 1 << 30) for n in (None, 1, 5)] == [2, 0, 5]
    assert [workers.helpers_of_a_stream(None, size) for size in (None, 1 << 20)] == [2, 0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert workers.helpers(None, 1 << 30) == 0


CODE = """
import json, os, sys
sys.path.insert(0, {tests!r})
from conftest import make_tokenizer
from luthier.data import Data, dataset, tokenise
from luthier.data.masks import Renderer
data = Data(**json.loads(sys.argv[1]))
renderer = Renderer(make_tokenizer(), data.train_on, data.max_length)
"""


def run(code, data, **options):
    text = CODE.format(tests=str(Path(__file__).parent)) + PEAK + textwrap.dedent(code)
    values = json.dumps(data.model_dump(exclude_defaults=True))
    return subprocess.Popen([sys.executable, "-c", text, values], text=True, **options)


def test_helpers_import_no_torch(data):
    """A helper needs a tokenizer and no more, so that it starts in a second or two."""
    task = tokenise.Task(list(sources.read(data.train)), "prompt_completion", {})
    code = "import sys; from luthier.data import workers; workers.main(); print(sorted(sys.modules), file=sys.stderr)"
    process = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(renderer_of(data)) + pickle.dumps(task), capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    done, made = pickle.loads(process.stdout)
    assert done
    assert len(made.shard) == 33
    loaded = process.stderr.decode()
    assert "'tokenizers'" in loaded
    for heavy in ("torch", "pyarrow", "datasets", "pandas", "sklearn"):
        assert f"'{heavy}'" not in loaded, heavy


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_helpers_end_with_their_parent(data, number, code):
    """They hold its standard error, which ends with the last of them."""
    process = run(
        """
        from luthier.data.sources import read, Row
        from luthier.data import workers
        row = next(read(data.train))
        def tasks():
            while True:
                print("more", flush=True)
                yield tokenise.Task([row] * 500, "prompt_completion", {})
        try:
            with workers.Workers(2, renderer) as made:
                for _ in made.map(tasks()):
                    print("answered", flush=True)
        except KeyboardInterrupt:
            sys.exit(130)
        """, data, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    for line in process.stdout:
        if line == "answered\n":
            break
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.kill()
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in error


def test_two_processes_make_one_cache_and_a_killed_one_leaves_nothing_used(data, tmp_path):
    """A first process is killed while it writes; then two want the same at once, and one of them makes it."""
    killed = run(
        """
        tokenise.STRETCH_ROWS = 7
        import signal
        write, calls = tokenise._write, []
        def once(*given):
            write(*given)
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        tokenise._write = once
        dataset.load(data, data.train, renderer)
        """, data,
    )  # fmt: skip
    assert killed.wait() == -9
    root = Path(data.cache_dir)
    (left,) = [p for p in root.iterdir() if p.is_dir()]
    assert left.name.startswith(".")
    ask = """
        tokenise.STRETCH_ROWS = 7
        made = []
        write = tokenise._write
        def counted(*given):
            write(*given)
            made.append(1)
            if len(made) == 1:
                print("making", flush=True)
                input()
        tokenise._write = counted
        found = dataset.load(data, data.train, renderer, lambda text: print(text, flush=True))
        print(len(made), found.fingerprint())
        """
    first = run(ask, data, stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert first.stdout.readline() == "making\n"
    second = run(ask, data, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert second.stdout.readline().startswith("another process is making these tokens; waiting for it")
    answers = [p.communicate(given)[0].splitlines()[-1].split() for p, given in ((first, "\n"), (second, None))]
    assert [count for count, _ in answers] == ["5", "0"]
    assert answers[0][1] == answers[1][1]
    (folder,) = [p for p in root.iterdir() if p.is_dir()]
    assert cache.read(folder)[1] is None


PEAK = """
def peak():  # MiB; of this program alone, which getrusage does not tell
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_memory_stays_bounded(tmp_path):
    """100,000 rows: kept on the disk and mapped, they take less than half of what they take as objects."""
    path = tmp_path / "rows.jsonl"
    with open(path, "w") as file:
        for i in range(100_000):
            file.write(json.dumps({"text": f"row {i}"}) + "\n")
    data = Data(train=str(path), cache=True, cache_dir=str(tmp_path / "cache"))
    process = run(
        """
        few = data.model_copy(update={"cache": False, "train": data.train + ".few.jsonl"})
        with open(data.train) as file, open(few.train, "w") as out:
            out.writelines(next(file) for _ in range(3000))
        dataset.load(few, few.train, renderer)  # what it takes at all
        began = peak()
        found = dataset.load(data, data.train, renderer)
        made = peak() - began
        assert len(found.lengths) == 100_000
        plan = found.plan(examples=16, tokens=None, micro_tokens=64, pack=True, seed=0, epochs=2, max_steps=None)
        import numpy as np
        assert (np.bincount(np.frombuffer(plan.documents, np.int32)) == 2).all()
        planned = peak() - began
        some = range(0, 100_000, 4)
        objects = [(found.documents[i], found.conversations[i]) for i in some]
        print(made, planned, 4 * (peak() - began - planned))
        """, data, stdout=subprocess.PIPE,
    )  # fmt: skip
    made, planned, objects = map(float, process.communicate()[0].split())
    print(f"\nMiB: made {made:.0f}, planned {planned:.0f}, as objects {objects:.0f}")
    assert made < 30
    assert planned < 60
    assert objects > 2 * planned


@linux
def test_a_stream_needs_the_memory_of_two_blocks(tmp_path):
    """30,000 rows in blocks of 1,000: as much as of 3,000."""
    for name, count in (("few", 3_000), ("many", 30_000)):
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps({"text": f"row {i}"}) + "\n" for i in range(count))
    data = Data(train=str(tmp_path / "few.jsonl"), streaming=True, shuffle_buffer=1000, num_proc=1)
    process = run(
        """
        def taken(data, steps):
            made, _ = dataset.open_rows(data, renderer, None, lambda _: None, lambda _: None)
            plan = made.plan(examples=20, tokens=None, micro_tokens=64, pack=True, seed=0, epochs=1, max_steps=steps)
            learnt = sum(len(made.documents[d].tokens) for i in range(steps) for row in plan[i] for d in row)
            plan.close()
            return peak()
        few, path = taken(data, 150), data.train.replace("few", "many")
        many = taken(data.model_copy(update={"train": path}), 1500)
        from luthier.data.sources import read
        rows = list(read(path))
        print(many - few, peak() - few)
        """, data, stdout=subprocess.PIPE,
    )  # fmt: skip
    streamed, rows = map(float, process.communicate()[0].split())
    print(f"\nMiB: streamed {streamed:.0f}, the rows alone {rows:.0f}")
    assert streamed < 8
    assert rows > 2 * streamed + 5
