"""Rollouts: answers of the weights being trained as data; resume inside a round, passes, bad rewards, evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, write_rows
from safetensors.torch import load_file
from test_ranks import two_ranks
from test_train import QUIET, finished, in_two_parts

from luthier import checkpoint, configure, steps, surgery, train
from luthier.cli import main
from luthier.errors import ConfigError, DataError, RewardError
from luthier.generate import complete, distribution, drawn, generate
from luthier.models import network, trials
from luthier.monitor import Console, records
from luthier.train import Trainer

ROWS = [{"prompt": f"{word} {n}", "answer": word} for n in range(6) for word in ("one", "two")]


def length(prompt: str, completion: str, **columns: object) -> float:
    return min(1.0, len(completion) / 8)


@pytest.fixture
def asking(settings, tmp_path):
    """Settings of a run of GRPO on twelve prompts, three of which are held out: 4 steps on each of two rounds."""
    write_rows(tmp_path / "prompts.jsonl", ROWS)
    return settings | {
        "method": "grpo", "data": {"train": str(tmp_path / "prompts.jsonl"), "max_length": 64, "validation": 3},
        "batch": {"examples": 4, "micro_tokens": 96}, "max_steps": 8,
        "objective": {"num_generations": 2, "max_completion_length": 8, "num_mini_batches": 2, "num_iterations": 2},
    }  # fmt: skip


def quiet() -> tuple[Console, list[str]]:
    console, said = Console(quiet=True), []
    console.warn = said.append
    return console, said


def run(asking: dict, *more: dict, **rewards) -> Trainer:
    trainer = Trainer(configure(asking, *more), QUIET, rewards=rewards or {"length": length})
    trainer.run()
    return trainer


# ---------------------------------------------------------------------------- drawing answers


@pytest.fixture(scope="module")
def net():
    model = make_model()
    with torch.no_grad():
        for p in model.parameters():  # else every token is as likely as another
            p.mul_(3.0 if p.ndim > 1 else 1.0)
    made = network.Network(model)
    trials.prepare(made, "auto")
    return made


def test_log_probabilities_are_those_of_the_whole_model(net):
    """Of a stop token, too; as drawn, at the temperature and among the likeliest, and of the model itself."""
    prompts = [[7, 9, 11], [40, 41, 42, 43, 44], [5]]
    free = generate(net, prompts, set(), 12)
    stop = {free[0][5]}
    uniforms = torch.from_numpy(np.random.default_rng(0).random((3, 12), np.float32))
    how = {"temperature": 0.7, "top_p": 0.9, "top_k": 40}
    made = complete(net, prompts, stop, 12, uniforms=uniforms, logprobs=True, **how)
    for prompt, one in zip(prompts, made):
        assert one.ended == (one.tokens[-1] in stop)
        assert not set(one.answer) & stop
        ids = torch.tensor([[*prompt, *one.tokens]])
        with torch.no_grad(), net.natively() as model:
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        chosen = torch.tensor(one.tokens)[:, None]
        raw = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        as_drawn = distribution(logits, **how).gather(1, chosen)[:, 0].log()
        torch.testing.assert_close(torch.tensor(one.raw_logprobs), raw, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(one.logprobs), as_drawn, rtol=1e-4, atol=1e-4)
        assert (as_drawn >= (logits / 0.7).log_softmax(-1).gather(1, chosen)[:, 0] - 1e-5).all()


def test_what_is_drawn_depends_on_the_prompt_and_its_numbers_alone(net):
    prompts = [[7, 9, 11], [40, 41, 42, 43, 44], [5], [100, 3, 100]]
    uniforms = torch.from_numpy(np.random.default_rng(0).random((4, 10), np.float32))
    together = complete(net, prompts, set(), 10, temperature=1.0, uniforms=uniforms)
    for size in (1, 2):
        apart = complete(net, prompts[::-1], set(), 10, temperature=1.0, uniforms=uniforms.flip(0), batch_size=size)
        assert [one.tokens for one in apart[::-1]] == [one.tokens for one in together]


def test_a_draw_follows_the_distribution_and_never_takes_what_has_no_probability():
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).repeat(8, 1)
    ends = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 0.9, 1 - 2**-24])
    assert drawn(probabilities, ends).tolist() == [1, 1, 3, 3, 3, 4, 4, 4]
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert (distribution(logits, 1.0, top_k=2)[0] > 0).tolist() == [False, False, True, True]
    assert distribution(logits, 1.0, 0.7)[0].sum().item() == pytest.approx(1)
    assert distribution(logits, 0.0).tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_for_the_rollout_and_back_to_the_very_same_weights(family):
    from luthier.trainable import LoRA

    model = make_model(family)
    LoRA(r=4).apply(model)
    with torch.no_grad():
        for p in surgery.added(model):
            p.normal_(0, 0.3)
    made = network.Network(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    prompts = [[7, 9, 11], [5, 6]]
    plain = generate(made, prompts, set(), 12)
    with surgery.merged(model):
        assert not list(surgery.adapters(model))
        assert generate(made, prompts, set(), 12) == plain
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with surgery.adapters_off(model):
        assert generate(made, prompts, set(), 12) != plain, "the adapters say something"


# ---------------------------------------------------------------------------- rounds and steps


def test_a_round_is_learnt_in_passes_of_mini_batches(asking):
    """8 answers to 4 prompts a round, in 2 passes of 2 steps; a pass has each answer once, in its own order."""
    trainer = Trainer(configure(asking), QUIET, rewards={"length": length})
    rollouts = trainer.steps
    assert len(rollouts) == 8
    assert not rollouts.known(0)
    seen = [[d for row in rollouts[step] for d in row] for step in range(4)]
    assert rollouts.known(3)
    assert not rollouts.known(4)
    assert [len(part) for part in seen] == [4, 4, 4, 4]
    for a_pass in (seen[:2], seen[2:]):
        assert sorted(d for part in a_pass for d in part) == list(range(8))
    assert seen[:2] != seen[2:]
    one = rollouts.documents[0]
    answer = one.tokens[one.weights > 0]
    prompt = trainer.made.tokenizer.decode(one.tokens[one.weights == 0])
    assert prompt.startswith("<|im_start|>user\n")
    assert prompt.endswith("<|im_start|>assistant\n")
    assert 1 <= len(answer) <= 8
    assert all(len(values) == len(one.tokens) for values in one.fields.values())
    assert not one.fields["advantages"][one.weights == 0].any()
    groups = [s.group for s in rollouts.samples]
    assert groups == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_end_of_a_turn_is_learnt(asking):
    """A model that mostly says the end: the last token of an answer that ended is the stop token, and is learnt."""
    trainer = Trainer(configure(asking), QUIET, rewards={"length": length})
    stop = trainer.made.renderer.stop_tokens()
    head = trainer.made.network.model.get_output_embeddings()
    norm = trainer.made.network.model.model.norm
    with torch.no_grad(), trainer.made.network.natively() as model:  # is alike everywhere: it likes the stop
        norm.weight.fill_(1.0)
        hidden = model.model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1]
        head.weight[list(stop)] = hidden / hidden.norm() * 2
    trainer.steps[0]
    ended = [s for s in trainer.steps.samples if s.ended]
    assert ended
    for one in ended:
        assert one.tokens[-1] in stop
        assert one.document().weights[-1] == 1
        assert not set(one.tokens[one.start : -1].tolist()) & stop
    assert trainer.steps.metrics["truncated"] == 1 - len(ended) / 8


def test_the_last_round_may_be_smaller(asking):
    """9 prompts, 4 a round: three rounds, of which the last has one prompt, 2 answers and so one step a pass."""
    asking.pop("max_steps")
    trainer = run(asking)
    assert len(trainer.steps) == 4 + 4 + 2 == trainer.step
    report = json.loads((trainer.folder / "report.json").read_text())
    assert (report["steps"], report["rollouts"], report["rows"]) == (10, 18, 9)
    assert report["tokens"] > report["rollout_tokens"]


def test_stopped_inside_a_round_and_resumed_ends_with_the_same_bytes(asking, tmp_path):
    more = {"checkpoint": {"every": 1, "keep": 9}}
    run(asking, more)
    for stopped_after in (1, 2, 3, 4, 6):
        parted = configure(asking, more, {"output_dir": str(tmp_path / f"parted{stopped_after}")})
        in_two_parts(parted, stopped_after, {"length": length})  # its checkpoint is the last
        assert finished(tmp_path / "run") == finished(tmp_path / f"parted{stopped_after}"), stopped_after


def test_answers_come_from_the_weights_as_they_are(asking):
    """The second round's log-probabilities are those of the weights after four steps, adapters unmerged or merged."""
    found = []
    for merged in (False, True):
        more = {"objective": {"rollout_merged": merged}, "output_dir": f"{asking['output_dir']}{merged}"}
        trainer = Trainer(configure(asking, more), QUIET, rewards={"length": length})
        loop = iter(trainer.loop())
        for _ in range(5):
            step = next(loop)
        found.append([s.tokens.tolist() for s in trainer.steps.samples])
        assert step.metrics["mismatch_max"] < 1e-4
        loop.close()
    assert found[0] == found[1]


def test_the_rest_of_a_round_is_left_out_where_enough_was_learnt(asking, tmp_path, monkeypatch):
    """The objective says so after the first step of each round: its first pass is finished, the second is left out."""
    from luthier.objectives.policy_gradient import GRPOObjective

    monkeypatch.setattr(GRPOObjective, "enough", lambda self, metrics: "kl" in metrics and "so it is", raising=False)
    more = {"evaluation": {"every": 3}, "checkpoint": {"every": 1, "keep": 9}}
    trainer = Trainer(configure(asking, more), QUIET, rewards={"length": length})
    assert [step.step for step in trainer.loop()] == [1, 2, 5, 6]
    assert trainer.step == 8
    with monkeypatch.context() as patched:  # what was made ahead for a step that is left out is of no other
        patched.setattr(Trainer, "_first_row", lambda *_: [])
        run(asking, more, {"output_dir": str(tmp_path / "not-ahead")})
    assert finished(tmp_path / "run") == finished(tmp_path / "not-ahead")
    history = records(Path(asking["output_dir"]) / "metrics.jsonl")
    assert [r["step"] for r in history if r["kind"] == "evaluation"] == [0, 3, 6, 8], "due in a step that is left out"
    parted = configure(asking, more, {"output_dir": str(tmp_path / "parted")})
    for step in steps(parted, QUIET, {"length": length}):
        if step.step == 1:  # after its checkpoint: the second pass is left out after it, too
            break
    assert [step.step for step in steps(parted, QUIET, {"length": length})] == [2, 5, 6]
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")


def test_packed_and_padded_rows_draw_and_learn_the_same(asking, tmp_path):
    ends = []
    for packing in (True, False):
        trainer = run(asking, {"batch": {"packing": packing}, "output_dir": str(tmp_path / str(packing))})
        ends.append(trainer.parameters)
    for name, one in ends[0].items():
        torch.testing.assert_close(ends[1][name], one, rtol=1e-3, atol=1e-4, msg=name)


CODE = """
import json, sys, torch
torch.set_num_threads(1)
from luthier import configure, train
from luthier.monitor import Console
length = lambda prompt, completion, **_: min(1.0, len(completion) / 8)
train(configure(json.loads(sys.argv[1])), Console(quiet=True), rewards={"length": length})
"""


def test_two_ranks_answer_and_learn_what_one_does(asking, tmp_path):
    run(asking, {"checkpoint": {"every": 3}})
    both = configure(asking, {"output_dir": str(tmp_path / "two")}).model_dump(mode="json")
    assert two_ranks(CODE, both) == [0, 0]
    one, two = (
        load_file(checkpoint.listed(tmp_path / name / "checkpoints")[-1] / "weights.safetensors")
        for name in ("run", "two")
    )
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    told = [
        [(r["step"], r["reward"], r["completion_length"]) for r in records(tmp_path / n / "metrics.jsonl")
         if r["kind"] in ("train", "evaluation")] for n in ("run", "two")
    ]  # fmt: skip
    for mine, theirs in zip(*told, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


# ---------------------------------------------------------------------------- rewards


def test_the_log_says_what_answers_were_worth(asking):
    more = {"objective": {"rewards": [{"kind": "length", "unit": "characters", "target": 4, "weight": 0.5}]}}
    trainer = run(asking, more, mine=length)
    first = next(r for r in records(trainer.folder / "metrics.jsonl") if r["kind"] == "train")
    assert first["reward"] == pytest.approx(0.5 * first["reward.length"] + first["reward.mine"])
    for key in ("reward_std", "kl", "clip_ratio", "entropy", "completion_length", "truncated", "frac_reward_zero_std",
                "mismatch_mean", "mismatch_max", "rollout_seconds"):  # fmt: skip
        assert key in first
    kept = [json.loads(line) for line in (trainer.folder / "rollouts" / "round-000001.jsonl").read_text().splitlines()]
    assert len(kept) == 8
    assert kept[0]["reward"] == pytest.approx(0.5 * kept[0]["rewards"]["length"] + kept[0]["rewards"]["mine"])
    mean = np.mean([one["reward"] for one in kept])
    assert first["reward"] == pytest.approx(mean)


def test_held_out_prompts_are_answered_and_compared_with_the_base(asking):
    result = train(configure(asking), QUIET, rewards={"mine": length})
    figures = result.report["figures"]
    for key in ("reward", "reward.mine", "completion_length"):
        assert {"base", "tuned", "change_interval", "tuned_interval"} <= set(figures[key]), key
    assert "loss" not in figures
    kept = [json.loads(line) for line in (result.folder / "answers" / "compare.jsonl").read_text().splitlines()]
    assert len(kept) == 3
    assert {"base", "tuned", "scores", "outcome"} <= set(kept[0])
    answers = (result.folder / "answers" / "step-00000008.jsonl").read_text().splitlines()
    rewarded = [json.loads(line) for line in answers]
    for one in rewarded:
        assert one["scores"]["reward"] == length("", one["answer"])
        assert one["reference"] in ("one", "two")
    assert figures["reward"]["tuned"] == pytest.approx(np.mean([one["scores"]["reward"] for one in rewarded]))


def test_a_command_evaluates_a_run_again(asking, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("def mine(prompt, completion, answer):\n    return float(len(completion) > len(answer))\n")
    config = configure(asking)
    (tmp_path / "run.yaml").write_text(config.dump())
    assert main(["train", str(tmp_path / "run.yaml"), "--reward", f"{path}:mine", "--json", "--quiet"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert main(["evaluate", config.output_dir, "--reward", f"{path}:mine", "--json", "--quiet"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["figures"]["reward"]["tuned"] == trained["figures"]["reward"]["tuned"]
    assert again["figures"]["reward"]["base"] == trained["figures"]["reward"]["base"]
    assert main(["evaluate", config.output_dir, "--quiet"]) == 2
    assert "--reward FILE.py:FUNCTION" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["raises", "nan"])
def test_a_reward_that_fails_names_the_row_and_nothing_is_lost(asking, bad):
    """In the second round: what was learnt in the first is in a checkpoint, and the run goes on from it."""
    calls = []

    def fails(prompt: str, completion: str) -> float:
        calls.append(prompt)
        if len(calls) > 8 + 3:  # the first round, and the held-out prompts before it
            if bad == "raises":
                raise KeyError("oh")
            return float("nan")
        return len(completion) / 8

    with pytest.raises(RewardError, match=r"'fails'.*row \d|row \d.*") as caught:
        run(asking, fails=fails)
    assert "fails" in str(caught.value)
    last = checkpoint.listed(Path(asking["output_dir"]) / "checkpoints")
    assert checkpoint.step_of(last[-1]) == 4
    finished_run = run(asking, fails=lambda prompt, completion: len(completion) / 8)
    assert finished_run.step == 8


def test_equal_rewards_all_over_are_told(asking):
    console, said = quiet()
    Trainer(configure(asking), console, rewards={"same": lambda prompt, completion: 1.0}).run()
    told = [text for text in said if "equal" in text]
    assert len(told) == 1
    assert "objective.rewards" in told[0]
    shares = [r["frac_reward_zero_std"] for r in records(Path(asking["output_dir"]) / "metrics.jsonl")
              if r["kind"] == "train"]  # fmt: skip
    assert shares == [1.0] * 8
    report = json.loads((Path(asking["output_dir"]) / "report.json").read_text())
    assert report["rounds_of_equal_rewards"] == 2


def test_no_end_in_any_answer_is_told_once_with_the_remedy(asking):
    console, said = quiet()
    Trainer(configure(asking), console, rewards={"length": length}).run()
    told = [text for text in said if "came to its end" in text]
    assert len(told) == 1
    assert "objective.max_completion_length" in told[0]


@pytest.mark.parametrize("validation", [3, None])
def test_a_round_of_which_nothing_is_learnt_is_passed_over(asking, validation):
    """All answers are cut, and cut ones are masked: no step is taken, no weight moves, and the run ends well, also
    where nothing at all is recorded."""
    console, said = quiet()
    likeliest = {"top_k": 1, "max_completion_length": 2}  # which end no answer
    more = {"objective": {"mask_truncated_completions": True, **likeliest}, "data": {"validation": validation}}
    trainer = Trainer(configure(asking, more), console, rewards={"length": length})
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.run()
    assert trainer.step == 8
    assert all(torch.equal(before[name], p) for name, p in trainer.parameters.items())
    assert any("passed over" in text for text in said)


def test_groups_of_equal_rewards_are_drawn_again(asking):
    """Answers to half of the twelve prompts never differ: after a few attempts, no group is of those."""
    asking["data"] |= {"validation": None}

    def worth(prompt: str, completion: str) -> float:
        return len(completion) + sum(map(ord, completion)) / 1e4 if prompt.startswith("two") else 0.0

    more = {"objective": {"max_resamples": 6}}
    trainer = Trainer(configure(asking, more), QUIET, rewards={"worth": worth})
    trainer.steps[0]
    assert trainer.steps.metrics["frac_reward_zero_std"] == 0
    assert trainer.steps.metrics["drawn_again"] > 0
    assert trainer.steps.counts["drawn_again"] == trainer.steps.metrics["drawn_again"]
    assert [s.group for s in trainer.steps.samples] == [0, 0, 1, 1, 2, 2, 3, 3]
    rows = {s.row for s in trainer.steps.samples}
    assert all(ROWS[row]["prompt"].startswith("two") for row in rows)
    twice = configure(asking, more, {"output_dir": f"{asking['output_dir']}2"})
    again = Trainer(twice, QUIET, rewards={"worth": worth})
    again.steps[0]
    for one, other in zip(trainer.steps.samples, again.steps.samples):
        assert np.array_equal(one.tokens, other.tokens)


def test_prompts_that_leave_no_room_for_an_answer(asking, tmp_path):
    rows = [*ROWS, {"prompt": "x" * 40, "answer": "x"}]
    write_rows(tmp_path / "prompts.jsonl", rows)
    asking["data"] |= {"validation": None}
    with pytest.raises(DataError, match=r"1 of 13 prompts \(rows 12; .*data.max_length"):
        Trainer(configure(asking), QUIET, rewards={"length": length})
    console, said = quiet()
    made = Trainer(configure(asking, {"data": {"on_bad_row": "skip"}}), console, rewards={"length": length})
    assert len(made.steps.prompts) == 12
    assert any("left out" in text for text in said)


def test_nothing_to_reward_with_is_refused_before_the_weights(asking):
    with pytest.raises(ConfigError, match="nothing says what an answer is worth"):
        Trainer(configure(asking), QUIET)


# ---------------------------------------------------------------------------- learning


def test_a_small_model_learns_to_say_letters(asking):
    """The share of small letters in eight bytes, of a model that says any of 320 tokens at first: 0.08 by chance."""

    def share(prompt: str, completion: str) -> float:
        return sum(c.islower() and c.isascii() for c in completion) / 8

    asking["objective"] |= {"num_generations": 8, "num_mini_batches": 1, "num_iterations": 1, "beta": 0.0}
    asking["data"] |= {"validation": None}
    more = {"batch": {"examples": 32, "micro_tokens": 512}, "max_steps": 40, "trainable": {"kind": "full"}}
    trainer = Trainer(configure(asking, more), QUIET, rewards={"share": share})
    found = [step.metrics["reward"] for step in trainer.loop()]
    assert np.mean(found[:3]) < 0.2
    assert np.mean(found[-3:]) > 0.8
