"""Freezing: by pattern, place, kind and step; nothing is computed below the lowest layer that moves."""

import json
import re

import pytest
import torch
from conftest import LLAMA, make_model, make_tokenizer
from safetensors.torch import load_file
from test_train import in_two_parts
from torch.utils.flop_counter import FlopCounterMode

from luthier import checkpoint, configure, train
from luthier.cli import main
from luthier.errors import ConfigError, ModelError
from luthier.explain import moving, walked
from luthier.explain.movement import walk_line
from luthier.monitor import Console
from luthier.optim import AdamW
from luthier.optim.optimizer import Optimizer
from luthier.parallel import Parallel, layers
from luthier.train import Trainer
from luthier.trainable import Full, LoRA, Partial, Unfreeze

QUIET = Console(quiet=True)
DEEP = LLAMA | {"num_hidden_layers": 4, "tie_word_embeddings": False}


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(DEEP | changes)))


def moved(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------- what moves


def test_kinds_by_hand():
    """A Llama layer: 4 products of attention, 3 of the feed-forward part, 2 norms; one norm after the last."""
    expected = {"attention": 4 * 4, "mlp": 4 * 3, "norms": 4 * 2 + 1, "embeddings": 1, "head": 1}
    for kind, count in expected.items():
        model = llama()
        Partial(**{kind: True}).apply(model)  # type: ignore[arg-type]
        assert len(moved(model)) == count, kind


def test_norms_inside_attention_are_norms():
    model = make_model("qwen3")
    Partial(attention=True).apply(model)
    assert len(moved(model)) == 2 * 4
    Partial(norms=True).apply(model)
    assert sum("q_norm" in name for name in moved(model)) == 2


def test_biases_of_gpt2_are_those_of_bitfit():
    """Per layer: two norms, two products of attention, two of the feed-forward part; one more after the last."""
    model = make_model("gpt2")
    Partial(biases=True).apply(model)
    assert len(moved(model)) == 2 * 6 + 1
    assert all(name.endswith(".bias") for name in moved(model))


FROZEN = ["embed_tokens", "*.mlp.*"]


@pytest.mark.parametrize("config", [Full(freeze=FROZEN), Partial(patterns=["*"], freeze=FROZEN)])
def test_freeze_wins(config):
    model = llama()
    config.apply(model)
    left = {name for name, _ in model.named_parameters() if "mlp" not in name and "embed_tokens" not in name}
    assert moved(model) == left


def test_further_entries_add_up_and_freeze_wins_over_them():
    model = llama()
    config = Partial(
        last_layers=1, freeze=["*.norm.*", "layernorm"],
        unfreeze=[Unfreeze(step=3, last_layers=2), Unfreeze(step=5, embeddings=True, last_layers=2)],
    )  # fmt: skip
    with pytest.raises(ModelError, match="layernorm"):
        config.apply(model)
    config = config.model_copy(update={"freeze": ["*layernorm*"]})
    config.apply(model)
    begins = config.begins(model)
    assert set(begins.values()) == {3, 5}
    assert {n for n, at in begins.items() if at == 5} == {"model.embed_tokens.weight"}
    assert {n for n, at in begins.items() if at == 3} == {
        n for n, _ in model.named_parameters() if n.startswith("model.layers.2.") and "layernorm" not in n
    }
    assert not moved(model) & set(begins)
    rows = {(row.name, row.begins) for row in moving(model, begins) if row.trainable}
    assert ("model.embed_tokens.weight", 5) in rows
    assert ("model.layers.2.mlp.up_proj.weight", 3) in rows
    assert walk_line(model, begins) == "backward through 1 of 4 layers, 2 from step 3 on, 4 from step 5 on"


# ---------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize(
    ("config", "layers_walked"),
    [
        (Partial(last_layers=2), 2),
        (Partial(head=True), 0),
        (Partial(norms=True), 4),  # that of the first layer moves, so all above it is walked
        (Partial(patterns=["model.norm"]), 0),
        (Partial(patterns=["model.layers.1.mlp.down_proj"]), 3),
        (Partial(last_layers=1, embeddings=True), 4),
        (LoRA(r=2, target_modules=[r"re:model\.layers\.3\..*"]), 1),
    ],
)
def test_no_layer_below_the_lowest_that_moves_is_walked(config, layers_walked, recompute):
    model = llama().train()
    config.apply(model)
    layers.checkpoint_activations(Parallel(activation_checkpointing=recompute), model)
    graph, backward = [], []
    for i, layer in enumerate(model.model.layers):

        def after(module, args, out, i=i):
            if out.requires_grad:
                graph.append(i)
                out.register_hook(lambda gradient: backward.append(i))

        layer.register_forward_hook(after)
    tokens = torch.arange(12)[None]
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert walked(model) == (layers_walked, 4)
    assert sorted(set(graph)) == sorted(set(backward)) == list(range(4 - layers_walked, 4))
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


def test_operations_of_a_partial_backward_by_hand():
    """Weights of a layer in products: 32x32 q and o, 16x32 k and v, 3 of 48x32; 12 tokens.

    Backward: the head's gradient of its input, both gradients of the last layer, but for the inputs of q, k and v: all
    three stop at the norm that moves, so they are computed. Attention itself is left out of the count.
    """
    model, tokens = llama(), torch.arange(12)[None]
    Partial(last_layers=1).apply(model)
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    products = sum(
        count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op)
    )
    layer, head = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32, 320 * 32
    assert products == 2 * 12 * (2 * layer + head)


def test_a_tied_head_is_told():
    model = llama(tie_word_embeddings=True)
    Partial(head=True).apply(model)
    assert walked(model) == (4, 4)
    assert "tied to the embeddings" in walk_line(model)
    model = llama()
    Partial(head=True).apply(model)
    assert "tied" not in walk_line(model)


# ---------------------------------------------------------------------------- by step

GRADUAL = {"trainable": {"last_layers": 0, "head": True, "unfreeze": [{"step": 3, "last_layers": 1}]}}


@pytest.fixture
def gradual(settings, tmp_path):
    llama().save_pretrained(tmp_path / "deep")
    make_tokenizer().save_pretrained(tmp_path / "deep")

    def make(name: str, **extra):
        out = {"output_dir": str(tmp_path / name), "model": str(tmp_path / "deep"), "evaluation": {"every": None}}
        return configure(settings, {"optim": {"weight_decay": 0.1}}, GRADUAL, out, extra, method="partial")

    return make


def weights(folder, step) -> dict:
    return load_file(folder / "checkpoints" / f"step-{step:08}" / "weights.safetensors")


def test_what_begins_later_stays_until_its_step(gradual, tmp_path):
    train(gradual("run", checkpoint={"every": 1, "keep": 9}), QUIET)
    start, third, fourth = (weights(tmp_path / "run", step) for step in (1, 3, 4))
    late = [name for name in start if ".layers.3." in name]
    assert len(late) == 9
    original = load_file(tmp_path / "deep" / "model.safetensors")
    assert all(torch.equal(third[name], original[name]) for name in late)
    assert all(not torch.equal(fourth[name], original[name]) for name in late)
    assert not torch.equal(third["lm_head.weight"], start["lm_head.weight"])
    state = [checkpoint.read_tensors(tmp_path / "run/checkpoints" / f"step-{n:08}", "optimizer") for n in (3, 4)]
    kept = ("exp_avg.model.layers.3.", "exp_avg_sq.model.layers.3.")
    moments = [{name: t for name, t in s.items() if name.startswith(kept)} for s in state]
    assert not any(t.any() for t in moments[0].values())
    assert all(t.any() for t in moments[1].values())


def test_late_moments_start_afresh():
    """Adam's first step is the rate times the gradient's sign, however many steps others have taken."""
    early, late = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = Optimizer({"early": early, "late": late}, AdamW(learning_rate=1.0))
    for step in range(3):
        early.grad = torch.tensor([1.0, -2.0, 3.0])
        late.grad = torch.tensor([1.0, -2.0, 3.0]) if step == 2 else None
        optimizer.step(0.1, torch.tensor(1.0))
    torch.testing.assert_close(late.detach(), torch.tensor([-0.1, 0.1, -0.1]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(early.detach(), 3 * torch.tensor([-0.1, 0.1, -0.1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [2, 3, 4])  # before, at and after the step
@pytest.mark.parametrize("recompute", [0, 1])
def test_resumed_around_the_step_ends_with_the_same_bytes(gradual, tmp_path, stop, recompute):
    extra = {"checkpoint": {"every": 1}, "parallel": {"activation_checkpointing": recompute}}
    train(gradual("whole", **extra), QUIET)
    in_two_parts(gradual("parted", **extra), stop)
    ends = [tmp_path / name / "checkpoints/step-00000006" for name in ("whole", "parted")]
    assert {p.name for p in ends[0].iterdir()} == {p.name for p in ends[1].iterdir()}
    for path in ends[0].iterdir():
        assert path.read_bytes() == (ends[1] / path.name).read_bytes(), path.name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a")
def test_compiled_layers_notice_the_step(gradual, tmp_path):
    """The same run, its layers as graphs (made without a C++ compiler): the same losses and weights to rounding."""
    found = {}
    for compile in (False, True):
        trainer = Trainer(gradual(f"compiled-{compile}", batch={"examples": 1}), QUIET)
        if compile:
            torch._dynamo.reset()
            for layer in trainer.made.network.model.model.layers:
                layer.compile(backend="aot_eager", dynamic=True)
        found[compile] = [trainer._take().loss for _ in range(5)], trainer.parameters
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    for name, p in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], p, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("trainable", "text"),
    [
        ({"unfreeze": [{"step": 4, "norms": True}, {"step": 4, "head": True}]}, "does not come after 4"),
        ({"unfreeze": [{"step": 6, "norms": True}]}, "never reached in max_steps=6"),
        ({"unfreeze": [{"step": 2}]}, "nothing is named to move"),
        ({"unfreeze": [{"step": 0, "norms": True}]}, "trainable.unfreeze[0].step=0"),
        ({"unfreeze": [{"step": 2, "norm": True}]}, "did you mean 'norms'"),
        ({"last_layers": 0, "unfreeze": [{"step": 2, "norms": True}]}, "nothing would move in the first step"),
    ],
)
def test_contradictions(settings, trainable, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        configure(settings, {"trainable": trainable}, method="partial")


@pytest.mark.parametrize(
    ("trainable", "text"),
    [
        (Partial(last_layers=1, freeze=["model.layer.*"]), "did you mean 'model.layers"),
        (Partial(last_layers=1, freeze=["model.layers"]), "takes back all"),
        (Full(freeze=["*"]), "freezes every weight"),
        (Full(freeze=["nothing"]), "trainable.freeze: 'nothing' matches no parameter"),
        (Partial(biases=True), "the model has no biases"),
        (Partial(last_layers=1, unfreeze=[Unfreeze(step=2, last_layers=1)]), r"unfreeze\[0\]: nothing further"),
        (Partial(last_layers=1, unfreeze=[Unfreeze(step=2, last_layers=9)]), r"unfreeze\[0\].last_layers=9"),
        (Partial(last_layers=1, unfreeze=[Unfreeze(step=2, patterns=["x"])]), r"unfreeze\[0\].patterns: 'x'"),
    ],
)
def test_what_the_model_does_not_have(trainable, text):
    def both(model):
        trainable.apply(model)
        trainable.begins(model)

    with pytest.raises(ModelError, match=text):
        both(llama())


def test_a_step_beyond_the_data(settings):
    trainable = {"unfreeze": [{"step": 100, "norms": True}], "last_layers": 1}
    config = configure(settings, {"max_steps": None, "trainable": trainable}, method="partial")
    with pytest.raises(ConfigError, match="step=100 is never reached, as the run has 7 steps"):
        Trainer(config, QUIET)


def test_by_the_command_line(settings, capsys):
    arguments = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    entry = "trainable.unfreeze=[{step: 3, embeddings: true}]"
    assert main(["train", "--method", "partial", "--show-config", "--json", *arguments, entry]) == 0
    assert json.loads(capsys.readouterr().out)["trainable"]["unfreeze"][0]["step"] == 3
