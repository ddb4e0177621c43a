"""What explain says of prompts that are run once, against the tokens that real steps then run."""

import json
from contextlib import contextmanager

import pytest
import torch
from conftest import write_rows
from test_train import QUIET

from luthier import configure, explain
from luthier.cli import main
from luthier.explain import plan
from luthier.models.network import Network
from luthier.train import Trainer

LONG = "say it again, please, and then once more: "
PAIRS = [{"prompt": f"{n} {LONG}", "chosen": "yes " * 2 + str(n), "rejected": "no " * 3 + str(n)} for n in range(24)]
LIKED = [
    {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
    for row in PAIRS
    for key in ("chosen", "rejected")
]
ROOM = {"max_length": 160, "validation": None}
BATCH = {"examples": 4, "micro_tokens": 512}


@pytest.fixture
def run(settings, tmp_path):
    """(rows, method) -> the configuration of a run of a few steps on them."""

    def made(rows: list, method: str, *extra: dict, **data):
        path = write_rows(tmp_path / f"{method}.jsonl", rows)
        given = {"data": {"train": str(path), **data}, "batch": BATCH, "max_steps": 6}
        values = settings | {"data": ROOM}
        return configure(values, given, *extra, method=method)

    return made


@contextmanager
def watched(monkeypatch):
    """(whether gradients are made, tokens run) of each pass that begins inside."""
    passes: list[tuple[bool, int]] = []
    plainly = Network._packed

    def packed(self, batch):
        embedded = self.model.get_input_embeddings()
        grad = torch.is_grad_enabled()
        hook = embedded.register_forward_hook(lambda module, given, out: passes.append((grad, out.shape[1])))
        try:
            return plainly(self, batch)
        finally:
            hook.remove()

    with monkeypatch.context() as patched:
        patched.setattr(Network, "_packed", packed)
        yield passes


def ran(trainer, monkeypatch, steps: int) -> tuple[int, int]:
    """Tokens of the passes with gradients, and of all, of so many steps; drawing answers is not among them."""
    with watched(monkeypatch) as passes:
        for _ in range(steps):
            if not trainer.steps.known(trainer.step):
                before = len(passes)
                trainer.steps[trainer.step]  # answers are given and scored
                del passes[before:]
            trainer._take()
    return sum(n for grad, n in passes if grad), sum(n for _, n in passes)


@pytest.mark.parametrize(("method", "rows"), [("dpo", PAIRS), ("orpo", PAIRS), ("reward", PAIRS), ("kto", LIKED)])
def test_tokens_that_a_step_runs(run, monkeypatch, method, rows):
    """Methods with a reference run everything twice, KTO its strange answers apart; a reward model runs the last token,
    too. All of it is counted, so it is exactly so."""
    config = run(rows, method)
    found = explain(config)
    trainer = Trainer(config, QUIET)
    learning, whole = ran(trainer, monkeypatch, 6)
    assert whole == learning if method in ("orpo", "reward") else whole > learning
    each = whole / 2 if config.objective.compares else whole
    assert found.plan.run_per_step * 6 == pytest.approx(each, rel=1e-9)
    assert found.plan.tokens_per_step > (1.03 if method == "kto" else 1.3) * found.plan.run_per_step
    assert found.plan.steps == 6


def test_nothing_is_saved_where_the_run_saves_nothing(run, monkeypatch):
    """Padded rows, noise on embeddings, and on a GPU rows of which less than an eighth would be saved."""
    for extra in ({"batch": {"packing": False}}, {"regularisation": {"neftune_noise_alpha": 5.0}}):
        found = explain(run(PAIRS, "dpo", extra)).plan
        assert found.run_per_step == found.tokens_per_step
    cuda = {"parallel": {"device": "cuda", "compile": False}}
    short = [{"prompt": str(n), "chosen": "yes " * 24 + str(n), "rejected": "no " * 32 + str(n)} for n in range(24)]
    config = run(short, "dpo", cuda)
    on_gpu, here = explain(config).plan, explain(run(short, "dpo")).plan
    assert on_gpu.run_per_step == on_gpu.tokens_per_step == here.tokens_per_step
    assert 0.875 < here.run_per_step / here.tokens_per_step < 1
    on_gpu = explain(run(PAIRS, "dpo", cuda)).plan
    assert on_gpu.run_per_step < 0.7 * on_gpu.tokens_per_step


def test_work_of_a_step_is_of_the_tokens_that_are_run(run):
    """Where the prompt is run once, a step's work falls with the tokens, and that of a token that is run stays."""
    config = run(PAIRS, "orpo")
    once, apart = explain(config), explain(run(PAIRS, "orpo", {"regularisation": {"neftune_noise_alpha": 5.0}}))
    share = once.plan.run_per_step / apart.plan.run_per_step
    assert share < 0.75
    assert once.memory.activations < 0.85 * apart.memory.activations
    a, b = once.per_token(), apart.per_token()
    assert a["forward"] - a["attention"] / 3 == pytest.approx(b["forward"] - b["attention"] / 3, rel=0.15)
    assert once.flops_per_step < (share + 0.15) * apart.flops_per_step


def test_operations_of_pairs_are_those_that_pytorch_counts(run):
    """The largest row of a run, forward and backward: products of the real network, attention apart."""
    from torch.utils.flop_counter import FlopCounterMode

    config = run(PAIRS, "orpo")
    found, trainer = explain(config), Trainer(config, QUIET)
    rows = [row for step in trainer.steps for row in step]
    (row, *_) = [row for row in rows if trainer._batch(row).lengths == list(found.plan.largest.lengths)]
    aten = torch.ops.aten

    def added(total, a, b, out_shape=None, **_):  # PyTorch does not count it where it works in place
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={aten.addmm_: added}) as counter:
        trainer.made.objective(trainer.made.network, trainer._batch(row)).total.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if op not in (aten._scaled_dot_product_flash_attention_for_cpu,
                   aten._scaled_dot_product_flash_attention_for_cpu_backward))  # fmt: skip
    assert found.work.forward + found.work.backward == products


def test_attention_by_hand(run):
    """Two answers of 10 and 12 tokens whose first 8 are alike: 100 squared and 144 less 64, of 14 tokens that are run.

    2 layers of 4 heads of 8: 4 x 32 operations for each pair forward, half of the square's.
    """
    made = explain(run(PAIRS, "orpo")).made
    from luthier.explain.rehearsal import attention_work, passes_of

    row = plan.Row((10, 12), 4, (0, 2), alike=(0, 8))
    assert passes_of(made, row, "cpu") == (14, 100 + 144 - 64)
    assert attention_work(made, row, "cpu")[0] == 2 * 4 * 32 * (100 + 144 - 64) // 2
    made.network.shares = False
    assert passes_of(made, row, "cpu") == (22, 244)


# ---------------------------------------------------------------------------- answers that are yet to be given

PROMPTS = [{"prompt": f"{n} {LONG}", "answer": str(n)} for n in range(12)]
GRPO = {"num_generations": 4, "max_completion_length": 12}


@pytest.mark.parametrize(
    ("method", "objective"),
    [("grpo", GRPO), ("grpo", GRPO | {"num_mini_batches": 2}),
     ("ppo", {"max_completion_length": 12, "num_mini_batches": 2})],
    ids=["grpo", "mini-batches", "ppo"],
)  # fmt: skip
def test_tokens_of_answers_that_a_step_runs(run, monkeypatch, method, objective):
    """A group shares its prompt, as far as a mini-batch has more than one of it. Answers are taken to be as long as may
    be, and are nearly so."""
    rewards = [{"kind": "length", "target": 4}]
    config = run(PROMPTS, method, {"batch": {"examples": 8}, "objective": objective | {"rewards": rewards}})
    found = explain(config).plan
    learning, _ = ran(Trainer(config, QUIET), monkeypatch, 6)
    assert found.run_per_step * 6 == pytest.approx(learning, rel=0.08)
    assert "every answer is taken to have 12 tokens" in found.source
    saved = 1 - found.run_per_step / found.tokens_per_step
    assert 0.3 < saved < 0.7 if method == "grpo" else saved < 0.15


def test_groups_share_prompts_that_are_assumed(run):
    """Without data: 2 groups of 4 answers, 148 + 12 tokens each, of which a prompt is run once: 8 x 159 - 6 x 148."""
    rewards = [{"kind": "length", "target": 4}]
    extra = {"batch": {"examples": 8, "micro_tokens": 2048}, "objective": GRPO | {"rewards": rewards}}
    found = explain(run(PROMPTS, "grpo", extra), count=False).plan
    assert found.tokens_per_step == 8 * 159
    assert found.run_per_step == 8 * 159 - 6 * 148
    assert found.largest.learnt == 8 * 12


# ---------------------------------------------------------------------------- streams


def test_a_stream_is_told_by_its_first_rows(run, monkeypatch):
    """24 rows are its first block and its first six steps: the tokens of these are exactly those that are run. Memory
    is that of the longest documents."""
    config = run(PAIRS * 3, "dpo", streaming=True, shuffle_buffer=24)
    found, assumed = explain(config).plan, explain(config, count=False).plan
    trainer = Trainer(config, QUIET)
    _, whole = ran(trainer, monkeypatch, 6)
    trainer.steps.close()
    assert found.run_per_step * 6 == pytest.approx(whole / 2, rel=1e-9)
    assert found.run_per_step < 0.75 * found.tokens_per_step < 0.75 * assumed.tokens_per_step
    assert found.rows == assumed.rows
    assert "told by the first 24 documents of the stream" in found.source
    bad = run([*PAIRS[:4], {"prompt": "x", "chosen": "a", "rejected": "a"}], "dpo", streaming=True)
    assert "assumed, as the data cannot be counted" in explain(bad).plan.source


# ---------------------------------------------------------------------------- in words


def test_it_is_said(run, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run(PAIRS, "dpo").model_dump(mode="json")))
    assert main(["explain", str(path)]) == 0
    assert "are run, as neighbours begin alike" in capsys.readouterr().out
    assert main(["explain", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["plan"]
    assert found["run_per_step"] < found["tokens_per_step"]
