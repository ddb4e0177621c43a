"""Runs of distillation: teachers of every kind, hidden states, other vocabularies, resuming, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import LLAMA, ROWS, make_model, make_tokenizer, save_model
from test_train import QUIET, finished, in_two_parts

from luthier import checkpoint, configure, explain, steps, surgery, train
from luthier.assemble import assemble, restore
from luthier.batch import Batch
from luthier.cli import main
from luthier.config import Config
from luthier.data.dataset import load
from luthier.errors import ConfigError, DataError, ModelError
from luthier.models.translation import Pieces, Translation, difference
from luthier.monitor import records


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A wider and deeper Llama with the same tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(7)
    larger = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | larger))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        model.lm_head.weight.mul_(8)  # sure of something
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def distilled(settings, teacher):
    def made(*extra, **objective) -> Config:
        objective = {"teacher": str(teacher)} | objective
        return configure(settings, {"objective": objective}, *extra, method="distill")

    return made


def batch_of(made) -> Batch:
    rows = load(made.config.data, made.config.data.train, made.renderer)
    return Batch.pack([rows.documents[i] for i in range(6)]).to(made.ranks.device)


def gradients(made, batch, micro_tokens: int) -> dict[str, torch.Tensor]:
    made.network.zero_grad()
    made.objective.zero_grad()
    losses = []
    for part in batch.split(micro_tokens):
        losses.append(made.objective(made.network, made.objective.prepare(made.network, part)))
        losses[-1].total.backward()
    count = sum(loss.count for loss in losses)
    return {name: p.grad / count for name, p in made.parameters().items() if p.grad is not None}


# ---------------------------------------------------------------------------- learning


def test_a_student_comes_near_its_teacher(distilled):
    config = distilled({"max_steps": 40}, alpha=0.0)
    result = train(config, QUIET)
    figures = result.report["figures"]
    assert figures["kl"]["tuned"] < 0.6 * figures["kl"]["base"]
    assert figures["agreement"]["tuned"] > figures["agreement"]["base"]
    assert figures["kl"]["tuned_interval"][0] < figures["kl"]["tuned"] < figures["kl"]["tuned_interval"][1]
    taken = [r for r in records(result.folder / "metrics.jsonl") if r["kind"] == "train"]
    assert taken[-1]["kl"] < 0.6 * taken[0]["kl"]
    assert {"hard_loss", "soft_loss", "kl", "teacher_entropy", "agreement"} <= taken[0].keys()
    assert taken[0]["loss"] == pytest.approx(taken[0]["soft_loss"], rel=1e-5)


def test_held_out_loss_is_that_of_a_student_alone(distilled, settings):
    """Of the next token, whatever the teacher says: runs with and without one can be compared."""
    with_teacher = train(distilled({"max_steps": 1}), QUIET).report["figures"]
    plain = configure(settings, {"max_steps": 1, "output_dir": settings["output_dir"] + "1"}, method="full")
    alone = train(plain, QUIET)
    for name in ("loss", "perplexity", "bits_per_byte", "token_accuracy"):
        assert with_teacher[name]["base"] == pytest.approx(alone.report["figures"][name]["base"], rel=1e-5)


# ---------------------------------------------------------------------------- invariance


@pytest.mark.parametrize("objective", [{"divergence": "jsd", "temperature": 2.0}, {"hidden_states": {}}], ids=str)
def test_micro_batches_and_packing_change_no_gradient(distilled, objective):
    packed = assemble(distilled(**objective))
    batch = batch_of(packed)
    whole = gradients(packed, batch, 10_000)
    assert any(name.startswith("objective.") for name in whole) == ("hidden_states" in objective)
    parts = gradients(packed, batch, 1)
    padded = assemble(distilled({"batch": {"packing": False}}, **objective))
    assert not padded.network.packed
    assert packed.network.packed
    for other in (parts, gradients(padded, batch, 10_000)):
        assert whole.keys() == other.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_filler_teaches_nothing(distilled):
    made = assemble(distilled(hidden_states={}))
    batch = batch_of(made)
    plain, filled = (made.objective(made.network, made.objective.prepare(made.network, b)) for b in
                     (batch, batch.padded_to(len(batch) + 9)))  # fmt: skip
    torch.testing.assert_close(filled.total, plain.total)
    assert filled.count == plain.count
    torch.testing.assert_close(*(made.objective.evaluate(made.network, b).total for b in
                                 (batch, batch.padded_to(len(batch) + 9))))  # fmt: skip


def test_hidden_states_of_layers_are_those_of_transformers(distilled, teacher):
    from transformers import AutoModelForCausalLM

    made = assemble(distilled(hidden_states={"layers": [[0, 1], [1, 2]]}))
    batch = batch_of(made)
    assert max(batch.alike()) > 1, "what documents share is run once, and still found in each"
    found = made.objective.prepare(made.network, batch).token_fields["teacher_layers"]  # [T, 2, H']
    model = AutoModelForCausalLM.from_pretrained(teacher)
    for a, b in zip(batch.ends, batch.ends[1:]):
        with torch.no_grad():
            states = model(batch.tokens[None, a:b], output_hidden_states=True).hidden_states  # embeddings first
        torch.testing.assert_close(found[a:b, 0], states[2][0], rtol=1e-3, atol=1e-4)
        normed = model.model.norm(found[a:b, 1])  # the last of transformers' is after the norm
        torch.testing.assert_close(normed, states[3][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["recomputed", "compiled"])
def test_layers_that_are_recomputed_or_compiled_are_matched_as_well(distilled, how):
    """Hooks would be inside of a compiled layer's graph: its call is watched instead."""
    plain = assemble(distilled(hidden_states={}))
    batch = batch_of(plain)
    wanted = gradients(plain, batch, 10_000)
    other = assemble(distilled({"parallel": {"activation_checkpointing": int(how == "recomputed")}}, hidden_states={}))
    calls = []
    if how == "compiled":
        for layer in surgery.blocks(other.network.model)[1]:
            layer._compiled_call_impl = lambda *a, call=layer._call_impl, **k: calls.append(0) or call(*a, **k)
    found = gradients(other, batch, 10_000)
    assert len(calls) == (2 if how == "compiled" else 0)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("method", "objective"),
    [("full", {"hidden_states": {"loss": "mse", "weight": 0.1}}), ("lora", {"divergence": "reverse_kl"})],
)
def test_stopped_and_resumed_ends_with_the_same_bytes(distilled, tmp_path, method, objective):
    trainable = {"trainable": {"kind": "lora", "r": 4, "lora_dropout": 0.1}} if method == "lora" else {}
    whole = distilled(trainable, {"checkpoint": {"every": 3}}, **objective)
    train(whole, QUIET)
    parted = distilled(trainable, {"checkpoint": {"every": 2}, "output_dir": str(tmp_path / "parted")}, **objective)
    in_two_parts(parted, 3)  # after the checkpoint of step 2
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")


def test_a_teacher_is_in_no_checkpoint_and_maps_are(distilled, tmp_path):
    config = distilled({"max_steps": 2}, hidden_states={})
    result = train(config, QUIET)
    last = checkpoint.listed(result.folder / "checkpoints")[-1]
    kept = checkpoint.read_tensors(last, "weights")
    maps = {name: tuple(t.shape) for name, t in kept.items() if name.startswith("objective.")}
    assert maps == {f"objective.matching.maps.{i}.weight": (64, 32) for i in range(2)}
    assert sum(t.numel() for n, t in kept.items() if n not in maps) == sum(p.numel() for p in make_model().parameters())
    made = assemble(config)
    assert made.teacher is not None
    assert not made.teacher.network.training
    moving = {id(p) for p in made.parameters().values()}
    assert not [p for p in made.teacher.network.parameters() if p.requires_grad or id(p) in moving]
    # What asks the run needs neither maps nor teacher.
    asked, _ = restore(result.folder)
    assert asked.teacher is None
    assert not any(name.startswith("objective.") for name in asked.parameters())
    assert result.export(tmp_path / "out", "full")


# ---------------------------------------------------------------------------- kept on disk


def test_what_is_kept_of_the_teacher_teaches_like_the_teacher(distilled, tmp_path):
    """All tokens kept: the same figures, step by step, and on held-out rows; the teacher is gone meanwhile."""
    live = train(distilled({"output_dir": str(tmp_path / "live")}, temperature=2.0), QUIET)
    config = distilled(temperature=2.0, top_k=320)
    kept = train(config, QUIET)
    histories = [records(run.folder / "metrics.jsonl") for run in (live, kept)]
    for one, other in zip(*histories):
        assert other.get("teacher_rest", 0.0) < 1e-6
        for key in ("loss", "kl", "hard_loss", "agreement", "teacher_entropy"):
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key
    assert not list(steps(config, QUIET)), "it is finished"
    files = {p.parent.name for p in (kept.folder / "ahead").rglob("*.safetensors")}
    assert files == {"training", "held_out"}


def test_few_tokens_are_kept_with_the_mass_of_all_others(distilled):
    result = train(distilled({"max_steps": 40}, top_k=8, alpha=0.0), QUIET)
    taken = [r for r in records(result.folder / "metrics.jsonl") if r["kind"] == "train"]
    assert taken[-1]["kl"] < 0.6 * taken[0]["kl"]
    assert 0.01 < taken[0]["teacher_rest"] < 0.9
    assert result.report["figures"]["kl"]["tuned"] < result.report["figures"]["kl"]["base"]


def test_a_run_with_kept_outputs_resumes_without_its_teacher(distilled, teacher, tmp_path):
    import shutil

    gone = shutil.copytree(teacher, tmp_path / "gone")
    settings = {"teacher": str(gone), "top_k": 8}
    train(distilled({"checkpoint": {"every": 3}}, **settings), QUIET)
    parted = distilled({"checkpoint": {"every": 2}, "output_dir": str(tmp_path / "parted")}, **settings)
    for step in steps(parted, QUIET):
        if step.step == 3:
            break
    shutil.rmtree(gone)
    torch.manual_seed(99)
    train(configure(tmp_path / "parted" / "config.yaml"), QUIET)
    with pytest.raises(ConfigError, match=r"objective\.teacher: .*/gone' does not exist"):
        distilled({"output_dir": str(tmp_path / "new")}, **settings)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")


# ---------------------------------------------------------------------------- the student's own answers


def rounds(config) -> tuple:
    """The run's rollouts, with the first batch of answers drawn."""
    from luthier.train import Trainer

    trainer = Trainer(config, QUIET)
    trainer.steps[0]
    return trainer, trainer.steps


def test_some_rows_are_answered_by_the_student(distilled):
    """The others are learnt as they are; the hard loss is of those alone."""
    config = distilled({"batch": {"examples": 24, "micro_tokens": 2048}},
                       on_policy={"lmbda": 0.5, "max_completion_length": 8}, alpha=0.5)  # fmt: skip
    trainer, drawn = rounds(config)
    given = [one for one in drawn.samples if one.given]
    own = [one for one in drawn.samples if not one.given]
    assert len(given) + len(own) == 24
    assert 4 < len(given) < 20
    for one in given:
        document = drawn.prompts.documents[one.prompt]
        assert one.document().tokens.tolist() == document.tokens.tolist()[: len(one.tokens)]
        assert np.array_equal(one.document().weights > 0, document.weights[: len(one.tokens)] > 0)
        assert document.weights.sum() == len(one)
    for one in own:
        prompt = drawn.prompts.renderer.prompt(drawn.prompts.conversations[one.prompt])[0]
        assert one.tokens[: one.start].tolist() == prompt
        assert 1 <= len(one) <= 8
        assert one.logprobs.any()
    made = trainer.made
    batch = trainer._batch(list(range(len(drawn.documents))))
    loss = made.objective(made.network, made.objective.prepare(made.network, batch))
    tokens = sum(map(len, drawn.samples))
    assert loss.count.item() == tokens
    assert loss.metrics["on_policy"].item() == sum(map(len, own))
    hard = 0.0
    with torch.no_grad():
        for one in given:
            tokens_of = torch.tensor(one.tokens[None].astype(np.int64))
            with made.network.natively() as model:
                logprobs = model(tokens_of).logits[0].log_softmax(-1)
            targets = torch.tensor(one.tokens[one.start :].astype(np.int64))
            hard -= logprobs[one.start - 1 : -1].gather(-1, targets[:, None]).sum().item()
    assert loss.metrics["hard_loss"].item() == pytest.approx(hard, rel=1e-4)
    total = 0.5 * loss.metrics["hard_loss"] + 0.5 * loss.metrics["soft_loss"]
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-4)


def test_a_student_learns_from_its_own_answers(distilled):
    """Reverse KL on its own samples, arXiv:2306.13649 with lambda 1: held-out KL falls, though no row's answer is
    learnt."""
    drawn = {"lmbda": 1.0, "max_completion_length": 12}
    config = distilled({"max_steps": 40}, on_policy=drawn, divergence="reverse_kl", alpha=0.0)
    result = train(config, QUIET)
    taken = [r for r in records(result.folder / "metrics.jsonl") if r["kind"] == "train"]
    assert {r["on_policy"] for r in taken} == {1.0}
    assert all(1 <= r["completion_length"] <= 12 for r in taken)
    assert np.mean([r["soft_loss"] for r in taken[-5:]]) < 0.7 * np.mean([r["soft_loss"] for r in taken[:5]])
    assert result.report["figures"]["kl"]["tuned"] < result.report["figures"]["kl"]["base"]


def test_stopped_in_a_batch_of_answers_and_resumed_ends_with_the_same_bytes(distilled, tmp_path):
    settings = {"on_policy": {"lmbda": 0.6, "max_completion_length": 8, "num_mini_batches": 2}}
    train(distilled({"checkpoint": {"every": 3}}, **settings), QUIET)
    parted = distilled({"checkpoint": {"every": 1}, "output_dir": str(tmp_path / "parted")}, **settings)
    in_two_parts(parted, 4)  # after the checkpoint of step 3, in the middle of the second batch of answers
    one, other = finished(tmp_path / "run"), finished(tmp_path / "parted")
    assert {n: b for n, b in one.items() if n.endswith(".safetensors")} == {
        n: b for n, b in other.items() if n.endswith(".safetensors")
    }
    states = [json.loads(files["state.json"]) for files in (one, other)]
    for state in states:
        state["parts"]["rollouts"].pop("pace", None)  # of a clock
    assert states[0] == states[1]


def test_what_cannot_be_answered_is_refused(distilled, tmp_path):
    (tmp_path / "plain.txt").write_text("one two three\n\nfour five six\n\nseven eight nine\n")
    plain = {"data": {"train": str(tmp_path / "plain.txt"), "validation": None}}
    with pytest.raises(DataError, match=r"objective\.on_policy answers the prompts of rows, and plain text has none"):
        train(distilled(plain, on_policy={"max_completion_length": 8}), QUIET)
    streamed = {"data": {"streaming": True, "validation": None, "format": "text"}, "batch": {"examples": None,
                "tokens": 64}}  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        distilled(streamed, on_policy={}, top_k=3)
    for told in (
        "batch.tokens=64: how long answers will be is not known", "data.streaming=true with method=distill",
        "data.format=text: objective.on_policy answers prompts, and plain text has none",
        "objective.top_k=3 keeps what the teacher says of rows before the first step, and answers",
    ):  # fmt: skip
        assert told in str(caught.value)
    with pytest.raises(DataError, match=r"lower objective\.on_policy\.max_completion_length"):
        train(distilled(on_policy={"max_completion_length": 60}), QUIET)


def test_a_conversation_is_learnt_to_its_last_answer_alone(distilled, tmp_path):
    turns = [{"role": r, "content": c} for r, c in
             (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]  # fmt: skip
    (tmp_path / "turns.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    data = {"data": {"train": str(tmp_path / "turns.jsonl"), "validation": None}, "batch": {"examples": 1}}
    config = distilled(data, on_policy={"lmbda": 1e-9, "max_completion_length": 4})
    trainer, drawn = rounds(config)
    assert trainer.made.tokenizer.decode(drawn.samples[0].tokens[drawn.samples[0].start :]) == "d<|im_end|>"
    assert config.objective.remarks(trainer.rows_read) == [
        "objective.on_policy: 1 of 1 rows have several answers, of which the last is learnt"
    ]


# ---------------------------------------------------------------------------- teachers


def test_a_run_with_an_adapter_teaches_what_it_learnt(distilled, settings):
    """Its best checkpoint with its LoRA: the probabilities are those of the run itself."""
    run = settings["output_dir"] + "-teacher"
    adapted = {"trainable": {"r": 4}, "output_dir": run, "max_steps": 20}
    result = train(configure(settings, adapted, method="lora"), QUIET)
    made = assemble(distilled(teacher=run))
    batch = batch_of(made)
    opened, _ = restore(result.folder)
    with torch.no_grad():
        wanted = opened.network.hidden(batch)
        base = assemble(distilled(teacher=str(settings["model"]))).teacher.network.hidden(batch)
    torch.testing.assert_close(made.objective.prepare(made.network, batch).token_fields["teacher_states"], wanted)
    assert (wanted - base).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["model", "lora", "full"])
@pytest.mark.parametrize("precision", ["nf4", "int8", "fp8"])
def test_a_teacher_in_fewer_bits(distilled, settings, teacher, precision, method):
    name = str(teacher)
    if method != "model":
        name = settings["output_dir"] + "-teacher"
        train(configure(settings, {"output_dir": name, "max_steps": 2}, method=method), QUIET)
    plain, stored = (
        assemble(distilled(teacher={"name": name, "precision": p})) for p in ("as_loaded", precision)
    )  # fmt: skip
    batch = batch_of(plain)
    one, other = (m.objective.prepare(m.network, batch).token_fields["teacher_states"] for m in (plain, stored))
    apart = (one - other).norm() / one.norm()
    assert 1e-4 < apart < (0.35 if precision == "nf4" else 0.1)
    layers = [type(m).__name__ for m in stored.teacher.network.modules()]
    assert layers.count({"nf4": "NF4Linear", "int8": "Int8Linear", "fp8": "FP8Linear"}[precision]) >= 14
    assert all(p.dtype == torch.float32 for p in stored.parameters().values()), "the student is as it was"
    loss = stored.objective(stored.network, stored.objective.prepare(stored.network, batch))
    loss.total.backward()
    assert loss.total.isfinite()


def test_a_teacher_of_another_family(distilled, tmp_path):
    """Gemma's hidden states go through its own head; a family that cannot be packed runs padded, and it is said."""
    told = []
    made = assemble(distilled(teacher=str(save_model(tmp_path / "gemma", "gemma3"))), told.append)
    batch = batch_of(made)
    loss = made.objective(made.network, made.objective.prepare(made.network, batch))
    assert loss.total.isfinite()
    padded = assemble(distilled({"model": {"attention": "padded"}}, teacher=str(tmp_path / "gemma")))
    assert not padded.teacher.network.packed
    assert made.teacher.network.packed
    torch.testing.assert_close(padded.objective(padded.network, padded.objective.prepare(padded.network, batch)).total,
                               loss.total, rtol=1e-4, atol=1e-4)  # fmt: skip


def test_a_wider_output_of_the_same_vocabulary(distilled, tmp_path):
    """Rows of an output layer that stand for no token, as larger models of a family have: their mass is not missed."""
    model = make_model()
    model.resize_token_embeddings(384, mean_resizing=False)
    model.save_pretrained(tmp_path / "wider")
    make_tokenizer().save_pretrained(tmp_path / "wider")
    made = assemble(distilled(teacher=str(tmp_path / "wider"), alpha=0.0))
    assert made.teacher.width == 320
    batch = batch_of(made)
    loss = made.objective(made.network, made.objective.prepare(made.network, batch))
    assert loss.total.item() == pytest.approx(0, abs=1e-4), "the student is the same network"


# ---------------------------------------------------------------------------- other vocabularies


def other_tokenizer(folder, texts, size: int = 300):
    """Byte-level BPE with merges, so that its tokens are longer and its numbers others."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>", "<|im_start|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", bos_token="<s>",
                                   clean_up_tokenization_spaces=False)  # fmt: skip
    fast.save_pretrained(folder)
    return fast


TEXT = "one three seven ab user assistant ünïté of the rest"


def test_vocabularies_are_told_apart(tmp_path):
    own = make_tokenizer()
    assert difference(own, make_tokenizer()) is None
    more = make_tokenizer()
    more.add_tokens(["<tool>"])
    assert difference(own, more) is None, "what the student has is all there"
    assert "'<tool>', 259 of the student, is not there (1 of 260" in difference(more, own)
    assert "of the student, is " in difference(own, other_tokenizer(tmp_path / "o", [TEXT] * 9))


def test_a_text_is_read_in_other_tokens(tmp_path):
    """Places are compared where both vocabularies have a border, and there the text read is the same."""
    own, theirs = make_tokenizer(), other_tokenizer(tmp_path / "o", [TEXT] * 9)
    text = "<|im_start|>user\nthe rest, ünïté<|im_end|>\n<|im_start|>assistant\nab"
    tokens = own(text, add_special_tokens=False).input_ids
    made = Translation.of(own, theirs, torch.device("cpu"))
    batch = Batch(torch.tensor(tokens * 2), torch.arange(len(tokens)).repeat(2), (0, len(tokens), 2 * len(tokens)),
                  torch.tensor(tokens * 2), torch.ones(2 * len(tokens)), torch.arange(2 * len(tokens)))  # fmt: skip
    read, at = made.read(batch)
    assert read.ends[-1] < len(batch), "its tokens are longer"
    assert read.tokens.tolist()[: read.ends[1]] == read.tokens.tolist()[read.ends[1] :]
    eos = theirs.eos_token_id
    assert eos in read.tokens.tolist(), "the end of a turn is its end of text"
    assert theirs.convert_tokens_to_ids("<|im_start|>") in read.tokens.tolist()
    borders = 0
    for i, place in enumerate(at.tolist()[: len(tokens)]):
        mine = own.decode(tokens[: i + 1]).replace("<|im_end|>", "</s>")
        if place >= 0:
            assert theirs.decode(read.tokens[: place + 1].tolist()) == mine
            borders += 1
    whole = {theirs.decode(read.tokens[: n + 1].tolist()) for n in range(read.ends[1])}
    read_so_far = [own.decode(tokens[: i + 1]).replace("<|im_end|>", "</s>") for i in range(len(tokens))]
    assert borders == sum(text in whole for text in read_so_far)
    assert 0 < borders < len(tokens)
    assert at.tolist()[len(tokens) :] == [p + read.ends[1] if p >= 0 else -1 for p in at.tolist()[: len(tokens)]]
    for mine, other in zip(made.own.tolist(), made.theirs.tolist()):
        one, two = own.decode([mine]), theirs.decode([other])
        assert one == two or (mine, other) == (own.eos_token_id, eos)


def test_bytes_that_are_no_text_end_the_reading(tmp_path):
    own, theirs = make_tokenizer(), other_tokenizer(tmp_path / "o", [TEXT] * 9)
    good = own("ab", add_special_tokens=False).input_ids
    broken = own("é", add_special_tokens=False).input_ids[:1]  # half a character, then a letter
    tokens = [*good, *broken, *good]
    batch = Batch(torch.tensor(tokens), torch.arange(5), (0, 5), torch.tensor(tokens), torch.ones(5), torch.arange(5))
    read, at = Translation.of(own, theirs, torch.device("cpu")).read(batch)
    assert theirs.decode(read.tokens.tolist()) == "ab"
    assert at.tolist()[1:] == [len(read) - 1, -1, -1, -1]


def test_sentencepiece_and_byte_level_pieces_are_the_same_bytes():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = {"<unk>": 0, "<0x61>": 1, "a": 2, "\u2581the": 3, "é": 4}
    made = Tokenizer(models.BPE(pieces, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    found = Pieces.read(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"))
    assert found.of == {1: b"a", 2: b"a", 3: b" the", 4: "é".encode()}
    assert found.numbers[b"a"] == 2, "a token of its own before a byte that stands in"
    assert found.numbers[b" the"] == 3
    bytes_ = Pieces.read(make_tokenizer())
    assert {bytes_.of[i] for i in bytes_.of} == {bytes([b]) for b in range(256)}
    made.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="neither byte-level nor SentencePiece"):
        Pieces.read(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"))


def test_another_vocabulary_is_refused_or_aligned(distilled, settings, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "other"
    texts = [f"{r['prompt']} {r['completion']}" for r in ROWS]
    other_tokenizer(folder, [*texts, TEXT] * 5, 320)
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"has another vocabulary: .* of the student, is .*objective.vocabulary=align"):
        assemble(distilled(teacher=str(folder)))
    made = assemble(distilled(teacher=str(folder), vocabulary="align"))
    batch = batch_of(made)
    whole, parts = gradients(made, batch, 10_000), gradients(made, batch, 1)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-6)
    result = train(distilled({"max_steps": 40}, teacher=str(folder), vocabulary="align", alpha=0.0), QUIET)
    taken = [r for r in records(result.folder / "metrics.jsonl") if r["kind"] == "train"]
    assert 0.3 < taken[0]["aligned"] < 1
    assert taken[-1]["kl"] < 0.5 * taken[0]["kl"]
    with pytest.raises(ModelError, match="has the student's vocabulary: leave it out"):
        assemble(distilled(vocabulary="align"))


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ({"teacher": None}, "objective.teacher: required, and not given"),
        ({"teacher": "/no/such/folder"}, "objective.teacher: '/no/such/folder' does not exist"),
        ({"temperature": 0.0}, "objective.temperature=0.0: should be greater than 0"),
        ({"alpha": 1.0}, "objective.alpha=1.0: should be less than 1"),
        ({"beta": 0.2}, "objective.beta=0.2 with objective.divergence=forward_kl, which has none"),
        ({"divergence": "jsd", "beta": 0.0}, "objective.beta=0.0: should be greater than 0"),
        ({"divergence": "kl"}, "objective.divergence='kl': should be 'forward_kl', 'reverse_kl' or 'jsd'"),
        ({"top_k": 0}, "objective.top_k=0: should be greater"),
        ({"top_k": 4, "hidden_states": {}}, "top_k=4 keeps the teacher's likeliest tokens, not its layers"),
        ({"top_k": 4, "vocabulary": "align"}, "top_k=4 keeps tokens of the student's, and objective.vocabulary=align"),
        ({"hidden_states": {}, "vocabulary": "align"}, "objective.hidden_states compares token by token"),
        ({"hidden_states": {"weight": 0.0}}, "objective.hidden_states.weight=0.0: should be greater than 0"),
        ({"kd_ratio": 0.5}, "objective.kd_ratio: unknown key; did you mean 'objective.alpha'"),
        ({"teacher_model": "x"}, "objective.teacher_model: unknown key; did you mean 'objective.teacher'?"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(distilled, objective, told):
    with pytest.raises(ConfigError) as caught:
        distilled(**objective)
    assert told in str(caught.value)


def test_teachers_that_cannot_teach(distilled, settings, tmp_path):
    folder = tmp_path / "classifier"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForSequenceClassification"]}))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="is a LlamaForSequenceClassification, which gives no scores of the next"):
        distilled(teacher=str(folder))
    with pytest.raises(ConfigError, match=r"objective\.top_k=4 computes something for every row before the first step"):
        distilled({"data": {"streaming": True, "validation": None}}, top_k=4)
    config = distilled({"max_steps": 1})
    train(config, QUIET)
    with pytest.raises(ConfigError, match="is the folder of this run: give another output_dir"):
        distilled(teacher=settings["output_dir"])
    with pytest.raises(ConfigError, match="is a run: leave it out"):
        distilled({"output_dir": str(tmp_path / "x")}, teacher={"name": settings["output_dir"], "revision": "main"})
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_it_is_told_beforehand(distilled, settings, teacher):
    """A teacher counts among the weights, a run that is one, too; nothing is loaded."""
    alone = explain(configure(settings, method="full"))
    taught = explain(distilled(hidden_states={}))
    size = sum(p.numel() * 4 for p in assemble(distilled()).teacher.network.parameters())
    assert taught.memory.weights - alone.memory.weights == size
    assert taught.work.forward > alone.work.forward
    drawn = explain(distilled(on_policy={"max_completion_length": 8}))
    assert drawn.memory.weights == alone.memory.weights + size
    kept = explain(distilled(top_k=8))
    assert kept.memory.weights == alone.memory.weights, "the teacher is gone when training begins"
    run = settings["output_dir"] + "-teacher"
    train(configure(settings, {"output_dir": run, "max_steps": 1}, method="lora"), QUIET)
    plain, stored = (explain(distilled(teacher={"name": run, "precision": p})) for p in (None, "nf4"))
    in_blocks = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3)  # 4 bits, scales and codes instead of 32
    assert in_blocks * 2.3 < plain.memory.weights - stored.memory.weights < in_blocks * 3.5


# ---------------------------------------------------------------------------- a teacher that has gone


@pytest.fixture
def moved(distilled, teacher, tmp_path):
    """A finished run whose teacher is no longer where it was; beside it stands one that was stopped."""
    import shutil

    place = shutil.copytree(teacher, tmp_path / "teacher")
    result = train(distilled({"checkpoint": {"every": 2}}, teacher=str(place), hidden_states={}), QUIET)
    parted = distilled({"checkpoint": {"every": 2}, "output_dir": str(tmp_path / "parted")}, teacher=str(place))
    for step in steps(parted, QUIET):
        if step.step == 3:
            break
    place.rename(tmp_path / "elsewhere")
    return result


def test_a_run_is_asked_and_exported_without_its_teacher(moved, capsys, tmp_path):
    result = moved
    assert result.chat().ask("one 1", max_new_tokens=3)
    assert main(["generate", str(result.folder), "one 1", "--max-new-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["prompt"] == "one 1"
    found = result.export(tmp_path / "out", "full")
    assert found["largest_difference"] < 1e-3


def test_a_run_is_measured_without_its_teacher_but_for_figures_beside_it(moved, capsys, tmp_path):
    """The others are those that were measured with it; what is left out is told once."""
    result = moved
    assert main(["evaluate", str(result.folder), "--json"]) == 0
    told = capsys.readouterr()
    figures = json.loads(told.out)["figures"]
    for name in ("loss", "perplexity", "bits_per_byte", "token_accuracy"):
        for side in ("base", "tuned"):
            assert figures[name][side] == pytest.approx(result.report["figures"][name][side], rel=1e-5), name
    assert {"kl", "agreement"} <= result.report["figures"].keys()
    assert not {"kl", "agreement"} & figures.keys()
    words = " ".join(told.err.split())
    assert "objective.teacher cannot be loaded, so there are no figures beside it" in words
    assert str(tmp_path / "teacher") in words.replace(" ", "")
    (tmp_path / "elsewhere").rename(tmp_path / "teacher")
    assert main(["evaluate", str(result.folder), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["figures"]
    for side in ("base", "tuned"):
        assert again["kl"][side] == pytest.approx(result.report["figures"]["kl"][side], rel=1e-4)


@pytest.mark.usefixtures("moved")
def test_training_does_not_go_on_without_the_teacher(capsys, tmp_path):
    """Told from the configuration, before anything is loaded; with the teacher back in its place the run ends."""
    path = tmp_path / "parted" / "config.yaml"
    assert main(["train", str(path)]) == ConfigError.exit_code
    told = " ".join(capsys.readouterr().err.split())
    assert "objective.teacher: " in told
    assert "does not exist; training needs it" in told
    (tmp_path / "elsewhere").rename(tmp_path / "teacher")
    assert train(configure(path), QUIET).report["steps"] == 6


def test_a_run_outlives_the_rows_that_it_learnt(settings, capsys, rows_file):
    result = train(configure(settings, {"max_steps": 1}, method="lora"), QUIET)
    rows_file.rename(rows_file.with_name("elsewhere.jsonl"))
    assert result.chat().ask("one 1", max_new_tokens=2)
    assert result.export(rows_file.parent / "out", "merged")["largest_difference"] < 1e-3
    assert main(["evaluate", str(result.folder)]) == ConfigError.exit_code
    assert "does not exist; name rows to measure on with --data" in " ".join(capsys.readouterr().err.split())
    elsewhere = str(rows_file.with_name("elsewhere.jsonl"))
    assert main(["evaluate", str(result.folder), "--data", elsewhere, "--json"]) == 0
    assert "loss" in json.loads(capsys.readouterr().out)["figures"]
    with pytest.raises(ConfigError, match=r"data\.train: .*does not exist"):
        configure(result.folder / "config.yaml")
