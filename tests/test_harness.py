"""Tasks of lm-evaluation-harness: the same figures as its own adapter has on the exported model."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from test_scores import texts

from luthier import configure, scores
from luthier.assemble import assemble
from luthier.cli import main
from luthier.errors import ConfigError

harness = pytest.importorskip("luthier.harness", exc_type=ConfigError)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and of datasets

CHOICES = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}} {{{{choices[0]}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
ANSWERS = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{max_gen_toks: 12, until: ["{stop}"], do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks on the same twelve rows."""
    made = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)
    words = ["one", "three", "seven", "ab", "tree and leaf", "what is it"]
    rows = [
        {"question": " ".join(draw.choices(words, k=draw.randrange(1, 6))),
         "choices": [" " + " ".join(draw.choices(words, k=draw.randrange(1, 3))) for _ in range(3)],
         "answer": draw.randrange(3)}
        for _ in range(12)
    ]  # fmt: skip
    data = made / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, text in (("choices", CHOICES), ("text", TEXT), ("answers", ANSWERS)):
        (made / f"{name}.yaml").write_text(text.format(name=f"small_{name}", data=data, stop="a"))
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(tmp_path_factory.mktemp("cache"))


def test_figures_equal_those_of_the_harness_itself(folder, cache, settings):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    made = assemble(configure(settings), training=False)
    ours = harness.figures(made, [str(folder)], micro_tokens=64, batch_size=5)
    model = make_model().eval()
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=1, device="cpu"),
        tasks=["small_choices", "small_text", "small_answers"],
        task_manager=harness.TaskManager(include_path=str(folder), include_defaults=False), log_samples=True,
    )  # fmt: skip
    found = {
        f"tasks.{task}.{key.partition(',')[0]}": value
        for task, measured in theirs["results"].items()
        for key, value in measured.items()
        if "," in key and "_stderr" not in key
    }
    assert set(ours) == set(found)
    assert {key: f["value"] for key, f in ours.items()} == pytest.approx(found, rel=1e-5)
    assert 0 < ours["tasks.small_choices.acc"]["value"] < 1
    assert len(ours["tasks.small_choices.acc"]["samples"]) == 12
    assert ours["tasks.small_text.bits_per_byte"]["higher_is_better"] is False
    assert ours["tasks.small_text.bits_per_byte"]["samples"] is None


def test_requests_equal_those_of_the_harness_itself(cache, settings, tmp_path):
    """Every log-probability and every answer, with contexts that are too long, empty, and end in blanks."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    made = assemble(configure(settings), training=False)
    theirs = HFLM(pretrained=make_model().eval(), tokenizer=make_tokenizer(), batch_size=1, device="cpu")
    ours = harness.Adapter(made, 64, 3)

    def requests(kind, arguments):
        return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]

    pairs = requests("loglikelihood", [("ab ", "cd"), ("", "xyz"), ("q " * 300, "end"), ("é", " ü")])
    for (p, hit), (q, wanted) in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs)):
        assert p == pytest.approx(q, rel=1e-5)
        assert hit == wanted
    whole = requests("loglikelihood_rolling", [("abc",), ("long text " * 120,)])
    assert ours.loglikelihood_rolling(whole) == pytest.approx(theirs.loglikelihood_rolling(whole), rel=1e-5)
    with torch.no_grad():
        asked = [(p, {"until": ["\n"], "max_gen_toks": 9}) for p in ("ab", "a longer question", "q " * 300)]
        free = theirs.generate_until(requests("generate_until", asked))
        assert ours.generate_until(requests("generate_until", asked)) == free
        stop = free[1][3:5]  # text that comes: the answer ends before it
        asked = [(p, {"until": [stop], "max_gen_toks": 9}) for p, _ in asked]
        cut = ours.generate_until(requests("generate_until", asked))
        assert cut == theirs.generate_until(requests("generate_until", asked))
        assert cut[1] == free[1].split(stop)[0] != free[1]


def test_f1_equals_that_of_a_task_of_the_harness(cache):
    from lm_eval.tasks.mlqa.utils import f1_score

    for a in texts(300):
        if scores.normalised(a.reference) or scores.normalised(a.answer):
            assert scores.f1(a.reference, a.answer) == pytest.approx(f1_score(a.answer, a.reference, "en")), a


def test_what_cannot_be_done_is_said(folder, settings, tmp_path):
    made = assemble(configure(settings), training=False)
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="defines no task"):
        harness.figures(made, [str(tmp_path / "none")], 64, 4)
    sampled = (folder / "answers.yaml").read_text().replace("do_sample: false", "do_sample: true, temperature: 1.0")
    (tmp_path / "sampled.yaml").write_text(sampled)
    with pytest.raises(ConfigError, match="sampled answers"):
        harness.figures(made, [str(tmp_path / "sampled.yaml")], 64, 4)


def test_tasks_of_a_configuration(folder, settings, monkeypatch):
    here = {"tasks": [str(folder / "choices.yaml")]}
    with pytest.raises(ConfigError, match="trust_task_files=true"):
        configure(settings, {"evaluation": here})
    with pytest.raises(ConfigError, match="there is no"):
        configure(settings, {"evaluation": {"tasks": [str(folder / "other.yaml")], "trust_task_files": True}})
    monkeypatch.setattr("luthier.contradictions.evaluation.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'luthier\[eval\]'"):
        configure(settings, {"evaluation": here | {"trust_task_files": True}})


def test_a_run_and_its_evaluation_do_tasks(folder, cache, settings, capsys):
    from luthier import train
    from luthier.monitor import Console, records

    task = str(folder / "choices.yaml")
    settings |= {"evaluation": {"tasks": [task], "trust_task_files": True}, "max_steps": 2}
    result = train(configure(settings), Console(quiet=True))
    first, last = (r for r in records(result.folder / "metrics.jsonl") if r["kind"] == "evaluation")
    figure = result.report["figures"]["tasks.small_choices.acc"]
    assert (figure["base"], figure["tuned"]) == (first["tasks.small_choices.acc"], last["tasks.small_choices.acc"])
    assert figure["wins"] - figure["losses"] == round(12 * figure["change"])
    assert main(["evaluate", str(result.folder), "--tasks", task, "--json", "--quiet"]) == 0
    again = json.loads(capsys.readouterr().out)["figures"]["tasks.small_choices.acc"]
    assert again == figure


def test_the_harness_is_not_imported_without_need():
    import subprocess

    code = "import sys, luthier.evaluate; print('lm_eval' in sys.modules, 'sacrebleu' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]


