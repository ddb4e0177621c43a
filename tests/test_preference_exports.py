"""Adapters of preference runs and reward models, as PEFT loads them: the log-probabilities and scores of the run."""

import pytest
import torch
from conftest import make_tokenizer
from peft import PeftModel
from test_classify_exports import here  # noqa: F401
from test_preference import PAIRS, UNPAIRED, data_of, pairs, unpaired  # noqa: F401
from test_train import QUIET
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from luthier import configure, train
from luthier.measured import read

SIDES = {"chosen": 1.0, "rejected": 0.0}


def turns(prompt: str, answer: str) -> tuple[str, str]:
    """What is asked, as the template writes it, and the answer to the end of its turn."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", f"{answer}<|im_end|>"


def logprob(model, prompt: str, answer: str) -> float:
    """Of a whole answer, by a model of transformers."""
    tokenizer, (before, after) = make_tokenizer(), turns(prompt, answer)
    asked, whole = (tokenizer(text)["input_ids"] for text in (before, before + after))
    tokens = torch.tensor([whole])
    with torch.no_grad():
        told = model(tokens).logits[0, :-1].double().log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    return told[len(asked) - 1 :].sum().item()


def held_out(result, step: int) -> list[tuple[int, str, float, float]]:
    """(row, side, log-probability of its answer, its reward), as the run's last evaluation has them."""
    found = read(result.folder, step, ()).documents["held_out"]
    out = []
    for side, liked in SIDES.items():
        for at, row in enumerate(found.rows):
            if "liked" not in found.columns or found.columns["liked"][at] == liked:
                out.append((row, side, *(found.columns[f"{what}/{side}"][at] for what in ("logps", "rewards"))))
    return out


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_an_adapter_gives_the_answers_of_the_run(pairs, unpaired, tiny_model, tmp_path, method, kind):  # noqa: F811
    """Log-probabilities of held-out answers, and with the adapter off those of the reference: rewards of DPO and KTO
    are beta times the difference, those of ORPO beta times the mean over an answer's tokens."""
    extra = {"max_steps": 6, "trainable": {"kind": kind, "r": 4}, "objective": {"beta": 0.5}}
    result = train(configure(data_of(method, pairs, unpaired), extra, method=method), QUIET)
    done = result.export(tmp_path / "out")
    assert done["largest_difference"] < 1e-4
    assert done["difference_to_base"] > 1e-3
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    wanted = held_out(result, 6)
    assert {side for _, side, *_ in wanted} == set(SIDES)
    for row, side, logps, reward in wanted:
        told = UNPAIRED[row] if method == "kto" else PAIRS[row]
        prompt, answer = told["prompt"], told["completion" if method == "kto" else side]
        found = logprob(tuned, prompt, answer)
        assert found == pytest.approx(logps, rel=1e-5, abs=1e-4), (row, side)
        if method == "orpo":
            tokens = len(make_tokenizer()(turns(prompt, answer)[1])["input_ids"])
            assert 0.5 * found / tokens == pytest.approx(reward, rel=1e-4, abs=1e-5)
            continue
        with tuned.disable_adapter():
            before = logprob(tuned, prompt, answer)
        assert 0.5 * (found - before) == pytest.approx(reward, rel=1e-3, abs=1e-4)
        assert abs(found - before) > 1e-3, "the adapter has moved the answer"


@pytest.mark.usefixtures("here")
def test_a_reward_models_adapter_gives_the_scores_of_the_run(pairs, tiny_model, tmp_path):  # noqa: F811
    """With its head, on a base that has none: both conversations of each held-out pair, up to the end of the answer."""
    result = train(configure(pairs, {"max_steps": 6, "trainable": {"r": 4}}, method="reward"), QUIET)
    assert result.export(tmp_path / "out")["difference_to_base"] > 1e-3
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, pad_token_id=0)
    tuned = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    found = read(result.folder, 6, ()).documents["held_out"]
    for at, row in enumerate(found.rows):
        for side in SIDES:
            text = "".join(turns(PAIRS[row]["prompt"], PAIRS[row][side]))
            tokens = torch.tensor([make_tokenizer()(text)["input_ids"]])
            with torch.no_grad():
                score = tuned(tokens).logits[0, 0].item()
            assert score == pytest.approx(found.columns[f"rewards/{side}"][at], rel=1e-4, abs=1e-5), (row, side)
