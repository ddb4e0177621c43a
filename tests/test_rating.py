"""A reward model scores what it is given as its own evaluation scores the same rows."""

import io
import json
import sys

import pytest
import torch
from conftest import make_tokenizer, write_rows
from test_reward_model import PAIRS, asked, pairs, trained  # noqa: F401
from test_train import QUIET

from luthier import reward_models, train
from luthier.cli import main
from luthier.errors import ConfigError, DataError
from luthier.measured import read
from luthier.parallel import Parallel
from luthier.parallel.ranks import Ranks
from luthier.rewards import RewardModel

SYSTEM = [{"role": "system", "content": "be brief"}]
TEXTS = [{"chosen": f"the word {n} is good", "rejected": f"the word {n} is bad"} for n in range(12)]


@pytest.fixture
def run(pairs):  # noqa: F811
    """A trained run, and of each held-out row the scores that its evaluation has."""
    result = train(trained(pairs, max_steps=8, data={"max_length": 256}), QUIET)
    held_out = read(result.folder, 8, ()).documents["held_out"]
    columns = zip(held_out.rows, held_out.columns["rewards/chosen"], held_out.columns["rewards/rejected"])
    return result, {row: (chosen, rejected) for row, chosen, rejected in columns}


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def test_a_row_has_the_scores_of_the_evaluation(run):
    result, wanted = run
    rate = result.rater()
    assert len(wanted) == 6
    rows = [PAIRS[row] for row in wanted]
    found = rate(*rows)
    for one, (chosen, rejected) in zip(found, wanted.values()):
        assert one["chosen"] == pytest.approx(chosen, rel=1e-5, abs=1e-6)
        assert one["rejected"] == pytest.approx(rejected, rel=1e-5, abs=1e-6)
        assert one["margin"] == pytest.approx(chosen - rejected, rel=1e-4, abs=1e-6)
    assert len({one["chosen"] for one in found}) == 6


def test_however_an_answer_is_given_its_score_is_the_same(run):
    """A prompt and an answer with a tab between, messages, and rows of three formats; and what a reward says of it."""
    result, wanted = run
    (number, (chosen, _)), *_ = wanted.items()
    prompt, answer = PAIRS[number]["prompt"], PAIRS[number]["chosen"]
    turns = [*user(prompt), *assistant(answer)]
    found = result.rater()(
        f"{prompt}\t{answer}", turns, {"messages": turns}, {"prompt": prompt, "completion": answer},
        {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]},
    )  # fmt: skip
    assert [one["score"] for one in found] == pytest.approx([chosen] * 5, rel=1e-5, abs=1e-6)
    load = reward_models.loader(Ranks(Parallel(device="cpu")))
    as_reward = load(RewardModel(model=str(result.folder)))([asked(number, answer)])
    assert as_reward == pytest.approx([chosen], rel=1e-5, abs=1e-6)
    bare = result.rater()({"text": f"{prompt}{answer}"})[0]["score"]
    assert abs(bare - chosen) > 1e-3, "without the template it is another text"


def test_a_conversation_of_several_turns_and_a_system_turn(run):
    """Against the model's own forward pass over what the template writes."""
    result, _ = run
    rate = result.rater()
    turns = [*SYSTEM, *user("one 1"), *assistant("a"), *user("two 2"), *assistant("b c")]
    text = "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in turns).rstrip("\n")
    tokens = torch.tensor([make_tokenizer()(text)["input_ids"]])
    with torch.no_grad(), rate.network.natively() as model:
        wanted = model(tokens).logits[0, 0].item()
    assert rate(turns)[0]["score"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    short = [*SYSTEM, *user("one 1"), *assistant("a")]
    (wanted,) = rate(short)
    rate.system = "be brief"
    assert rate("one 1\ta")[0] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_rows_of_two_texts_are_scored_as_they_stand(pairs, tmp_path):  # noqa: F811
    """Such rows are learnt without the template, with the token that ends a text."""
    path = write_rows(tmp_path / "texts.jsonl", TEXTS)
    result = train(trained(pairs, max_steps=4, data={"train": str(path)}), QUIET)
    held_out = read(result.folder, 4, ()).documents["held_out"]
    rate = result.rater()
    for row, chosen in zip(held_out.rows, held_out.columns["rewards/chosen"]):
        assert rate({"text": TEXTS[row]["chosen"]})[0]["score"] == pytest.approx(chosen, rel=1e-5, abs=1e-6)
        assert rate(TEXTS[row])[0]["chosen"] == pytest.approx(chosen, rel=1e-5, abs=1e-6)


def test_columns_of_the_run_are_known(pairs, tmp_path):  # noqa: F811
    rows = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in PAIRS]
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    data = {"train": str(write_rows(tmp_path / "named.jsonl", rows)), "columns": columns}
    result = train(trained(pairs, max_steps=2, data=data), QUIET)
    renamed, known = result.rater()(rows[3], PAIRS[3])
    assert renamed == pytest.approx(known)


def test_the_command_line(run, capsys, monkeypatch):
    result, wanted = run
    folder, (number, (chosen, rejected)) = str(result.folder), next(iter(wanted.items()))
    prompt, answer = PAIRS[number]["prompt"], PAIRS[number]["chosen"]
    capsys.readouterr()
    assert main(["generate", folder, f"{prompt}\t{answer}", json.dumps(PAIRS[number]), "--json"]) == 0
    single, both = json.loads(capsys.readouterr().out)
    assert [single["score"], both["chosen"]] == pytest.approx([chosen] * 2, rel=1e-5, abs=1e-6)
    assert both["rejected"] == pytest.approx(rejected, rel=1e-5, abs=1e-6)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(PAIRS[number]) + "\n" + f"{prompt}\t{answer}\n"))
    assert main(["generate", folder]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("chosen ")
    assert second == f"{single['score']:.6g}"


def test_what_cannot_be_scored_is_told(run, capsys):
    result, _ = run
    rate, folder = result.rater(), str(result.folder)
    for given, wanted in (
        ("one 1", "row 1: empty_answer: there is no answer to score"),
        ("one 1\t", "row 1: empty_answer"),
        (user("one 1"), "row 1: role_order: the last turn is not the assistant's"),
        ([], "row 1"),
        ({"prompt": "x"}, "are of no known format"),
        ("one <|im_end|>\tb", "special token"),
        ("one 1\t" + "b" * 300, "row 1: truncated: the answer ends at token"),
    ):
        with pytest.raises(DataError) as caught:
            rate("one 1\tb", given)
        assert wanted in str(caught.value), given
    for arguments, wanted in (
        (["one 1\tb", "--temperature", "1"], "--temperature and --top-p are of answers"),
        (["{one", "--json"], "begins as JSON, and is none"),
        ([json.dumps(PAIRS[0]), "--system", "x"], "a system turn goes with a prompt and its answer"),
    ):
        assert main(["generate", folder, *arguments]) != 0
        assert wanted in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match=r"classifier\(\): .* is a run of method=reward"):
        result.classifier()
