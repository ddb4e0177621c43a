"""Honest gain: held-out figures, answers, base against tuned, by hand and against direct computation."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, save_model, write_rows

from luthier import checkpoint, configure, evaluate, train
from luthier import measured as of_steps
from luthier.assemble import assemble, restore
from luthier.batch import Batch, Document
from luthier.cli import main
from luthier.data.dataset import open_rows
from luthier.data.masks import Renderer
from luthier.errors import ConfigError, DataError, MetricError
from luthier.evaluate import held_out, learnt_bytes
from luthier.intervals import Figure, quotient
from luthier.logprobs import Head, nll_sum, scored
from luthier.measured import Documents, Measured, compare, comparison, summary
from luthier.models import network, trials
from luthier.monitor import Console, records
from luthier.scores import Answer
from luthier.train import Trainer

QUIET = Console(quiet=True)
DOCUMENTS = {"loss": [1.0, 3.0], "weight": [2.0, 2.0], "nll": [1.0, 3.0], "bytes": [4.0, 4.0], "token_accuracy": [2, 1]}


def documents(**columns):
    made = {k: np.array(v, float) for k, v in (DOCUMENTS | columns).items()}
    return Documents(list(range(len(made["loss"]))), made)


def measured(*exact, scores=None, **columns):
    found = [
        Answer(i, f"q{i}", "{}", "{}" if e else '{"a": 1}', scores=scores[i] if scores else {})
        for i, e in enumerate(exact)
    ]
    return Measured({"held_out": documents(**columns)}, found)


# ---------------------------------------------------------------------------- figures


def test_figures_by_hand():
    """Two rows of two tokens each, 1 and 3 nats in 4 bytes each: 4/4 nats a token, 4 / ln 2 bits in 8 bytes."""
    values = measured(0, 1).values()
    assert values["loss"] == 1.0
    assert values["perplexity"] == pytest.approx(math.e)
    assert values["bits_per_byte"] == pytest.approx(4 / math.log(2) / 8)
    assert values["token_accuracy"] == 0.75
    assert values["exact_match"] == 0.5
    assert (values["rows"], values["answered"], values["truncated"]) == (2, 2, 0)
    assert values["loss_interval"] == [0.5, 1.5]  # both drawn are the first, or the second: a quarter each
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_undefined_figures_are_null():
    values = measured(bytes=[0.0, 0.0]).values()
    assert values["bits_per_byte"] is None
    assert values["bits_per_byte_interval"] is None
    assert "exact_match" not in values
    json.dumps(compare(measured(bytes=[0.0, 0.0]), measured(bytes=[0.0, 0.0], loss=[1e9, 1e9])), allow_nan=False)


def test_means_over_few_of_the_rows_have_intervals():
    """Of n rows k are counted; a resample has none of them with probability (1 - k / n) ** n. With 3 of 20 that is
    0.039, and the interval is of the others; with 2 of 20 it is 0.12, and there is none. All counted ones are equal."""
    for counted, wanted in ((3, (2.0, 2.0)), (2, None)):
        rows = np.r_[np.ones(counted), np.zeros(20 - counted)]
        figure = Figure(np.stack([2 * rows, rows], 1), quotient)
        assert figure.value == 2.0
        assert figure.interval() == wanted


def test_base_against_tuned_by_hand():
    """Of four rows one was won, none lost: exact p-value 1. The loss falls by 0.5 in each row, without spread."""
    base = measured(0, 0, 0, 1, loss=[2.0, 4.0])
    tuned = measured(0, 1, 0, 1, loss=[1.0, 3.0])
    report = compare(base, tuned)
    exact = report["figures"]["exact_match"]
    assert (exact["base"], exact["tuned"], exact["change"]) == (0.25, 0.5, 0.25)
    assert (exact["wins"], exact["losses"], exact["p_value"]) == (1, 0, 1.0)
    assert exact["change_interval"] == [0.0, 0.75]  # of the paired bootstrap of (0, 1, 0, 0)
    loss = report["figures"]["loss"]
    assert (loss["base"], loss["tuned"], loss["change"], loss["change_interval"]) == (1.5, 1.0, -0.5, [-0.5, -0.5])
    assert (loss["wins"], loss["losses"]) == (2, 0)
    assert report["held_out_loss"] == {"base": 1.5, "tuned": 1.0}
    assert report["answers"]["gain"] == 0.25
    assert report["answers"]["tuned"]["valid_json"] == 1.0
    rows = comparison(base, tuned)
    assert [r["outcome"] for r in rows] == ["tie", "win", "tie", "tie"]
    assert (rows[1]["base"], rows[1]["tuned"]) == ('{"a": 1}', "{}")
    assert rows[1]["scores"]["exact_match"] == [0.0, 1.0]
    assert [r["outcome"] for r in comparison(tuned, base)] == ["tie", "loss", "tie", "tie"]


def test_only_rows_that_both_have_are_paired():
    base, tuned = measured(1, 1, 0), measured(0, 1)
    assert compare(base, tuned)["figures"]["exact_match"]["base"] == 1.0
    other = measured(1, 1, bytes=[5.0, 4.0])  # another text at row 0
    assert compare(other, tuned)["figures"]["loss"]["base"] == 1.5
    assert "base" not in compare(measured(bytes=[1.0, 1.0]), tuned)["figures"]["loss"]
    alone = compare(None, tuned)
    assert "base" not in alone["answers"]
    assert alone["figures"]["loss"]["tuned"] == 1.0


def test_answers_that_are_cut_are_counted():
    found = [Answer(0, "", "a", "ab", truncated=True), Answer(1, "", "a", "a")]
    assert summary(found)["truncated"] == 1
    assert "valid_json" not in summary(found)
    assert "1 of them cut" in of_steps.line(Measured({"held_out": documents()}, found).values())


def test_answers_survive_their_file():
    found = [Answer(3, "p", "\u2028 line\x85", "\u2029é\n", True, {"mine": 0.5}), Answer(4, "", "", "")]
    assert of_steps.from_json(of_steps.to_json(found)) == found


# ---------------------------------------------------------------------------- held-out rows


def test_held_out_equals_a_direct_computation(settings):
    """Each row alone through transformers' own model; its learnt text's bytes from the text."""
    settings["data"]["validation"] = 8
    made = assemble(configure(settings), training=False)
    _, rows = open_rows(configure(settings).data, made.renderer, None, QUIET.say, QUIET.warn)
    rows.documents[2].weights[-3:] *= 0.5  # weights other than 0 and 1
    found = held_out(made, rows, 64)
    model, total, weight, bits, letters, hits = make_model(), 0.0, 0.0, 0.0, 0, 0.0
    for document, conversation in zip(rows.documents, rows.conversations):
        tokens = torch.tensor(document.tokens[None].astype(np.int64))
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
        nll, w = -logprobs.gather(-1, tokens[0, 1:, None])[:, 0], torch.tensor(document.weights[1:])
        total += (nll * w).sum().item()
        weight += w.sum().item()
        bits += nll[w > 0].sum().item() / math.log(2)
        letters += len(conversation.messages[-1]["content"].encode())
        hits += ((logprobs.argmax(-1) == tokens[0, 1:]) * w).sum().item()
    values = Measured({"held_out": found}).values()
    assert values["loss"] == pytest.approx(total / weight, rel=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(total / weight), rel=1e-4)
    assert values["bits_per_byte"] == pytest.approx(bits / letters, rel=1e-5)
    assert values["token_accuracy"] == pytest.approx(hits / weight)
    one_by_one = held_out(made, rows, 1)
    for name, column in one_by_one.columns.items():
        np.testing.assert_allclose(found.columns[name], column, rtol=1e-4, atol=1e-5)


def test_rows_that_teach_nothing_change_nothing(settings):
    made = assemble(configure(settings), training=False)
    _, rows = open_rows(configure(settings).data, made.renderer, None, QUIET.say, QUIET.warn)
    before = Measured({"held_out": held_out(made, rows, 64)}).values()
    idle = rows.documents[0]._replace(weights=np.zeros_like(rows.documents[0].weights))
    rows = replace(
        rows, documents=[*rows.documents, idle], conversations=[*rows.conversations, rows.conversations[0]],
        _lengths=None,
    )  # fmt: skip
    after = Measured({"held_out": held_out(made, rows, 64)}).values()
    for key in ("loss", "perplexity", "bits_per_byte", "token_accuracy"):
        assert after[key] == pytest.approx(before[key], rel=1e-6)
    with pytest.raises(DataError, match="no token of these rows is learnt"):
        held_out(made, rows.subset([len(rows) - 1]), 64)


def document(tokens, learnt):
    return Document(np.array(tokens, np.int32), np.array(learnt, np.float32), 0)


def test_bytes_of_the_learnt_text():
    """By hand: `ab` is asked, `é€` learnt and closed by a special token, then ` c` asked and `d` learnt."""
    tokenizer = make_tokenizer()
    parts = [("ab", 0), ("é€", 1), ("<|im_end|>", 1), (" c", 0), ("d", 1)]
    coded = [(t, w) for text, w in parts for t in tokenizer.encode(text)]
    assert learnt_bytes(tokenizer, [document(*zip(*coded))]).tolist() == [2 + 3 + 1]
    half = tokenizer.encode("é")  # its first byte is the start of the text, which nothing predicts
    assert learnt_bytes(tokenizer, [document([*half, 65], [0, 1, 1])]).tolist() == [2 + 1]


def test_bytes_where_the_decoder_drops_a_blank():
    """As SentencePiece does: blanks belong to the words after them, and the text's first is not written."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "<s>": 2}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    assert tokenizer.decode([1]) == "two"
    assert learnt_bytes(tokenizer, [document([0, 1], [0, 1])]).tolist() == [len(" two")]


# ---------------------------------------------------------------------------- answers


def made_with(settings, rows, tmp_path, **extra):
    settings["data"] = {"train": str(write_rows(tmp_path / "asked.jsonl", rows)), "max_length": 200}
    settings["batch"] = {"examples": 4, "micro_tokens": 256}
    config = configure(settings, extra)
    made = assemble(config, training=False)
    dataset, _ = open_rows(config.data, made.renderer, None, QUIET.say, QUIET.warn)
    return made, dataset


def test_plain_text_asks_nothing(settings, tmp_path):
    made, rows = made_with(settings, [{"text": "some words"}] * 3, tmp_path)
    with pytest.raises(DataError, match=r"no row that asks something.*evaluation\.generate=0"):
        evaluate.answers(made, rows, 2, 4, 2)


def test_a_prompt_past_the_models_positions_is_refused(settings, tmp_path):
    made, rows = made_with(settings, [{"prompt": "x" * 100, "completion": "y"}] * 2, tmp_path)
    with pytest.raises(DataError, match=r"row 0 has 1\d\d tokens, and with evaluation\.max_new_tokens=400 .* 512"):
        evaluate.answers(made, rows, 2, 400, 2)


def test_a_tool_call_is_a_reference(settings, tmp_path):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% if m['tool_calls'] %}{{ m['tool_calls'][0]['function'] | tojson }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    settings["model"] = str(save_model(tmp_path / "model", template=template))
    call = {"function": {"name": "lamp", "arguments": {"on": True}}}
    turns = [{"role": "user", "content": "on"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    made, rows = made_with(settings, [{"messages": turns}] * 2, tmp_path)
    found = evaluate.answers(made, rows, 1, 4, 2)
    assert json.loads(found[0].reference) == {"name": "lamp", "arguments": {"on": True}}
    assert found[0].truncated
    assert found[0].messages == ({"role": "user", "content": "on"},)


# ---------------------------------------------------------------------------- whole runs

GENERATING = {"generate": 5, "max_new_tokens": 12, "metrics": ["f1", "chrf", "rouge", "exact_match"]}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_command_finds_what_the_run_reported(settings, capsys, method):
    """For `full`, whose base is loaded afresh, as for adapters, which are switched off."""
    settings |= {"max_steps": 20, "evaluation": GENERATING | {"forgetting": "python-docs"}}
    result = train(configure(settings, method=method), QUIET)
    run = result.folder
    kept = [json.loads(line) for line in (run / "answers" / "compare.jsonl").read_text().splitlines()]
    assert len(kept) == 5
    f1 = result.report["figures"]["f1"]
    assert (f1["wins"], f1["losses"]) == tuple(sum(r["outcome"] == o for r in kept) for o in ("win", "loss"))
    assert result.report["figures"]["forgetting.loss"]["base"] > 0
    assert main(["evaluate", str(run), "--json", "--quiet", "--show", "wins", "2"]) == 0
    again = json.loads(capsys.readouterr().out)
    for key, figure in result.report["figures"].items():
        for part, value in figure.items():
            assert again["figures"][key][part] == pytest.approx(value, rel=1e-4, abs=1e-5), (key, part)
    assert all(r["outcome"] == "win" for r in again["rows_shown"])
    assert main(["evaluate", str(run), "--quiet", "--show", "losses", "2"]) == 0
    shown = capsys.readouterr().out
    assert "won/lost" in shown
    assert f"F1 of words {f1['base']:.3f} {f1['tuned']:.3f}" in " ".join(shown.split())
    assert "forgetting: bits per byte" in shown
    assert "5 prompts answered" in shown
    assert ("no row was made worse" in shown) == (f1["losses"] == 0)
    assert [json.loads(line) for line in (run / "answers" / "compare.jsonl").read_text().splitlines()] == kept


def test_every_evaluation_has_its_figures_and_resumes_with_the_same(settings, tmp_path):
    settings |= {"evaluation": GENERATING | {"every": 2, "forgetting": "python-docs"}, "checkpoint": {"every": 2}}
    whole = train(configure(settings), QUIET)
    history = [r for r in records(whole.folder / "metrics.jsonl") if r["kind"] == "evaluation"]
    keys = {"loss", "perplexity", "bits_per_byte", "token_accuracy", "forgetting.loss", "forgetting.bits_per_byte"}
    assert all(keys <= set(r) and keys <= {k.removesuffix("_interval") for k in r if "interval" in k} for r in history)
    scored = {"f1", "chrf", "rouge_1", "rouge_2", "rouge_l", "exact_match", "truncated"}
    assert scored <= set(history[0]) & set(history[-1])
    assert "f1" not in history[1]
    parted = configure(settings, {"output_dir": str(tmp_path / "parted")})
    trainer = Trainer(parted, QUIET)
    for step in trainer.loop():
        if step.step == 3:
            break
    trainer.journal.close()
    resumed = train(parted, QUIET)
    assert resumed.report["figures"] == whole.report["figures"]
    ends = [checkpoint.listed(f / "checkpoints")[-1] / "weights.safetensors" for f in (whole.folder, resumed.folder)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_measuring_changes_nothing_that_is_learnt(settings, tmp_path):
    train(configure(settings), QUIET)
    other = configure(settings, {"output_dir": str(tmp_path / "other"), "evaluation": GENERATING | {"every": 1}})
    train(other, QUIET)
    ends = [
        checkpoint.listed(tmp_path / name / "checkpoints")[-1] / "weights.safetensors" for name in ("run", "other")
    ]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_forgetting_is_measured_on_rows_of_any_format(settings, tmp_path):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    rows = [{"messages": chat}, {"messages": [chat[0], chat[1] | {"content": "hi"}]}]
    general = write_rows(tmp_path / "general.jsonl", rows)
    settings |= {"evaluation": {"forgetting": str(general)}}
    settings["data"]["columns"] = {}
    report = train(configure(settings), QUIET).report
    figure = report["figures"]["forgetting.loss"]
    assert figure["change"] == pytest.approx(figure["tuned"] - figure["base"])
    made, _ = restore(tmp_path / "run")
    rows = evaluate.general_rows(configure(settings), made.renderer, QUIET.say, QUIET.warn)
    assert Measured({"held_out": held_out(made, rows, 64)}).values()["loss"] == pytest.approx(figure["tuned"], rel=1e-5)


def test_the_slice_of_the_documentation_is_the_same_every_time():
    renderers = [Renderer(make_tokenizer(), "all", n) for n in (2048, 2048, 64)]
    first, again, short = (evaluate.python_docs(r) for r in renderers)
    assert first.fingerprint() == again.fingerprint()
    assert len(first) == len(short) == 24
    assert max(len(d.tokens) for d in short.documents) <= 64
    assert first.tokens > 13_000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"metrics": ["f1"]}, "give evaluation.generate"),
        ({"metrics": ["f1", "f1"], "generate": 2}, "named twice"),
        ({"metrics": ["blue"], "generate": 2}, "evaluation.metrics"),
        ({"metrics": [], "generate": 2}, "evaluation.metrics"),
        ({"forgetting": "no/such/file.jsonl"}, "does not exist"),
    ],
)
def test_wrong_settings_are_refused(settings, wrong, message):
    with pytest.raises(ConfigError, match=message):
        configure(settings, {"evaluation": wrong})


def test_what_needs_held_out_rows_says_so(settings):
    del settings["data"]["validation"]
    with pytest.raises(ConfigError, match="forgetting is measured with the held-out rows"):
        configure(settings, {"evaluation": {"forgetting": "python-docs"}})
    with pytest.raises(ConfigError, match=r"give data\.validation"):
        Trainer(configure(settings), QUIET, {"mine": lambda *_: 1})


def test_bleu_is_asked_for_with_its_library(settings, monkeypatch):
    wanted = {"evaluation": {"metrics": ["bleu"], "generate": 2}}
    assert configure(settings, wanted).evaluation.metrics == ["bleu"]
    monkeypatch.setattr("luthier.contradictions.evaluation.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'luthier\[eval\]'"):
        configure(settings, wanted)


# ---------------------------------------------------------------------------- the user's functions


def test_a_users_function_scores_base_and_tuned(settings, tmp_path, capsys):
    settings |= {"evaluation": GENERATING}
    result = train(configure(settings), QUIET, {"length": lambda reference, answer, prompt, row: len(answer)})
    found = of_steps.from_json(of_steps.answers_file(result.folder, 6).read_text())
    figure = result.report["figures"]["length"]
    assert figure["tuned"] == pytest.approx(np.mean([len(a.answer) for a in found]))
    assert "base" in figure
    path = tmp_path / "score.py"
    path.write_text("def length(reference, answer, prompt, row):\n    assert row['messages']\n    return len(answer)\n")
    assert main(["evaluate", str(result.folder), "--metric", f"{path}:length", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["length"] == figure


def test_a_configuration_cannot_name_code(settings, tmp_path):
    path = tmp_path / "score.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(*a): return 1\n")
    for wrong in ({"metrics": [f"{path}:f"], "generate": 2}, {"metric": f"{path}:f"}, {"metric_file": f"{path}:f"}):
        with pytest.raises(ConfigError, match=r"evaluation\.metric"):
            configure(settings, {"evaluation": wrong})
    assert not (tmp_path / "ran").exists()


def test_a_function_that_fails_loses_nothing(settings, tmp_path):
    settings |= {"evaluation": GENERATING, "checkpoint": {"every": 100}}
    answered = []

    def fails_at_the_end(reference, answer, prompt, row):
        answered.append(row["row"])
        return 1 if len(answered) <= 5 else "good"

    with pytest.raises(MetricError, match=r"gave 'good' for row \d+.*the answers are kept in .*step-00000006"):
        train(configure(settings), QUIET, {"mine": fails_at_the_end})
    assert len(of_steps.from_json(of_steps.answers_file(tmp_path / "run", 6).read_text())) == 5
    trainer = Trainer(configure(settings), QUIET, {"mine": lambda *_: 1})
    assert trainer.step == 6  # nothing is trained again
    assert not list(trainer.loop())
    assert trainer.result().report["figures"]["mine"]["tuned"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "f1"], "give --generate N"),
        (["--show", "wins", "3"], "give --generate N"),
        (["--show", "best", "3"], "expected `wins` or `losses`"),
        (["--show", "wins", "0"], "expected `wins` or `losses`"),
        (["--generate", "2", "--metric", "blue"], "evaluation.metrics"),
        (["--generate", "-2"], "evaluation.generate"),
        (["--forgetting", "no/such/file.jsonl"], "does not exist"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(settings, capsys, options, message):
    config = configure(settings)
    folder = Path(settings["output_dir"])
    folder.mkdir()
    (folder / "config.yaml").write_text(config.dump())
    assert main(["evaluate", str(folder), *options]) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------- logits to figures


def test_token_accuracy_and_loss_by_hand():
    """Two tokens, logits (0, ln 3): the likelier has probability 3/4, so the losses are -ln 3/4 and -ln 1/4."""
    head = torch.nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[0.0], [math.log(3)]])
    hidden, targets = torch.ones(2, 1), torch.tensor([1, 0])
    logprobs, hits = scored(hidden, Head(head), targets)
    assert logprobs.tolist() == pytest.approx([math.log(0.75), math.log(0.25)])
    assert hits.tolist() == [True, False]
    total = nll_sum(hidden, Head(head), targets, torch.tensor([1.0, 2.0]))
    assert total.item() == pytest.approx(-math.log(0.75) - 2 * math.log(0.25))


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_loss_and_gradients_equal_autograd(scale, softcap, bias, monkeypatch):
    from luthier import logprobs

    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", 4 * 11 * 3)  # chunks of three rows, of ten
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 11, bias=bias)
    head = Head(module, scale, softcap)
    targets, weights = torch.randint(11, (10,)), torch.rand(10)
    grads = []
    for chunked in (True, False):
        hidden = torch.randn(10, 5, generator=torch.Generator().manual_seed(1)).mul_(3).requires_grad_()
        module.zero_grad()
        if chunked:
            total = nll_sum(hidden, head, targets, weights)
        else:
            total = (torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none") * weights).sum()
        (total * 0.7).backward()
        grads.append([total.detach(), hidden.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_wrapped_head_takes_the_general_path():
    head = Head(torch.nn.Sequential(torch.nn.Linear(5, 11)))
    assert not head.linear
    hidden = torch.randn(4, 5, requires_grad=True)
    targets, weights = torch.randint(11, (4,)), torch.ones(4)
    total = nll_sum(hidden, head, targets, weights)
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(total, expected)


def test_families_that_cannot_be_packed_say_why():
    net = network.Network(make_model("llama"))
    net.model.config.layer_types = ["chunked_attention", "full_attention"]
    reason = trials.prepare(net, "auto")
    assert reason is not None
    assert "chunked_attention" in reason
    assert not net.packed
    hidden = net.hidden(
        Batch.pack([Document(np.arange(5, dtype=np.int32), np.r_[0, np.ones(4)].astype(np.float32), 0)])
    )
    assert hidden.shape == (4, 32)  # the last token is a target only
