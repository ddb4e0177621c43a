"""Mixtures and streams: shares over any stretch, every row once a pass, and kill and resume byte for byte."""

import collections
import json
import os
import signal
import sys
from itertools import chain, islice

import numpy as np
import pytest
import torch
from conftest import ROWS, make_tokenizer, write_rows
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_ranks import run_on_two

from luthier import checkpoint, configure, train
from luthier.data import Data, Source, dataset, mixture, packing, stream
from luthier.data.masks import Renderer
from luthier.errors import CheckpointError, ConfigError, DataError
from luthier.monitor import Console, records
from luthier.train import Trainer

QUIET = Console(quiet=True)

# ---------------------------------------------------------------------------- mixtures


def test_turns_worked_by_hand():
    """k-th draws at (k + 1/2) / share: for 1/2, 1/4, 1/4 at 1 3 5 7, at 2 6 and at 2 6; for 0.7 and 0.3 at 0.71 2.14
    3.57 5 6.43 7.86 9.29 and at 1.67 5 8.33, where the tie at 5 goes to the first."""
    for window in (4, 64):
        turns = np.concatenate(list(islice(mixture.turns([0.5, 0.25, 0.25], window), 2)))
        assert turns[:8].tolist() == [0, 1, 2, 0, 0, 1, 2, 0]
    assert next(mixture.turns([0.7, 0.3], 10)).tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(1, 500))
@hypothesis_settings(deadline=None)
def test_shares_hold_over_any_stretch(weights, window):
    shares = mixture.shares_of(weights)
    turns = np.concatenate(list(islice(mixture.turns(shares, window), 3)))
    again = np.concatenate(list(islice(mixture.turns(shares, 3 * window), 1)))
    assert turns.tolist() == again.tolist()  # however it is computed
    counts = np.cumsum(turns[:, None] == np.arange(len(shares)), axis=0)
    wanted = np.arange(1, len(turns) + 1)[:, None] * np.asarray(shares)
    assert np.abs(counts - wanted).max() <= (len(shares) + 1) / 2 + 1e-6
    before = [mixture.taken_before(share, window) for share in shares]
    assert before == np.bincount(turns[: sum(before)], minlength=len(shares)).tolist()


def draws(weights, seed, epochs):
    passes = mixture.epochs_of([2, 6], weights, seed, epochs)
    return list(islice(chain.from_iterable(passes), 50))


def test_a_source_that_runs_out_begins_its_next_pass():
    """Sizes 2 and 6, weights 1 and 1: an epoch is 8 draws, four of each: two passes of the first, 2/3 of the second."""
    drawn = draws([1.0, 1.0], 0, 3)
    assert len(drawn) == 24
    first, second = [d for d in drawn if d < 2], [d for d in drawn if d >= 2]
    assert [sorted(first[i : i + 2]) for i in range(0, 12, 2)] == [[0, 1]] * 6
    assert [sorted(second[i : i + 6]) for i in (0, 6)] == [list(range(2, 8))] * 2
    assert drawn == draws([2.0, 2.0], 0, 3)
    assert drawn != draws([1.0, 1.0], 1, 3)
    assert drawn == draws([1.0, 1.0], 0, None)[:24]


def test_how_often_each_source_is_gone_through_is_said_beforehand(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS[:4])
    write_rows(tmp_path / "b.jsonl", ROWS[:16])
    entries = [Source(path=str(tmp_path / n), weight=w) for n, w in (("a.jsonl", 3.0), ("b.jsonl", 1.0))]
    data = Data(train=entries, max_length=64)
    training, _ = dataset.open_rows(data, renderer_of(data), None, print, print)
    plan = training.plan(examples=4, tokens=None, micro_tokens=64, pack=True, seed=0, epochs=1, max_steps=None)
    assert len(plan) == 5  # 20 draws
    a, b = training.passes(plan)
    assert a == f"{tmp_path / 'a.jsonl'}: 75.0% of the rows; 15 of 4, which is 3.75 passes"
    assert b == f"{tmp_path / 'b.jsonl'}: 25.0% of the rows; 5 of 16, which is 0.31 passes"


@pytest.mark.parametrize("count", [40, 1000, 3000])
def test_packing_takes_no_document_again_before_all_others_were_taken(count):
    """However far the run goes: a gap is filled from the pass at hand, so that no short document is learnt in each."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.2, 1, count), 16, 2048).astype(int).tolist()
    size = {"examples": None, "tokens": 8192, "micro_tokens": 4096, "pack": True, "seed": 0}
    plan = stream.plan(lengths, **size, epochs=None, max_steps=40)
    taken = list(plan.documents)
    assert len(taken) > 600
    for start in range(0, len(taken) - count + 1, count):
        assert sorted(taken[start : start + count]) == list(range(count))
    times = np.bincount(taken, minlength=count)
    assert times.max() - times.min() <= 1
    assert packing.fullness(plan[1], lengths, 4096) > 0.9


def test_a_plan_is_small_and_says_its_tokens():
    lengths = list(range(1, 51))
    plan = stream.plan(lengths, examples=8, tokens=None, micro_tokens=64, pack=True, seed=0, epochs=3, max_steps=None)
    assert [sum(map(len, step)) for step in plan] == [8] * 18 + [6]  # the last is smaller, not left out
    assert plan.tokens() == 3 * sum(lengths)
    assert plan.tokens(2) == sum(lengths[d] for step in plan[:2] for row in step for d in row)
    assert plan[-1] == plan[len(plan) - 1]
    with pytest.raises(IndexError):
        plan[len(plan)]


# ---------------------------------------------------------------------------- configuration


def renderer_of(data):
    return Renderer(make_tokenizer(), data.train_on, data.max_length)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": [{"path": "A", "weight": 1.0}, "A"]}, "has no weight and others have"),
        ({"train": [{"path": "A", "weight": 0}]}, "data.train[0].weight=0"),
        ({"train": [{"path": "A", "weight": float("inf")}]}, "data.train[0].weight=inf"),
        ({"train": [{"path": "A", "weight": 1e-9}, {"path": "A", "weight": 1.0}]}, "less than a millionth"),
        ({"train": [{"path": "A", "weight": 1.0}], "limit": 3}, "data.limit=3 with weights"),
        ({"train": [{"path": "A", "wieght": 1.0}]}, "did you mean 'weight'"),
        ({"train": [{"path": "nowhere.jsonl"}]}, "'nowhere.jsonl' does not exist"),
        ({"train": []}, "name at least one source"),
        ({"train": "A", "streaming": True}, "data.streaming=true has no end"),
        ({"train": "A", "shuffle_buffer": 5}, "set data.streaming=true"),
        ({"train": "A", "streaming": True, "shuffle_buffer": 3}, "less than batch.examples=4"),
        ({"train": "A", "streaming": True, "cache": True}, "data.cache=true with data.streaming=true"),
        ({"train": "A", "streaming": True, "limit": 3}, "use max_steps to learn less"),
        ({"train": "A", "cache": False, "cache_dir": "x"}, "leave one of them out"),
        ({"train": "A", "num_proc": 0}, "data.num_proc=0"),
        ({"train": "A", "cache": "yes"}, "data.cache='yes'"),
        ({"train": "A", "buffer_size": 5}, "did you mean 'data.shuffle_buffer'"),
        ({"train": "A", "preprocessing_num_workers": 5}, "did you mean 'data.num_proc'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(data, message, rows_file, tiny_model):
    def there(entry):
        return {**entry, "path": str(rows_file)} if isinstance(entry, dict) and entry["path"] == "A" else (
            str(rows_file) if entry == "A" else entry
        )  # fmt: skip

    given = data["train"]
    data = {**data, "max_length": 64, "train": [there(e) for e in given] if isinstance(given, list) else there(given)}
    with pytest.raises(ConfigError) as caught:
        configure({"model": str(tiny_model), "data": data, "batch": {"examples": 4, "micro_tokens": 64}})
    assert message in str(caught.value)
    assert len(caught.value.problems) <= 2


def test_the_resolved_configuration_has_the_sources(rows_file, tiny_model, tmp_path):
    config = configure({
        "model": str(tiny_model), "max_steps": 3,
        "data": {"train": [{"path": str(rows_file), "weight": 2}], "streaming": True, "shuffle_buffer": 32},
    })  # fmt: skip
    (tmp_path / "again.yaml").write_text(config.dump())
    assert configure(tmp_path / "again.yaml") == config
    assert config.data.sources()[0].weight == 2.0


# ---------------------------------------------------------------------------- streams


def rows_of(count, name=""):
    return [{"prompt": f"{name}{i}", "completion": str(i * 7)} for i in range(count)]


def open_stream(tmp_path, data, folder=None, told=None):
    told = [] if told is None else told
    return dataset.open_rows(data, renderer_of(data), folder, told.append, told.append)


def prompts(made, steps, count):
    """What the first `count` steps learn, a list of prompts each; from data whose prompts tell its rows."""
    tokenizer = make_tokenizer()
    out = []
    for i in range(count):
        step = [made.documents[d] for row in steps[i] for d in row]
        assert [made.lengths[d] for row in steps[i] for d in row] == [d.inputs for d in step]
        out.append([tokenizer.decode(d.tokens).split("user\n")[1].split("<")[0] for d in step])
    return out


def steps_of(made, examples=4, max_steps=1000, micro_tokens=128):
    return made.plan(
        examples=examples, tokens=None, micro_tokens=micro_tokens, pack=True, seed=0, epochs=1, max_steps=max_steps
    )


@pytest.fixture
def folder_of_rows(tmp_path):
    """Three files of 10, 15 and 5 rows."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, start, stop in (("a", 0, 10), ("b", 10, 25), ("c", 25, 30)):
        write_rows(folder / f"{name}.jsonl", rows_of(30)[start:stop])
    return folder


@pytest.mark.parametrize("buffer", [7, 12, 30, 100])
def test_each_pass_of_a_stream_learns_every_row_once(folder_of_rows, tmp_path, buffer):
    data = Data(train=str(folder_of_rows), streaming=True, shuffle_buffer=buffer, max_length=64)
    told = []
    made, _ = open_stream(tmp_path, data, told=told)
    steps = steps_of(made)
    learnt = [prompt for step in prompts(made, steps, 60) for prompt in step]
    steps.close()
    passes = [learnt[i : i + 30] for i in range(0, 90, 30)]
    assert [sorted(map(int, p)) for p in passes] == [list(range(30))] * 3
    assert passes[0] != passes[1] != passes[2] != list(map(str, range(30)))
    assert any("pass 2 begins" in line for line in told)


def test_rows_are_shuffled_across_the_buffer_and_files_across_passes(folder_of_rows, tmp_path):
    data = Data(train=str(folder_of_rows), streaming=True, shuffle_buffer=10, max_length=64)
    made, _ = open_stream(tmp_path, data)
    steps = steps_of(made, examples=5)
    learnt = [int(p) for step in prompts(made, steps, 60) for p in step]
    steps.close()
    assert len(learnt) == 300
    orders = set()
    for start in range(0, 300, 30):
        files = [next(f for f, stop in enumerate((10, 25, 30)) if row < stop) for row in learnt[start : start + 30]]
        first = [files.index(f) for f in range(3)]
        orders.add(tuple(np.argsort(first)))
    assert len(orders) > 2


def test_a_mixture_of_streams_holds_its_shares_in_every_block(tmp_path):
    write_rows(tmp_path / "a.jsonl", rows_of(7, "a"))
    write_rows(tmp_path / "b.jsonl", rows_of(50, "b"))
    entries = [Source(path=str(tmp_path / n), weight=w) for n, w in (("a.jsonl", 3.0), ("b.jsonl", 1.0))]
    data = Data(train=entries, streaming=True, shuffle_buffer=16, max_length=64)
    made, _ = open_stream(tmp_path, data)
    steps = steps_of(made)
    learnt = prompts(made, steps, 40)
    steps.close()
    assert [sum(p.startswith("a") for p in step) for step in learnt] == [3] * 40
    counts = collections.Counter(p for step in learnt for p in step)
    assert {counts[f"b{i}"] for i in range(50)} == {0, 1}  # 40 draws of 50
    assert {counts[f"a{i}"] for i in range(7)} <= {16, 17, 18}  # 120 draws of 7, to a block


@pytest.mark.parametrize("held", [7, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_held_out_rows_are_never_learnt_and_all_others_are(folder_of_rows, tmp_path, held, weighted):
    train = str(folder_of_rows)
    if weighted:
        write_rows(tmp_path / "x.jsonl", rows_of(20, "x"))
        train = [Source(path=train, weight=1.0), Source(path=str(tmp_path / "x.jsonl"), weight=1.0)]
    data = Data(train=train, streaming=True, shuffle_buffer=8, max_length=64, validation=held)
    made, validation = open_stream(tmp_path, data)
    steps = steps_of(made)
    learnt = {p for step in prompts(made, steps, 40) for p in step}
    steps.close()
    tokenizer = make_tokenizer()
    kept = [tokenizer.decode(d.tokens).split("user\n")[1].split("<")[0] for d in validation.documents]
    everything = {str(i) for i in range(30)} | ({f"x{i}" for i in range(20)} if weighted else set())
    assert len(kept) == len(set(kept))
    assert not set(kept) & learnt
    assert set(kept) | learnt == everything
    if held == 7:
        assert kept == ([*"0123", "x0", "x1", "x2"] if weighted else list("0123456"))
    else:
        assert 2 < len(kept) < 25
    assert validation.conversations[0].messages[0]["content"] == kept[0]


def test_held_out_rows_that_leave_none_are_refused(folder_of_rows, tmp_path):
    data = Data(train=str(folder_of_rows), streaming=True, validation=30)
    with pytest.raises(DataError, match="takes all rows"):
        open_stream(tmp_path, data)
    made, _ = open_stream(tmp_path, data.model_copy(update={"validation": 29}))
    steps = steps_of(made)
    assert {p for step in prompts(made, steps, 5) for p in step} == {"29"}
    steps.close()


BAD = {"prompt": "bad", "completion": ""}


def test_bad_rows_of_a_stream_are_counted_and_listed_once(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [*rows_of(9), BAD, *rows_of(5), BAD])
    data = Data(train=str(tmp_path / "rows.jsonl"), streaming=True, shuffle_buffer=6, max_length=64, on_bad_row="skip")
    told = []
    made, _ = open_stream(tmp_path, data, folder=tmp_path, told=told)
    steps = steps_of(made)
    prompts(made, steps, 12)  # three passes
    steps.close()
    listed = [json.loads(line) for line in (tmp_path / "skipped_rows.jsonl").read_text().splitlines()]
    assert [(x["block"], x["row"], x["kind"]) for x in listed] == [(1, 9, "empty_answer"), (2, 15, "empty_answer")]
    assert [line.splitlines()[0] for line in told if "bad rows" in line] == [
        f"block {n} of the stream: 1 bad rows skipped; listed in {tmp_path / 'skipped_rows.jsonl'}" for n in (2, 3)
    ]


def test_a_stream_of_bad_rows_only_ends(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [BAD] * 5)
    data = Data(train=str(tmp_path / "rows.jsonl"), streaming=True, shuffle_buffer=4, on_bad_row="skip")
    made, _ = open_stream(tmp_path, data)
    steps = steps_of(made)
    with pytest.raises(DataError, match="no row that can be learnt"):
        steps[0]
    steps.close()


def test_helpers_change_no_block(folder_of_rows, tmp_path):
    learnt, positions = [], []
    for count in (1, 2):
        data = Data(train=str(folder_of_rows), streaming=True, shuffle_buffer=12, max_length=64, num_proc=count)
        made, _ = open_stream(tmp_path, data)
        steps = steps_of(made)
        learnt.append(prompts(made, steps, 9))
        positions.append(steps.position(8))
        steps.close()
    assert learnt[0] == learnt[1]
    assert positions[0] == positions[1]


# ---------------------------------------------------------------------------- kill and resume


def finished(folder):
    last = checkpoint.listed(folder / "checkpoints")[-1]
    return {p.name: p.read_bytes() for p in sorted(last.iterdir())}


def two_sources(tmp_path):
    write_rows(tmp_path / "more.jsonl", rows_of(11, "m"))
    return [{"path": str(tmp_path / n), "weight": w} for n, w in (("rows.jsonl", 0.6), ("more.jsonl", 0.4))]


def ways(tmp_path):
    sources = two_sources(tmp_path)
    tokens = {"examples": None, "tokens": 256, "micro_tokens": 128}
    streaming = {"streaming": True, "shuffle_buffer": 10}
    return {
        "cache": {"data": {"cache": True, "cache_dir": str(tmp_path / "cache")}},
        "mixture": {"data": {"train": sources}},
        "streaming": {"data": streaming},
        "streaming mixture packed": {"data": {"train": sources, **streaming}, "batch": tokens},
        "streaming padded": {"data": streaming, "batch": {"packing": False}},
    }


def killed_at(config, step):
    """A run in a process of its own that is killed in the middle of a step, after what earlier ones saved."""
    child = os.fork()
    if not child:
        trainer = Trainer(config, QUIET)
        stepped = trainer.optimizer.step

        def stopped(*given):
            stepped(*given)
            if trainer.step + 1 == step:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.optimizer.step = stopped
        trainer.run()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking, from Python 3.12 on
@pytest.mark.parametrize("way", ["cache", "mixture", "streaming", "streaming mixture packed", "streaming padded"])
def test_killed_at_several_steps_ends_with_the_same_bytes(settings, tmp_path, way):
    extra = ways(tmp_path)[way]
    settings |= {"max_steps": 14, "checkpoint": {"every": 2}}
    whole = configure(settings, extra)
    train(whole, QUIET)
    config = configure(settings, extra, {"output_dir": str(tmp_path / "killed")})
    for step in (2, 4, 5, 9, 14):
        killed_at(config, step)
    torch.manual_seed(9)
    report = train(config, QUIET).report
    assert finished(tmp_path / "run") == finished(tmp_path / "killed")
    one, other = (records(tmp_path / name / "metrics.jsonl") for name in ("run", "killed"))
    assert [(r["kind"], r["step"], r["loss"]) for r in one] == [(r["kind"], r["step"], r["loss"]) for r in other]
    assert report["tokens"] == sum(r["tokens"] for r in other if r["kind"] == "train")
    state = checkpoint.read_state(checkpoint.listed(tmp_path / "killed" / "checkpoints")[-1])
    if "streaming" in way:
        assert state["data"]["block"] > 1
        assert len(json.dumps(state["data"])) < 400


def test_the_cache_and_the_number_of_processes_may_change_under_a_run(settings, tmp_path):
    """They decide no token, so that a run goes on with others, and ends with the same bytes."""
    train(configure(settings), QUIET)
    config = configure(settings, {"output_dir": str(tmp_path / "changed"), "checkpoint": {"every": 2}})
    loop = Trainer(config, QUIET).loop()
    for _ in range(3):
        next(loop)
    loop.close()
    cached = {"data": {"cache": True, "cache_dir": str(tmp_path / "cache"), "on_bad_row": "skip"}}
    train(configure(settings, {"output_dir": str(tmp_path / "changed")}, cached), QUIET)
    assert finished(tmp_path / "run") == finished(tmp_path / "changed")


@pytest.mark.parametrize("change", ["size", "content"])
def test_a_changed_stream_is_noticed(settings, tmp_path, rows_file, change):
    streaming = {"data": {"streaming": True, "shuffle_buffer": 12}, "checkpoint": {"every": 1}, "max_steps": 9}
    config = configure(settings, streaming)
    trainer = Trainer(config, QUIET)
    loop = trainer.loop()
    for _ in range(5):
        next(loop)
    loop.close()
    text = rows_file.read_text()
    rows_file.write_text(text + "\n" if change == "size" else text.replace('"three 5"', '"threE 5"'))
    with pytest.raises(CheckpointError, match="files of the stream" if change == "size" else "rows that"):
        Trainer(config, QUIET)


def test_a_bad_row_far_into_a_stream_stops_the_run_where_it_stands(settings, tmp_path, rows_file):
    """What was learnt is saved; with on_bad_row=skip the same run goes on, as if it had been so from the start."""
    write_rows(rows_file, [*ROWS, BAD, *ROWS[:8]])
    streaming = {"data": {"streaming": True, "shuffle_buffer": 8, "validation": 3}, "max_steps": 14}
    skipping = {"data": {"on_bad_row": "skip"}}
    train(configure(settings, streaming, skipping), QUIET)
    parted = configure(settings, streaming, {"output_dir": str(tmp_path / "parted")})
    with pytest.raises(DataError, match="empty_answer: 1 rows"):
        train(parted, QUIET)
    newest, _ = checkpoint.newest(tmp_path / "parted" / "checkpoints")
    assert checkpoint.step_of(newest) == 6  # three blocks of two steps came before
    train(configure(settings, streaming, skipping, {"output_dir": str(tmp_path / "parted")}), QUIET)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")


def test_a_bad_row_in_the_first_block_costs_no_model(settings, rows_file, monkeypatch):
    write_rows(rows_file, [BAD, *ROWS])
    monkeypatch.setattr(sys.modules["luthier.train"], "assemble", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match="empty_answer: 1 rows"):
        train(configure(settings, {"data": {"streaming": True, "validation": None}}), QUIET)


def test_evaluate_measures_the_rows_held_out_of_a_stream(settings, tmp_path, capsys):
    from luthier.cli import main

    folder = train(configure(settings, {"data": {"streaming": True, "shuffle_buffer": 12}}), QUIET).folder
    report = json.loads((folder / "report.json").read_text())
    assert main(["evaluate", str(folder), "--json", "--quiet"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["rows"] == 6
    assert measured["held_out_loss"]["tuned"] == pytest.approx(report["held_out_loss"]["tuned"])


# ---------------------------------------------------------------------------- ranks

def test_two_ranks_on_a_stream_learn_what_one_learns(settings, tmp_path, rows_file):
    write_rows(rows_file, [*ROWS[:9], BAD, *ROWS[9:]])
    streaming = {"streaming": True, "shuffle_buffer": 10, "train": two_sources(tmp_path), "on_bad_row": "skip"}
    settings |= {"max_steps": 9, "checkpoint": {"every": 3}}
    train(configure(settings, {"data": streaming}), QUIET)
    both = configure(settings, {"data": streaming, "output_dir": str(tmp_path / "two")}).model_dump(mode="json")
    assert run_on_two(both) == [0, 0]
    folders = [checkpoint.listed(tmp_path / name / "checkpoints")[-1] for name in ("run", "two")]
    one, two = (load_file(folder / "weights.safetensors") for folder in folders)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    states = [checkpoint.read_state(folder)["data"] for folder in folders]
    assert states[0] == states[1]
    losses = [
        [(r["kind"], r["step"], round(r["loss"], 3)) for r in records(tmp_path / n / "metrics.jsonl")]
        for n in ("run", "two")
    ]
    assert losses[0] == losses[1]
    listings = [(tmp_path / name / "skipped_rows.jsonl").read_text() for name in ("run", "two")]
    assert listings[0] == listings[1]
