"""Pruning: scores and masks by hand and beside torch and torchao, networks that others load, healing that resumes."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import LLAMA, make_tokenizer, save_model
from torch import nn

from luthier.cli import main
from luthier.compress.prune import depth, families, importance, sparsity, width
from luthier.compress.prune.settings import Pruning
from luthier.errors import ModelError

DOCUMENTS = [[(i * 37 + j * 11) % 300 for j in range(20 + i)] for i in range(4)]
DEEP = LLAMA | {"num_hidden_layers": 4, "intermediate_size": 64}


def of_family(name: str):
    """A small model of a family that can be pruned in every way."""
    import transformers as t

    torch.manual_seed(0)
    if name == "qwen2":
        model = t.Qwen2ForCausalLM(
            t.Qwen2Config(**DEEP, use_sliding_window=True, sliding_window=8, max_window_layers=2)
        )
    elif name == "mistral":
        model = t.MistralForCausalLM(t.MistralConfig(**DEEP, sliding_window=8))
    elif name == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**DEEP, head_dim=8))
    elif name == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        config = t.Gemma3TextConfig(**DEEP, head_dim=8, sliding_window=6, layer_types=kinds, query_pre_attn_scalar=8)
        model = t.Gemma3ForCausalLM(config)
    else:
        model = t.LlamaForCausalLM(t.LlamaConfig(**DEEP, tie_word_embeddings=name == "tied"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """A folder with a Llama of four layers."""
    folder = tmp_path_factory.mktemp("deep")
    of_family("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def by(way: str, **more) -> Pruning:
    return Pruning(by=way, **more)


def cli(*words, expect: int = 0, capsys=None) -> dict:
    code = main([*map(str, words), "--json", "--quiet"])
    said = json.loads(capsys.readouterr().out)
    assert code == expect, said
    return said


# ---------------------------------------------------------------------------- scores and masks


def test_wandas_score_and_mask_by_hand():
    weight = torch.tensor([[4.0, -1.0, 2.0, 3.0], [1.0, 2.0, -3.0, 4.0]])
    inputs = torch.tensor([1.0, 8.0, 1.0, 1.0])
    assert sparsity.scores(weight, inputs).tolist() == [[4, 8, 2, 3], [1, 16, 3, 4]]
    kept = sparsity.mask(weight, inputs, by("wanda", target=0.5))
    assert kept.tolist() == [[True, True, False, False], [False, True, False, True]]
    kept = sparsity.mask(weight, None, by("magnitude", target=0.5))  # of the layer: 4, 3 and 3, 4 are the largest four
    assert kept.tolist() == [[True, False, False, True], [False, False, True, True]]
    kept = sparsity.mask(weight, None, by("magnitude", pattern="2:4"))
    assert kept.tolist() == [[True, False, False, True], [False, False, True, True]]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.7])
def test_magnitude_is_that_of_torch(share):
    from torch.nn.utils import prune

    layer = nn.Linear(24, 10)
    kept = sparsity.mask(layer.weight, None, by("magnitude", target=share))
    prune.l1_unstructured(layer, "weight", amount=1 - share)
    assert torch.equal(kept, layer.weight_mask.bool())


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:WandaSparsifier got:UserWarning")
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_is_that_of_torchao(pattern):
    """Its masks of the same norms: its observer squares them and looks at outputs, and without a pattern it compares
    all of a layer, so that each row is a layer of its own here."""
    from torchao.sparsity import WandaSparsifier

    torch.manual_seed(3)
    own, inputs = torch.randn(16, 32), torch.randn(50, 32) * torch.rand(32) * 4
    norms = inputs.square().sum(0).sqrt()
    wanted = by("wanda", pattern="2:4") if pattern == "2:4" else by("wanda", target=0.5)
    ours = own * sparsity.mask(own, norms, wanted)
    model = nn.Sequential(*(nn.Linear(32, 1, bias=False) for _ in own))
    for layer, row in zip(model, own):
        layer.weight.data.copy_(row[None])
    theirs = WandaSparsifier(0.5, semi_structured_block_size=4 if pattern == "2:4" else None)
    theirs.prepare(model, [{"tensor_fqn": f"{i}.weight"} for i in range(16)])
    for layer in model:
        layer.activation_post_process.norm = norms
    theirs.step()
    theirs.squash_mask()
    assert torch.equal(ours, torch.cat([layer.weight.detach() for layer in model]))
    assert (ours == 0).sum() == 256


def test_wanda_sees_what_pruned_blocks_make():
    """The inputs of the second block are those that the first, pruned, gives."""
    model, again = of_family("llama"), of_family("llama")
    sparsity.wanda_(model, DOCUMENTS, by("wanda", target=0.5))
    first = {n: p for n, p in model.named_parameters() if "layers.0." in n}
    for name, p in again.named_parameters():
        if name in first:
            p.data.copy_(first[name])
    seen = []
    handle = again.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, given: seen.append(given[0][0]))
    importance.run(again, DOCUMENTS)
    handle.remove()
    norms = torch.cat(seen).square().sum(0).sqrt()
    weight = again.model.layers[1].self_attn.q_proj.weight
    kept = sparsity.mask(weight, norms, by("wanda", target=0.5))
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight != 0, kept)
    assert model.model.embed_tokens.weight.ne(0).all()


# ---------------------------------------------------------------------------- importance


def test_aggregation_and_influence_by_hand():
    rows = [torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0]])]  # means [2, 2], [0, 2]
    assert importance.over_rows(rows).tolist() == pytest.approx([2, math.sqrt(8)])
    before, after = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 3.0]])
    assert importance.influence(before, after).tolist() == pytest.approx([0, 1])


def test_importance_of_parts_is_that_of_activations():
    model = of_family("llama")
    found = importance.parts(model, DOCUMENTS)
    layer, heads, channels = model.model.layers[2], [], []
    norms: dict = {}
    each = lambda m, given: heads.append(given[0][0].unflatten(-1, (4, 8)).norm(dim=-1))  # noqa: E731
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(each),
             layer.mlp.down_proj.register_forward_pre_hook(lambda m, g: channels.append(g[0][0].abs()))]  # fmt: skip
    for name, module in model.named_modules():
        if name.endswith("norm"):
            hooks.append(
                module.register_forward_hook(lambda m, g, out, n=name: norms.setdefault(n, []).append(out[0].abs()))
            )
    importance.run(model, DOCUMENTS)
    assert torch.allclose(found.heads[2], importance.over_rows(heads))
    assert torch.allclose(found.channels[2], importance.over_rows(channels))
    assert len(norms) == 9
    assert torch.allclose(found.hidden, sum(importance.over_rows(rows) for rows in norms.values()), rtol=1e-4)


def test_block_influence_is_that_of_hidden_states():
    model = of_family("qwen3")
    found = importance.influences(model, DOCUMENTS)
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for document in DOCUMENTS:
        states: list = []
        keep = lambda m, given, into=states: into.append(given[0][0])  # noqa: E731
        hooks = [m.register_forward_pre_hook(keep) for m in (*model.model.layers, model.model.norm)]
        importance.run(model, [document])
        for hook in hooks:
            hook.remove()
        for i in range(4):
            sums[i] += (1 - torch.cosine_similarity(states[i], states[i + 1], dim=-1)).double().sum()
        count += len(document)
    assert torch.allclose(found, sums / count)


def test_perplexity_without_a_layer_is_that_of_the_smaller_model():
    model = of_family("gemma3")
    found = importance.perplexities(model, DOCUMENTS)
    state = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    from luthier.compress.plain import built

    for gone in (0, 3):
        left = [i for i in range(4) if i != gone]
        smaller = built(*depth.without(model.config, state, left), torch.float32)
        assert smaller.config.layer_types == [model.config.layer_types[i] for i in left]
        assert found[gone].item() == pytest.approx(importance.perplexity(smaller, DOCUMENTS), rel=1e-5)


def test_layers_that_stay_by_hand():
    values = torch.tensor([0.9, 0.1, 0.5, 0.1, 0.2])
    assert depth.kept(values, 3) == [0, 2, 4]
    assert depth.kept(values, 4) == [0, 1, 2, 4]  # of equal ones the earlier
    assert depth.count(by("depth", target=0.5), 30) == 15
    assert depth.count(by("depth", target=0.01), 30) == 1
    assert depth.count(by("depth", target=0.99), 4) == 3


# ---------------------------------------------------------------------------- width


def test_heads_of_groups_by_hand():
    heads = torch.tensor([[1.0, 1.0, 5.0, 0.0]])  # groups of two: 2 and 5
    found = importance.Parts(heads, torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([2.0, 3.0, 1.0, 2.0]), {})
    now = families.Sizes(1, 4, 3, 4, 2, 8)
    kept = width.chosen(found, now, families.Sizes(1, 2, 2, 1, 1, 8))
    assert (kept.groups[0].tolist(), kept.heads[0].tolist()) == ([1], [2])
    assert (kept.channels[0].tolist(), kept.hidden.tolist()) == ([0, 2], [0, 1])


@pytest.mark.parametrize("family", ["llama", "tied", "qwen2", "qwen3", "mistral"])
def test_what_does_nothing_can_go_without_a_trace(family):
    """Heads, channels and dimensions that are 0 everywhere are those that go, and the output stays what it was."""
    from luthier.compress.plain import built

    model = of_family(family)
    gone = torch.arange(0, 32, 4)  # dimensions; channels 1 and 5; the second group of heads
    with torch.no_grad():
        for name, p in model.named_parameters():
            for dim, axis in enumerate(families.axes(name)):
                if axis == families.HIDDEN:
                    p.index_fill_(dim, gone, 0)
                elif axis == families.CHANNELS:
                    p.index_fill_(dim, torch.tensor([1, 5]), 0)
            if "v_proj" in name:
                p[8:] = 0
    state = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    now = families.Sizes.of(model.config)
    new = families.Sizes(4, 24, 62, 2, 1, 8)
    found = importance.parts(model, DOCUMENTS)
    kept = width.chosen(found, now, new)
    assert set(gone.tolist()).isdisjoint(kept.hidden.tolist())
    config, made = width.narrowed(model.config, state, kept, new)
    width.rescaled(made, kept.hidden, found.energy)
    smaller = built(config, made, torch.float32)
    tokens = torch.tensor([DOCUMENTS[0]])
    assert torch.allclose(smaller(tokens).logits, model(tokens).logits, atol=2e-4)  # eps of the norms aside
    assert smaller.config.head_dim == 8


def test_sizes_reach_the_target():
    model = of_family("llama")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    now = families.Sizes.of(model.config)
    assert width.parameters(shapes, now) == families.embedding_free(model)
    for target in (0.3, 0.5, 0.8):
        new = width.fitted(shapes, now, by("width", target=target, dimensions=["channels", "hidden"], multiple=1))
        assert width.parameters(shapes, new) / width.parameters(shapes, now) == pytest.approx(target, rel=0.01)
        assert (new.heads, new.groups) == (4, 2)
    with pytest.raises(ModelError, match=r"the nearest is 0\.421"):
        width.fitted(shapes, now, by("width", target=0.1, dimensions=["channels"]))
    with pytest.raises(ModelError, match="not a multiple of num_key_value_heads=2"):
        width.fitted(shapes, now, by("width", shape={"num_attention_heads": 3}))
    with pytest.raises(ModelError, match="the model has 64"):
        width.fitted(shapes, now, by("width", shape={"intermediate_size": 65}))


# ---------------------------------------------------------------------------- the command


WAYS = {
    "depth": ["--target", "0.5"],
    "depth perplexity": ["--target", "0.5", "--importance", "perplexity"],
    "width": ["--target", "0.5"],
    "width heads": ["--shape", "num_key_value_heads=1", "intermediate_size=40"],
    "wanda": ["--target", "0.6"],
    "wanda 2:4": ["--pattern", "2:4"],
    "magnitude": ["--target", "0.5"],
}


@pytest.mark.parametrize("way", ["depth", "width", "wanda 2:4"])
def test_others_load_what_is_left(way, deep, rows_file, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    done = cli(
        "prune", deep, out, "--by", way.split()[0], *WAYS[way], "--data", rows_file, "--held-out", 6, capsys=capsys
    )
    assert done["largest_difference"] < 1e-4
    figure = done["figures"]["perplexity"]
    assert figure["base"] > 1
    assert figure["tuned"] > 1
    model = AutoModelForCausalLM.from_pretrained(out)
    if way == "wanda 2:4":
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    assert (module.weight.view(len(module.weight), -1, 4) != 0).sum(-1).eq(2).all()
    else:
        whole, left = done["without_embeddings"]
        assert families.embedding_free(model) == left
        assert left / whole == pytest.approx(0.5, abs=0.03)
        assert done["parameters"][1] == sum(p.numel() for p in model.parameters())
    assert AutoTokenizer.from_pretrained(out).chat_template
    generated = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > 3


@pytest.mark.parametrize("family", ["tied", "qwen2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("way", ["depth", "width heads"])
def test_families(family, way, tmp_path, rows_file):
    """Written and loaded again in this process, every family's output is that of the network in memory."""
    from transformers import AutoModelForCausalLM

    from luthier.compress import proof
    from luthier.compress.plain import plain, save
    from luthier.compress.prune import pruning

    of_family(family).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    source = plain(str(tmp_path / "model"))
    shape = {"num_key_value_heads": 1, "intermediate_size": 40}
    wanted = by("depth", target=0.5) if way == "depth" else by("width", shape=shape)
    model, _ = pruning.pruned(source, DOCUMENTS, wanted)
    save(source, model, tmp_path / "out", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(proof.logprobs(again, DOCUMENTS), proof.logprobs(model, DOCUMENTS), atol=1e-5)
    assert again.config.num_hidden_layers == (2 if way == "depth" else 4)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--by", "depth"], 2, "--target: required"),
        (["--by", "depth", "--target", "1.5"], 2, "--target"),
        (["--by", "depth", "--target", "0.5", "--pattern", "2:4"], 2, "--pattern: of --by wanda"),
        (["--by", "magnitude", "--target", "0.3", "--pattern", "2:4"], 2, "keeps two of four"),
        (["--by", "wanda", "--shape", "hidden_size=8"], 2, "no size changes"),
        (["--by", "depth", "--shape", "hidden_size=8"], 2, "--by depth changes num_hidden_layers"),
        (["--by", "depth", "--shape", "hidden"], 2, "KEY=N"),
        (["--by", "depth", "--target", "0.5"], 2, "--calibration: --by depth measures importance on rows"),
        (["--by", "magnitude", "--target", "0.5", "--heal", "distill"], 2, "--data: --heal distill learns from rows"),
        (["--by", "magnitude", "--target", "0.5", "--steps", "3"], 2, "--steps: of --heal"),
        (["--by", "magnitude", "--target", "0.5", "optim.learning_rate=1"], 2, "settings are of --heal"),
        (["--by", "magnitude", "--target", "0.5", "--dtype", "int4"], 2, "--dtype=int4"),
        (["--by", "magnitude", "--target", "0.5", "--bound", "0.1"], 2, "--bound: compares perplexity"),
        (["--by", "magnitude", "--target", "0.5", "--held-out", "3"], 2, "--held-out"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_loaded(words, code, told, deep, tmp_path, capsys):
    said = cli("prune", deep, tmp_path / "out", *words, expect=code, capsys=capsys)
    assert any(told in problem for problem in said["problems"]), said
    assert not (tmp_path / "out").exists()


def test_families_that_are_not_known_are_refused_by_name(tmp_path, rows_file, capsys):
    save_model(tmp_path / "gpt2", "gpt2")
    out = tmp_path / "out"
    words = ["prune", tmp_path / "gpt2", out, "--data", rows_file]
    said = cli(*words, "--by", "depth", "--target", "0.5", expect=4, capsys=capsys)
    assert "'gpt2' are not known to it, only llama" in said["problems"][0]
    done = cli(*words, "--by", "wanda", "--target", "0.5", capsys=capsys)  # weights of any family can be 0
    assert done["share"] == pytest.approx(0.5, abs=0.01)


def test_gemmas_stream_cannot_shrink(tmp_path):
    model = of_family("gemma3")
    with pytest.raises(ModelError, match="--dimensions heads channels"):
        width.check_hidden(model.config, families.Sizes(4, 24, 64, 4, 2, 8))


def test_a_bound_that_is_passed_leaves_nothing(deep, rows_file, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["prune", deep, out, "--by", "magnitude", "--target", "0.1", "--data", rows_file]
    said = cli(*words, "--bound", "-0.9", expect=7, capsys=capsys)
    assert "held-out perplexity rose from" in said["problems"][0]
    assert list(tmp_path.glob("*out*")) == []
    out.mkdir()
    (out / "file").write_text("x")
    said = cli(*words, expect=7, capsys=capsys)
    assert "exists" in said["problems"][0]


# ---------------------------------------------------------------------------- healing

# The command, whose process is gone in the middle of its third step.
KILLED = """
import importlib, os, sys
from luthier.cli import main
module = importlib.import_module("luthier.train")
take = module.Trainer._take
def taken(self):
    if self.step == 3:
        os._exit(9)
    return take(self)
module.Trainer._take = taken
sys.exit(main(sys.argv[1:]))
"""
HEAL = ["--heal", "distill", "--steps", "6", "batch.examples=4", "optim.learning_rate=3e-3", "data.max_length=64"]


def test_healing_by_distillation_goes_on_after_a_kill(deep, rows_file, tmp_path, capsys):
    from safetensors.torch import load_file

    words = ["--by", "depth", "--target", "0.5", "--data", rows_file, "--held-out", "6", *HEAL]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done = cli("prune", deep, whole, *words, capsys=capsys)
    assert done["figures"]["perplexity"]["tuned"] < done["figures_pruned"]["perplexity"]["tuned"]
    assert done["steps"] == 6
    assert done["shape"]["num_hidden_layers"] == 2

    command = ["prune", str(deep), str(parted), *map(str, words), "checkpoint.every=2", "--quiet"]
    ran = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, text=True)
    assert ran.returncode == 9, ran.stderr
    assert not parted.exists()
    again = cli(*command[:-1], capsys=capsys)
    assert (tmp_path / "parted-healing" / "run" / "report.json").exists()
    a, b = load_file(whole / "model.safetensors"), load_file(parted / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert again["figures"]["perplexity"] == done["figures"]["perplexity"]


def test_a_healing_of_another_pruning_is_not_gone_on_with(deep, rows_file, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["prune", deep, out, "--by", "magnitude", "--data", rows_file, "--held-out", "6", *HEAL, "max_steps=2"]
    cli(*words, "--target", "0.5", capsys=capsys)
    import shutil

    shutil.rmtree(out)
    said = cli(*words, "--target", "0.6", expect=2, capsys=capsys)
    assert "was pruned from another source or with other settings" in said["problems"][0]


@pytest.mark.parametrize("heal", ["distill", "next_token"])
def test_healing_keeps_zeros(heal, deep, rows_file, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    words = ["prune", deep, out, "--by", "wanda", "--pattern", "2:4", "--data", rows_file, "--held-out", "6", *HEAL]
    words[words.index("distill")] = heal
    done = cli(*words, "optim.weight_decay=0.1", capsys=capsys)
    assert done["zeros"] == done["weights"] // 2
    model, start = (AutoModelForCausalLM.from_pretrained(f) for f in (out, tmp_path / "out-healing" / "pruned"))
    for (name, healed), pruned in zip(model.named_parameters(), start.parameters()):
        if "proj" in name:
            assert torch.equal(healed == 0, pruned == 0), name
            assert not torch.equal(healed, pruned), name


def test_what_healing_refuses(deep, rows_file, tmp_path, capsys):
    words = ["prune", deep, tmp_path / "out", "--by", "magnitude", "--target", "0.5", "--data", rows_file, *HEAL]
    for more, told in (
        ("optim.kind=muon", "optim.kind=muon"), ("trainable.kind=lora", "trainable.kind=lora"),
        ("model=x", "follows from the command"), ("optim.learning_rat=1", "learning_rat"),
    ):  # fmt: skip
        said = cli(*words, more, expect=2, capsys=capsys)
        assert any(told in problem for problem in said["problems"]), said
    assert list(tmp_path.glob("out*")) == []


def test_a_run_is_pruned_and_healed_on_its_own_rows(settings, tmp_path, capsys):
    """A LoRA is merged first; its rows, its held-out rows and its metric are the run's own."""
    from luthier import configure, train
    from luthier.monitor import Console

    config = configure(settings, {"evaluation": {"generate": 3, "max_new_tokens": 8}}, method="lora")
    run = train(config, Console(quiet=True)).folder
    out = tmp_path / "out"
    done = cli(
        "prune", run, out, "--by", "depth", "--target", "0.5", "--heal", "distill", "--steps", "2", capsys=capsys
    )
    assert done["figures"].keys() >= {"perplexity", "exact_match"}
    report = json.loads((run / "report.json").read_text())["figures"]
    assert done["figures"]["perplexity"]["base"] == pytest.approx(report["perplexity"]["tuned"], rel=1e-3)
    assert done["shape"]["num_hidden_layers"] == 1


def test_runs_that_cannot_be_pruned(settings, tmp_path, capsys):
    from luthier import configure, train
    from luthier.monitor import Console

    quiet = {"max_steps": 1, "data": {"validation": None}}
    run = train(configure(settings, quiet, method="prefix"), Console(quiet=True)).folder
    said = cli("prune", run, tmp_path / "out", "--by", "magnitude", "--target", "0.5", expect=4, capsys=capsys)
    assert "no plain weights compute what its prefix adds" in said["problems"][0]
    said = cli(
        "prune", tmp_path / "none", tmp_path / "out", "--by", "magnitude", "--target", "0.5", expect=4, capsys=capsys
    )
    assert "does not exist" in said["problems"][0]
