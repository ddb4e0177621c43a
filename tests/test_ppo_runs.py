"""Runs of PPO: the start, invariance, kill and resume inside a round, ranks, learning, critics, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_ranks import two_ranks
from test_train import QUIET, finished, in_two_parts, killed

from luthier.config import configure
from luthier.errors import LuthierError
from luthier.explain import explain
from luthier.monitor import Console, records
from luthier.train import Trainer, steps, train


def letters(prompt: str, completion: str, **columns) -> float:
    """The share of characters from a to z, which a model of bytes learns to write within seconds."""
    return sum("a" <= c <= "z" for c in completion) / max(1, len(completion))


REWARDS = {"letters": letters}


@pytest.fixture
def settings(settings, tmp_path) -> dict:
    """Prompts, and nothing else that is known of them."""
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{word} {n}"}) + "\n" for n in range(8) for word in ("one", "two")))
    return settings | {"data": {"train": str(rows), "max_length": 64}}


def config_of(settings: dict, *extra: dict, **objective):
    base = {
        "batch": {"examples": 4, "micro_tokens": 128}, "max_steps": 8,
        "objective": {"max_completion_length": 8, "num_mini_batches": 2, "num_ppo_epochs": 2, **objective},
    }  # fmt: skip
    return configure(settings, base, *extra, method="ppo")


@pytest.mark.parametrize("method", [{"kind": "lora"}, {"kind": "full"}], ids=lambda m: m["kind"])
def test_the_first_step_is_at_the_policy_that_answered(settings, method):
    """What begins as the base is the reference: KL 0; the answers' own policy: ratio 1, nothing clipped, values 0."""
    first, *_, last = steps(config_of(settings, {"trainable": method}), QUIET, REWARDS)
    m = first.metrics
    assert (m["kl"], m["policy/clipfrac"], m["val/clipfrac"]) == (0, 0, 0)
    assert m["ratio"] == pytest.approx(1, abs=1e-5)
    assert m["policy/approxkl"] == pytest.approx(0, abs=1e-6)
    assert m["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert last.metrics["policy/approxkl"] > 0
    assert last.metrics["kl"] != 0


def told(settings, name: str, *extra: dict, **objective) -> list:
    config = config_of(settings, *extra, {"output_dir": str(settings["output_dir"]) + name}, **objective)
    return list(steps(config, QUIET, REWARDS))


TIMES = ("rollout_seconds", "rollout_tokens_per_second")


@pytest.mark.parametrize("other", [{"micro_tokens": 64}, {"packing": False}], ids=["micro", "padded"])
def test_micro_batches_and_packing_change_nothing(settings, other):
    """Two rounds of answers, the second by a network that has moved; answers, figures, losses and gradients."""
    objective = {"kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.1, "entropy_coef": 0.01}
    one = told(settings, "one", {"batch": {"micro_tokens": 1024}}, **objective)
    two = told(settings, "two", {"batch": {"micro_tokens": 1024, **other}}, **objective)
    assert len(one) == len(two) == 8
    for a, b in zip(one, two):
        assert a.loss == pytest.approx(b.loss, rel=1e-3, abs=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3, abs=1e-5)
        first, second = ({k: v for k, v in s.metrics.items() if k not in TIMES} for s in (a, b))
        assert first == pytest.approx(second, rel=1e-2, abs=1e-4)


CONTROLLED = {"adaptive_kl": {"target": 0.1, "horizon": 20}, "target_kl": 1e-4, "num_ppo_epochs": 3}
def test_killed_inside_a_batch_of_rollouts_ends_with_the_same_bytes(settings, tmp_path):
    """A process that dies after step 8, the second of the second round; with a coefficient that follows the KL."""
    extra = {"checkpoint": {"every": 1, "keep": 1}, "max_steps": 14}
    whole = config_of(settings, extra, **CONTROLLED)
    train(whole, QUIET, rewards=REWARDS)
    config = config_of(settings, extra, {"output_dir": str(tmp_path / "killed")}, **CONTROLLED)

    def work():
        for step in steps(config, QUIET, REWARDS):
            if step.step == 8:
                os.kill(os.getpid(), signal.SIGKILL)

    killed(work)
    train(config, QUIET, rewards=REWARDS)
    assert finished(tmp_path / "run") == finished(tmp_path / "killed")
    one, two = (records(tmp_path / name / "metrics.jsonl") for name in ("run", "killed"))
    assert [(r["step"], r["loss"], r["kl_coef"]) for r in one if r["kind"] == "train"] == [
        (r["step"], r["loss"], r["kl_coef"]) for r in two if r["kind"] == "train"
    ]
    assert len({r["kl_coef"] for r in one if r["kind"] == "train"}) == 3, "the coefficient moved twice"


@pytest.mark.parametrize("at", [1, 2, 3, 5, 7])
def test_stopped_at_any_step_ends_with_the_same_bytes(settings, tmp_path, at):
    """Also between rounds, and where passes are left out."""
    extra = {"checkpoint": {"every": 1, "keep": 1}}
    train(config_of(settings, extra, **CONTROLLED), QUIET, rewards=REWARDS)
    config = config_of(settings, extra, {"output_dir": str(tmp_path / "parted")}, **CONTROLLED)
    in_two_parts(config, at, REWARDS)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")
    whole, parted = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("run", "parted"))
    assert whole["passes_left_out"] == parted["passes_left_out"] > 0


RANKED = """
import json, sys, torch
from luthier import configure, train
from luthier.monitor import Console
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_ppo_runs import REWARDS
train(configure(json.loads(sys.argv[1]), method="ppo"), Console(quiet=True), rewards=REWARDS)
"""


def test_two_ranks_learn_what_one_learns(settings, tmp_path):
    """Each answers half of the prompts; whitening and the KL's coefficient are of all answers."""
    objective = {"adaptive_kl": {"target": 0.1, "horizon": 20}, "whiten_rewards": True, "missing_eos_penalty": 0.5}
    train(config_of(settings, **objective), QUIET, rewards=REWARDS)
    both = config_of(settings, {"output_dir": str(tmp_path / "two")}, **objective).model_dump(mode="json")
    assert two_ranks(RANKED, both, str(Path(__file__).parent)) == [0, 0]
    history = (records(tmp_path / name / "metrics.jsonl") for name in ("run", "two"))
    one, two = ([r for r in each if r["kind"] == "train"] for each in history)
    assert len(one) == len(two) == 8
    for a, b in zip(one, two):
        for name in ("loss", "grad_norm", "reward", "score", "kl", "kl_coef", "policy/approxkl", "entropy", "tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), (a["step"], name)


def test_passes_are_left_out_once_the_policy_has_moved(settings):
    """Six steps a round, in three passes; with a small target the first pass alone is learnt, and half of it is at the
    policy that answered, so the second half is what tells."""
    taken = told(settings, "", {"max_steps": 12}, num_ppo_epochs=3, target_kl=1e-6)
    assert [s.step for s in taken] == [1, 2, 7, 8]
    taken = told(settings, "whole", {"max_steps": 12}, num_ppo_epochs=3, target_kl=1e6)
    assert [s.step for s in taken] == list(range(1, 13))


@pytest.mark.parametrize("most", [12, 10], ids=["whole", "cut"])
def test_passes_that_are_left_out_are_counted_and_told_once(settings, capsys, most):
    """Three passes of two steps: of each of two rounds two are left out; one of the second where max_steps ends the
    run after its second pass. Each round's record has its own number, the report the sum."""
    objective = {"num_ppo_epochs": 3, "target_kl": 1e-6}
    result = train(config_of(settings, {"max_steps": most}, **objective), Console(), rewards=REWARDS)
    last = 2 if most == 12 else 1
    history = [r for r in records(Path(settings["output_dir"]) / "metrics.jsonl") if r["kind"] == "train"]
    assert [(r["step"], r["passes_left_out"]) for r in history] == [(1, 0), (2, 2), (7, 0), (8, last)]
    assert result.report["passes_left_out"] == 2 + last
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("is above objective.target_kl=1e-06, so the passes after it") == told.count("left out") == 1
    assert "round 1, pass 1 of 3: policy/approxkl=" in told


def test_no_pass_is_left_out_below_the_target_or_after_the_last(settings):
    """Two passes, the second of which is what moves the policy away; and a target that is never reached."""
    for target in (1e6, None):
        extra = {"max_steps": 4, "output_dir": f"{settings['output_dir']}{target}"}
        result = train(config_of(settings, extra, target_kl=target), QUIET, rewards=REWARDS)
        assert result.report["passes_left_out"] == 0
        history = [r for r in records(result.folder / "metrics.jsonl") if r["kind"] == "train"]
        assert {r["passes_left_out"] for r in history} == {0}
    trainer = Trainer(config_of(settings, target_kl=1e-6), QUIET, rewards=REWARDS)
    assert trainer.steps[0]
    trainer.steps.seen(2, {"policy/approxkl": 1.0})  # in the second of two passes
    assert trainer.steps.counts["passes_left_out"] == 0


def test_it_learns(settings):
    """Every weight moves, 20 rounds of 32 answers: from about a sixth of letters to nearly all."""
    extra = {"trainable": {"kind": "full"}, "batch": {"examples": 16, "micro_tokens": 512}, "max_steps": 160,
             "epochs": 40}  # fmt: skip
    taken = told(settings, "", extra, num_ppo_epochs=4, max_completion_length=6, kl_coef=0.001)
    rewards = [s.metrics["reward"] for s in taken[::8]]
    assert sum(rewards[:2]) / 2 < 0.3
    assert sum(rewards[-2:]) / 2 > 0.8
    assert taken[-1].metrics["kl"] > 1


def test_the_head_alone_moves_where_it_is_detached(settings):
    """A value loss that weighs everything changes nothing of the network below a detached head."""
    found = {}
    for detach in (True, False):
        config = config_of(settings, {"output_dir": settings["output_dir"] + str(detach)}, vf_coef=1.0, kl_coef=0.0,
                           critic={"kind": "head", "detach": detach})  # fmt: skip
        trainer = Trainer(config, QUIET, rewards=REWARDS)
        made = trainer.made
        (row, *_) = trainer.steps[0]
        batch = trainer._batch(row)
        batch.token_fields["advantages"].zero_()
        made.objective(made.network, batch).total.backward()
        gradients = {n: float(p.grad.abs().max()) for n, p in trainer.parameters.items() if p.grad is not None}
        assert gradients.pop("objective.critic.value.bias") > 0
        assert gradients.pop("objective.critic.value.weight") > 0
        made.objective.critic.value.weight.data.fill_(0.1)  # at 0 nothing would reach the network
        made.objective(made.network, batch).total.backward()
        named = {n: p for n, p in trainer.parameters.items() if not n.startswith("objective.")}
        found[detach] = max(float(p.grad.abs().max()) for p in named.values() if p.grad is not None)
    assert found[True] < 1e-9
    assert found[False] > 1e-6


def bad(settings, problem: str, *extra: dict, **objective):
    with pytest.raises(LuthierError, match=problem):
        list(steps(config_of(settings, *extra, **objective), QUIET, REWARDS))


def test_settings_that_do_not_go_together(settings):
    bad(settings, "kl_estimator=k1 as a term of the loss", kl_in="loss")
    bad(settings, "adaptive_kl multiplies objective.kl_coef=0", kl_coef=0.0, adaptive_kl={})
    bad(settings, "target_kl=0.1 leaves out further passes", target_kl=0.1, num_ppo_epochs=1)
    for name, value in {
        "target_kl": 0.0, "cliprange": 0, "cliprange_value": 0.0, "vf_coef": 0, "gamma": 1.1, "lam": -0.1,
        "num_ppo_epochs": 0, "num_mini_batches": 0, "missing_eos_penalty": 0.0, "entropy_coef": -1, "kl_coef": -0.1,
        "kl_estimator": "k4", "kl_in": "both",
    }.items():  # fmt: skip
        bad(settings, f"objective.{name}", **{name: value})
    bad(settings, "objective.adaptive_kl.target", adaptive_kl={"target": 0})
    bad(settings, "objective.adaptive_kl.horizon", adaptive_kl={"horizon": 0})
    bad(settings, "did you mean 'cliprange'", cliprang=0.1)
    bad(settings, "did you mean 'objective.lam'", {"objective": {"gae_lambda": 0.9}})


def test_a_reward_that_is_no_number_names_its_row(settings):
    with pytest.raises(LuthierError, match=r"nan for row \d+"):
        list(steps(config_of(settings), QUIET, {"letters": lambda prompt, completion, **more: float("nan")}))


def test_answers_without_an_end_are_told(settings, capsys):
    """Answers of one token that is seldom a stop token: a warning with the remedy, and the penalty in the score."""
    config = config_of(settings, {"max_steps": 2}, max_completion_length=1, missing_eos_penalty=2.0)
    first, *_ = steps(config, Console(), REWARDS)
    assert first.metrics["truncated"] == 1
    assert first.metrics["score"] == pytest.approx(first.metrics["reward"] - 2)
    assert "objective.max_completion_length=1" in capsys.readouterr().err


# ---------------------------------------------------------------------------- a critic of its own


@pytest.fixture(scope="module")
def classifier(tiny_model, tmp_path_factory) -> Path:
    """A reward model of transformers: one score of the last token's state, with the policy's tokenizer."""
    from conftest import make_tokenizer
    from transformers import AutoConfig, LlamaForSequenceClassification

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(tiny_model, num_labels=1)
    config.pad_token_id = make_tokenizer().pad_token_id
    folder = tmp_path_factory.mktemp("reward_model")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_critic_of_its_own_begins_at_zero_and_alone_learns_values(settings, tiny_model):
    extra = {"max_steps": 2, "trainable": {"kind": "lora", "r": 4}}
    config = config_of(settings, extra, critic={"name": str(tiny_model), "trainable": {"kind": "full"}}, kl_coef=0.0)
    assert config.objective.critic.trainable["freeze"] == [], "defaults are in what is kept"
    trainer = Trainer(config, QUIET, rewards=REWARDS)
    critic = trainer.made.objective.critic
    begun = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    moving = [n for n in begun if n.startswith("objective.critic.network.model.model.layers.0")]
    assert moving, "the critic's own weights move"
    assert not any("lm_head" in n for n in begun), "its head says nothing"
    taken = list(trainer.loop())
    assert taken[0].metrics["explained_variance"] == pytest.approx(0, abs=1e-6)
    moved = {n for n, p in trainer.parameters.items() if not torch.equal(p, begun[n])}
    assert "objective.critic.value.weight" in moved
    assert moved.issuperset(moving), "from the second step on, when the values' own layer is not 0"
    assert critic is trainer.made.objective.critic


def test_a_critic_resumes_and_is_not_needed_to_answer(settings, tiny_model, tmp_path):
    """DoRA keeps lengths of its base's rows: of the critic's base, too."""
    extra = {"checkpoint": {"every": 1, "keep": 1}, "trainable": {"kind": "dora", "r": 2}}
    critic = {"critic": {"name": str(tiny_model)}}
    made = train(config_of(settings, extra, **critic), QUIET, rewards=REWARDS)
    config = config_of(settings, extra, {"output_dir": str(tmp_path / "parted")}, **critic)
    in_two_parts(config, 3, REWARDS)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")
    assert made.chat().ask("one 1", max_new_tokens=2)


def test_a_run_outlives_its_critic(settings, tiny_model, tmp_path):
    place = shutil.copytree(tiny_model, tmp_path / "critic")
    extra = {"max_steps": 2, "checkpoint": {"every": 1}}
    result = train(config_of(settings, extra, critic={"name": str(place)}), QUIET, rewards=REWARDS)
    place.rename(tmp_path / "elsewhere")
    assert result.chat().ask("one 1", max_new_tokens=2)
    bad(settings, "objective.critic: .*critic' does not exist", extra, critic={"name": str(place)})


def test_a_reward_model_gives_the_first_values(settings, classifier):
    """Values are its scores: of each start of an answer, what transformers says of the text so far."""
    from transformers import AutoModelForSequenceClassification

    config = config_of(settings, critic=str(classifier))
    trainer = Trainer(config, QUIET, rewards=REWARDS)
    trainer.steps[0]
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    for sample in trainer.steps.samples[:3]:
        for at, value in enumerate(sample.fields["values"]):
            tokens = torch.tensor(sample.tokens[: sample.start + at].astype("int64"))[None]
            with torch.no_grad():
                wanted = model.score(model.model(input_ids=tokens).last_hidden_state[0, -1])
            assert float(value) == pytest.approx(float(wanted), abs=1e-4)
    assert any(abs(v) > 1e-3 for s in trainer.steps.samples for v in s.fields["values"])


def test_a_run_of_a_reward_model_goes_on_as_the_critic(settings, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"one {n}", "chosen": "abc", "rejected": str(n)} for n in range(12)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = {"data": {"train": str(pairs)}, "output_dir": str(tmp_path / "judge"), "max_steps": 3}
    judged = configure(settings, other, method="reward")
    train(judged, QUIET)
    config = config_of(settings, {"max_steps": 3}, critic=str(tmp_path / "judge"))
    trainer = Trainer(config, QUIET, rewards=REWARDS)
    names = [n for n in trainer.parameters if n.startswith("objective.critic.network")]
    assert names
    assert all("lora" in n for n in names), "what the run trained goes on, and its score's layer became the critic's"
    assert trainer.made.objective.critic.value.weight.abs().max() > 0
    before = {n: trainer.parameters[n].detach().clone() for n in names}
    list(trainer.loop())
    assert any(not torch.equal(trainer.parameters[n], before[n]) for n in names)


def test_critics_that_do_not_do(settings, tiny_model, classifier, tmp_path):
    bad(settings, "objective.critic: .*/nothing' does not exist", critic=str(tmp_path / "nothing"))
    bad(settings, "objective.critic.trainable.kind='lorra'.*did you mean 'lora'",
        critic={"name": str(tiny_model), "trainable": {"kind": "lorra"}})  # fmt: skip
    bad(settings, "objective.critic.trainable.rr: unknown key",
        critic={"name": str(tiny_model), "trainable": {"kind": "lora", "rr": 2}})  # fmt: skip
    bad(settings, "objective.critic: precision.kind=nf4 keeps the weights in 4 bits",
        critic={"name": str(tiny_model), "trainable": {"kind": "full"}, "precision": {"kind": "nf4"}})  # fmt: skip
    bad(settings, "objective.critic.*is the folder of this run|does not exist", critic=str(tmp_path / "run"))


def test_explain_rehearses_a_step(settings, tiny_model, classifier):
    """Bytes of the policy, and of a critic of its own beside it."""
    found = {}
    for name, critic in (("head", "head"), ("model", str(tiny_model)), ("reward model", str(classifier))):
        found[name] = explain(config_of(settings, {"parallel": {"device": "cpu"}}, critic=critic)).memory
    trained = Trainer(config_of(settings, critic=str(tiny_model)), QUIET, rewards=REWARDS).made
    heads, own = (sum(p.numel() * 4 for p in m.parameters()) for m in (trained.network, trained.objective))
    assert found["head"].weights + found["head"].adapters == heads + 4 * 33
    assert found["model"].weights + found["model"].adapters == heads + own
    assert found["reward model"].peak > found["head"].peak
