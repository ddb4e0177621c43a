"""Reward models: the loss by hand and TRL's, what changes no number, kill and resume, others load it, rewards by it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, VOCABULARY, make_model, make_tokenizer, write_rows
from test_ranks import run_on_two
from test_train import QUIET, finished, in_two_parts

from luthier import configure, explain, reward_models, train
from luthier.batch import Batch
from luthier.data import kinds
from luthier.data.formats import FORMATS
from luthier.data.masks import Renderer
from luthier.document import Document
from luthier.errors import ConfigError, ModelError, RewardError
from luthier.models import heads, network, trials
from luthier.monitor import records
from luthier.objectives import BradleyTerry
from luthier.objectives.bradley_terry import bradley_terry, centring, won
from luthier.parallel import Parallel
from luthier.parallel.ranks import Ranks
from luthier.rewards import Completed, RewardModel
from luthier.train import Trainer

PAIRS = [
    {"prompt": f"{word} {n}", "chosen": f"{n} {word[::-1]}", "rejected": f"{word} {n} {n}"}
    for n in range(8)
    for word in ("one", "three", "seven", "ab")
]


@pytest.fixture
def pairs(settings, tmp_path) -> dict:
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    return settings | {"data": settings["data"] | {"train": str(path)}, "batch": {"examples": 4, "micro_tokens": 256}}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------------------- the loss


def test_the_loss_by_hand():
    """Scores 2 and 1, then -1 and 1: differences 1 and -2, so -log s(1) and -log s(-2).

    With margins 0.5 and 0: -log s(0.5) and -log s(-2). Centred: (2 + 1)^2 = 9 and (-1 + 1)^2 = 0. At equal scores
    log 2, whatever they are, and a pair that counts one half.
    """
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    wanted = [-math.log(sigmoid(1)), -math.log(sigmoid(-2))]
    torch.testing.assert_close(bradley_terry(chosen, rejected), torch.tensor(wanted))
    wanted[0] = -math.log(sigmoid(0.5))
    torch.testing.assert_close(bradley_terry(chosen, rejected, torch.tensor([0.5, 0.0])), torch.tensor(wanted))
    assert centring(chosen, rejected).tolist() == [9.0, 0.0]
    assert won(chosen, rejected).tolist() == [1.0, 0.0]
    assert won(chosen, chosen).tolist() == [0.5, 0.5]
    torch.testing.assert_close(bradley_terry(chosen, chosen), torch.full((2,), math.log(2)))


class Scored:
    """A network whose scores of documents are given."""

    def __init__(self, *scores: float):
        self.values = torch.tensor(scores, requires_grad=True)

    def scores(self, batch: Batch) -> torch.Tensor:
        return self.values[:, None]


def batch_of(count: int, **fields) -> Batch:
    documents = [Document(np.arange(6, dtype=np.int32), np.zeros(6, np.float32), i, (0, 3)) for i in range(count)]
    batch = Batch.pack(documents)
    return Batch(**{**vars(batch), "fields": fields})


def test_sums_gradients_and_what_is_told():
    """The derivative of -log s(c - r - m) by c is -(1 - s(c - r - m)), and of k (c + r)^2 it is 2 k (c + r).

    Filling a batch up adds a document, with a score of its own that counts for nothing.
    """
    net = Scored(2.0, 1.0, -1.0, 1.0, 99.0)
    batch = batch_of(2, labels=torch.tensor([[0.5], [0.0]])).padded_to(20)
    objective = BradleyTerry(center_rewards_coefficient=0.1).build()
    loss = objective(net, batch)
    assert loss.total.item() == pytest.approx(-math.log(sigmoid(0.5)) - math.log(sigmoid(-2)) + 0.9)
    assert loss.count == 2
    told = {name: value.item() for name, value in loss.metrics.items()}
    assert tuple(told) == objective.metrics
    assert told == {"rewards/chosen": 1.0, "rewards/rejected": 2.0, "rewards/margins": -1.0, "rewards/accuracies": 1.0}
    loss.total.backward()
    wrong = [1 - sigmoid(0.5), 1 - sigmoid(-2)]
    wanted = [-wrong[0] + 0.6, wrong[0] + 0.6, -wrong[1], wrong[1], 0.0]
    torch.testing.assert_close(net.values.grad, torch.tensor(wanted))
    each = objective.evaluate(net, batch)
    assert each.total.sum().item() == pytest.approx(loss.total.item())
    assert each.metrics["rewards/accuracies"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("centre", [None, 0.01])
@pytest.mark.parametrize("margin", [False, True])
def test_the_loss_is_trls_on_the_same_tensors(centre, margin):
    """TRL's own trainer computes its loss of a whole model; ours of the same model's scores. Gradients, too."""
    from trl.trainer.reward_trainer import RewardTrainer

    rng = np.random.default_rng(0)
    rows = [[rng.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths] for lengths in ((9, 4), (5, 12), (7, 7))]
    margins = torch.tensor([0.5, 0.0, 2.0])
    ours, theirs = network_of("llama"), network_of("llama").model
    theirs.set_attn_implementation("sdpa")
    documents = []
    for i, (row, m) in enumerate(zip(rows, margins.tolist())):
        nothing, labels = np.zeros(sum(map(len, row)), np.float32), (m,) if margin else ()
        documents.append(Document(np.concatenate(row), nothing, i, (0, len(row[0])), labels))
    loss = BradleyTerry(center_rewards_coefficient=centre).build()(ours, Batch.pack(documents))
    texts = [row[0] for row in rows] + [row[1] for row in rows]
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = torch.from_numpy(text.astype(np.int64)), 1
    trainer = trl_trainer(RewardTrainer, theirs, centre)
    inputs = {"input_ids": ids, "attention_mask": mask} | ({"margin": margins} if margin else {})
    wanted = trainer.compute_loss(theirs, inputs)
    torch.testing.assert_close(loss.total / loss.count, wanted, rtol=1e-5, atol=1e-6)
    told = {name: value.item() / 3 for name, value in loss.metrics.items()}
    assert told["rewards/accuracies"] == pytest.approx(trainer._metrics["eval"]["accuracy"][0])
    assert told["rewards/margins"] == pytest.approx(trainer._metrics["eval"]["margin"][0], abs=1e-5)
    mean = (told["rewards/chosen"] + told["rewards/rejected"]) / 2
    assert mean == pytest.approx(trainer._metrics["eval"]["mean_reward"][0], abs=1e-5)
    (loss.total / loss.count).backward()
    wanted.backward()
    for (name, p), q in zip(ours.model.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def trl_trainer(cls, model, centre):
    """TRL's trainer with what its loss reads, and nothing else."""
    from collections import defaultdict

    trainer = object.__new__(cls)
    alone = SimpleNamespace(gather=lambda t: t, gather_for_metrics=lambda t: t)
    trainer.model, trainer.accelerator, trainer._total_train_tokens, trainer._tp_size = model, alone, 0, 1
    trainer.args = SimpleNamespace(center_rewards_coefficient=centre)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    return trainer


def network_of(family: str) -> network.Network:
    """A small model that ends in one score, packed where its family can be."""
    base = make_model(family)
    base.config.pad_token_id = base.config.get_text_config().pad_token_id = 0
    model = heads.on_base(base, heads.Ending("text", ("reward",), "regression"), seed=0)
    net = network.Network(model, "text").eval()
    trials.find_scores(net)
    trials.prepare(net, "auto")
    return net


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_pairs_have_the_scores_of_each_text_alone(family):
    net = network_of(family)
    documents = [
        Document(np.arange(n, dtype=np.int32) * 7 % 300 + 3, np.zeros(n, np.float32), i, (0, n // 2))
        for i, n in enumerate((9, 14, 21))
    ]
    with torch.no_grad():
        together = net.scores(Batch.pack(documents))[:, 0]
        alone = [net.scores(Batch.pack([member]))[0, 0] for d in documents for member in d.members]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- rows


def test_a_pair_is_two_whole_conversations():
    tokenizer = make_tokenizer()
    renderer = Renderer(tokenizer, "all", 64, kind="whole_pairs")
    row = {"prompt": "hi", "chosen": "good", "rejected": "no"}
    made = kinds.render(renderer, FORMATS["preference"].convert(row))
    ((document,),) = renderer.documents([(0, made)])
    texts = [tokenizer.decode(member.tokens) for member in document.members]
    assert texts == [f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>" for a in ("good", "no")]
    assert not document.weights.any()
    assert document.inputs == len(document.tokens), "all of both is run, the ends of turns included"


def test_a_pair_that_is_too_long_is_a_bad_row():
    renderer = Renderer(make_tokenizer(), "all", 64, kind="whole_pairs")
    row = {"prompt": "hi", "chosen": "good" * 20, "rejected": "no"}
    made = kinds.render(renderer, FORMATS["preference"].convert(row))
    (fault,) = renderer.documents([(0, made)])
    assert fault.kind == "truncated"


# ---------------------------------------------------------------------------- runs


def trained(pairs, **extra):
    return configure(pairs, {"max_steps": 4, "checkpoint": {"every": 2}}, extra, method="reward")


def losses(folder) -> list:
    return [r["loss"] for r in records(folder / "metrics.jsonl") if r["kind"] == "train"]


@pytest.mark.parametrize(
    "other",
    [{"batch": {"micro_tokens": 64}}, {"batch": {"packing": False}}, {"parallel": {"activation_checkpointing": 1}}],
    ids=["micro-batches", "padded", "recomputed"],
)
def test_what_changes_no_number(pairs, tmp_path, other):
    train(trained(pairs), QUIET)
    train(trained(pairs, **other, output_dir=str(tmp_path / "other")), QUIET)
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "run"), rel=1e-4)
    told = [[r["rewards/margins"] for r in records(tmp_path / name / "metrics.jsonl") if r["kind"] == "train"]
            for name in ("run", "other")]  # fmt: skip
    assert told[0] == pytest.approx(told[1], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_stopped_and_resumed_ends_with_the_same_bytes(pairs, tmp_path, kind):
    extra = {"trainable": {"kind": kind}, "objective": {"center_rewards_coefficient": 0.01}}
    train(trained(pairs, **extra), QUIET)
    parted = trained(pairs, **extra, output_dir=str(tmp_path / "parted"))
    in_two_parts(parted, 3)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")


def test_a_run_learns_and_says_how_well(pairs):
    result = train(trained(pairs, max_steps=24, evaluation={"every": 12}), QUIET)
    figures = result.report["figures"]
    assert figures["rewards/accuracies"]["tuned"] == 1.0
    low, high = figures["rewards/accuracies"]["tuned_interval"]
    assert 0 < low < high == 1.0
    assert figures["loss"]["tuned"] < 0.3
    assert figures["rewards/margins"]["tuned"] > 1
    assert {"rewards/chosen", "rewards/rejected"} <= set(figures)


def test_settings_that_make_no_sense_are_refused(pairs):
    with pytest.raises(ConfigError, match=r"objective.center_rewards_coefficient=0"):
        trained(pairs, objective={"center_rewards_coefficient": 0})
    with pytest.raises(ConfigError, match="did you mean 'center_rewards_coefficient'"):
        trained(pairs, objective={"center_reward_coefficient": 0.1})
    with pytest.raises(ConfigError, match=r"data.format=alpaca is not for method=reward: use auto, .*preference"):
        trained(pairs, data={"format": "alpaca"})
    with pytest.raises(ConfigError, match=r"reward_model: unknown key; did you mean 'objective.rewards'"):
        trained(pairs, reward_model="x")


# ---------------------------------------------------------------------------- as a reward


def asked(row: int, completion: str, truncated: bool = False) -> Completed:
    pair = PAIRS[row]
    messages = [{"role": "user", "content": pair["prompt"]}]
    return Completed(pair["prompt"], messages, completion, {}, len(completion), truncated, row)


def test_a_run_is_a_reward(pairs, tmp_path):
    """The scores of a run as a reward are those of its evaluation, and empty answers have one, too."""
    result = train(trained(pairs, max_steps=12), QUIET)
    before = torch.random.get_rng_state()
    reward = reward_models.loader(Ranks(Parallel(device="cpu")))(RewardModel(model=str(result.folder), batch_size=5))
    assert torch.equal(before, torch.random.get_rng_state())
    rows = list(range(len(PAIRS)))
    better = reward([asked(i, PAIRS[i]["chosen"]) for i in rows])
    worse = reward([asked(i, PAIRS[i]["rejected"]) for i in rows])
    net, renderer = reward_models.opened(str(result.folder), Ranks(Parallel(device="cpu")), print)
    documents = [renderer.documents([(0, kinds.render(renderer, FORMATS["preference"].convert(row)))])[0][0]
                 for row in PAIRS]  # fmt: skip
    with torch.no_grad():
        wanted = net.scores(Batch.pack(documents))[:, 0].view(-1, 2)
    torch.testing.assert_close(torch.tensor([better, worse]).T, wanted, rtol=1e-4, atol=1e-5)
    assert np.mean(np.array(better) > np.array(worse)) > 0.9
    assert np.isfinite(reward([asked(0, "")])).all()
    judge = reward_models.Judge(net, renderer)
    assert renderer.tokenizer.decode(judge.tokens(asked(0, "x"))).endswith("assistant\nx<|im_end|>")
    assert renderer.tokenizer.decode(judge.tokens(asked(0, "x", truncated=True))).endswith("assistant\nx")
    judge.longest = 20
    with pytest.raises(RewardError, match=r"row 3: prompt and answer have .* more than the 20 positions"):
        judge.scores([asked(3, "x" * 20)])


def test_a_saved_classifier_is_a_reward(tmp_path):
    """Scores are those of transformers' own model on the conversation."""
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = network_of("llama").model, make_tokenizer()
    model.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    reward = reward_models.loader(Ranks(Parallel(device="cpu")))(RewardModel(model=str(tmp_path / "classifier")))
    found = reward([asked(0, "yes"), asked(1, "no, not at all")])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    assert theirs.config.num_labels == 1
    for score, one in zip(found, (asked(0, "yes"), asked(1, "no, not at all"))):
        text = f"<|im_start|>user\n{one.prompt}<|im_end|>\n<|im_start|>assistant\n{one.completion}<|im_end|>"
        with torch.no_grad():
            wanted = theirs(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0].item()
        assert score == pytest.approx(wanted, rel=1e-4)


def test_what_is_no_reward_model_is_refused(tiny_model, settings):
    load = reward_models.loader(Ranks(Parallel(device="cpu")))
    with pytest.raises(ModelError, match=r"it is no sequence classifier with one score, and would get a new head"):
        load(RewardModel(model=str(tiny_model)))
    with pytest.raises(ModelError, match=r"objective.rewards: model='no/such'"):
        load(RewardModel(model="no/such"))
    result = train(configure(settings, {"max_steps": 1}, method="lora"), QUIET)
    with pytest.raises(ModelError, match=r"it is a run of objective.kind=next_token"):
        load(RewardModel(model=str(result.folder)))


def test_what_is_exported_scores_as_the_run(pairs, tmp_path):
    """Merged, it is a sequence classifier with one label that transformers loads by itself; the adapter is PEFT's."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    result = train(trained(pairs, max_steps=8), QUIET)
    result.export(tmp_path / "merged", "merged")
    result.export(tmp_path / "adapter", "adapter")
    load = reward_models.loader(Ranks(Parallel(device="cpu")))
    answers = [asked(0, "yes"), asked(1, "no, not at all"), asked(2, PAIRS[2]["chosen"])]
    wanted = load(RewardModel(model=str(result.folder)))(answers)
    assert load(RewardModel(model=str(tmp_path / "merged")))(answers) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert (merged.config.num_labels, merged.config.id2label) == (1, {0: "reward"})
    base = AutoModelForSequenceClassification.from_pretrained(pairs["model"], num_labels=1, pad_token_id=0)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for score, one in zip(wanted, answers):
        text = f"<|im_start|>user\n{one.prompt}<|im_end|>\n<|im_start|>assistant\n{one.completion}<|im_end|>"
        tokens = torch.tensor([make_tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            assert merged(tokens).logits[0, 0].item() == pytest.approx(score, rel=1e-4, abs=1e-6)
            assert adapted(tokens).logits[0, 0].item() == pytest.approx(score, rel=1e-4, abs=1e-6)


def test_two_ranks_learn_what_one_learns(pairs, tmp_path):
    train(trained(pairs, max_steps=2), QUIET)
    both = trained(pairs, max_steps=2, output_dir=str(tmp_path / "two")).model_dump(mode="json")
    assert run_on_two(both) == [0, 0]
    one, two = ([(r["kind"], r["step"], r["loss"], r["rewards/accuracies"]) for r in records(folder / "metrics.jsonl")]
                for folder in (tmp_path / "run", tmp_path / "two"))  # fmt: skip
    assert [row[:2] for row in one] == [row[:2] for row in two]
    assert [row[2:] for row in one] == [pytest.approx(row[2:], rel=1e-4) for row in two]


def test_it_is_explained_beforehand(pairs):
    """What it says without a weight is so: what moves, the head among it, and tokens of both members of each pair."""
    config = trained(pairs)
    found = explain(config)
    run = Trainer(config, QUIET)
    assert sum(moving.trainable for moving in found.moving) == sum(p.numel() for p in run.parameters.values())
    assert any("score" in moving.name for moving in found.moving)
    rows = [run.training.lengths[d] for row in run.steps[0] for d in row]
    assert min(rows) > 2 * len("<|im_start|>user"), "both conversations are in a row's length"
    assert found.memory.peak > 0
