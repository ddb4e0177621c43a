"""LoRA: patterns, first values, embeddings and heads, experts, what is trained beside it; against PEFT throughout."""

import json
import warnings

import pytest
import torch
from conftest import FAMILIES, LLAMA, make_model, make_tokenizer
from test_parity import documents, packed_network, plain_loss
from test_train import QUIET, finished, in_two_parts
from torch import nn

from luthier import configure, steps, train
from luthier.batch import Batch
from luthier.errors import ConfigError, ModelError
from luthier.models import network, trials
from luthier.objectives import NextToken
from luthier.surgery import adapters, adapters_off, dense, innermost, merged_state, trainable
from luthier.trainable import DoRA, LoRA, saved


def mixtral(**extra):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2, **extra))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model.eval()


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(**LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    return Qwen3MoeForCausalLM(config).eval()


def gpt_oss():
    """Experts that are kept as [experts, in, out], with biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(**LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    return GptOssForCausalLM._from_config(config, attn_implementation="eager").eval()


MIXTURES = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


def tied_llama():
    return make_model(tie_word_embeddings=True)


def disturb(model, size=0.1) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * size)


TOKENS = (torch.arange(24).view(2, 12) * 37 + 11) % 300


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def in_peft(model, base, settings, folder, **more):
    """What is saved, loaded by PEFT over the base as it was; no key may be left over on either side."""
    from peft import PeftModel

    folder.mkdir(exist_ok=True)
    saved.write(folder, model, settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True.*|.*tied.*|fan_in_fan_out")
        loaded = PeftModel.from_pretrained(base, folder, **more).eval()
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    ours = load_file(folder / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    return loaded


def rule(model, name):
    return dict(adapters(model))[name].rule


# ---------------------------------------------------------------------------- ranks and alphas


def test_patterns_of_ranks_and_alphas():
    """The first that matches counts; a layer that only a rank is given for keeps lora_alpha."""
    model = make_model()
    settings = LoRA(
        r=4,
        lora_alpha=8,
        rank_pattern={"re:.*\\.1\\..*q_proj": 2, "q_proj": 3, "*.mlp.*": 5},
        alpha_pattern={"k_proj": 1},
    )
    settings.apply(model)
    expected = {"0.self_attn.q_proj": (3, 8 / 3), "1.self_attn.q_proj": (2, 4.0), "0.mlp.up_proj": (5, 8 / 5),
                "1.self_attn.k_proj": (4, 1 / 4), "1.self_attn.o_proj": (4, 2.0)}  # fmt: skip
    for name, (r, scaling) in expected.items():
        assert (rule(model, f"model.layers.{name}").r, rule(model, f"model.layers.{name}").scaling) == (r, scaling)
        assert dict(adapters(model))[f"model.layers.{name}"].lora_A.shape[0] == r
    assert LoRA(r=4, lora_alpha=8, use_rslora=True, rank_pattern={"x": 16}).scale("x") == (16, 2.0)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_patterns_are_read_by_peft_and_back(use_rslora, init, tmp_path):
    model, base = make_model(), make_model()
    settings = LoRA(
        r=4, lora_alpha=6, use_rslora=use_rslora, init_lora_weights=init, alpha_pattern={"k_proj": 1},
        rank_pattern={"re:.*\\.1\\..*q_proj": 2, "layers.0.self_attn.q_proj": 3, "*.mlp.*": 5},
    )  # fmt: skip
    settings.apply(model)
    disturb(model)
    loaded = in_peft(model, base, settings, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    read = LoRA.from_peft(json.loads((tmp_path / "adapter_config.json").read_text()))
    for name, adapter in adapters(model):
        r, scaling = read.scale(name)
        assert r == adapter.rule.r * (2 if init == "pissa" else 1)
        assert scaling == pytest.approx(adapter.rule.scaling)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank_pattern": {"q_prj": 2}}, r"rank_pattern: 'q_prj' matches none of the layers .*did you mean 'q_proj'"),
        ({"alpha_pattern": {"lm_head": 2}}, r"alpha_pattern: 'lm_head' matches none"),
        (
            {"rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 3}},
            r"patterns before .* take all that it matches",
        ),
        ({"layers_to_transform": [2]}, r"layers_to_transform=\[2\]: the model has layers 0 to 1"),
        ({"target_modules": ["embed_token"]}, r"did you mean 'embed_tokens'"),
        ({"modules_to_save": ["lmhead"]}, r"modules_to_save: 'lmhead' matches no module.*did you mean 'lm_head'"),
        (
            {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
            "lm_head is in target_modules, too",
        ),
        ({"ensure_weight_tying": True, "modules_to_save": ["lm_head"]}, "the model's head is not tied"),
        ({"target_parameters": ["experts.up"]}, "matches no fused expert weight; the model has none"),
        ({"r": 17, "init_lora_weights": "pissa"}, r"r=17.*at most 16 for a layer of 32 inputs and 16 outputs"),
        ({"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"}, "is of linear layers, and .*embed_tokens"),
    ],
)
def test_what_does_not_fit_the_model_is_told(settings, match):
    with pytest.raises(ModelError, match=match):
        LoRA(**settings).apply(make_model())


@pytest.mark.parametrize(
    ("trainable_", "match"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 0.0}}, "alpha_pattern"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights"),
        ({"init_lora_weights": False}, "init_lora_weights"),
        ({"zero_init": "B"}, "zero_init"),
        ({"zero_init": "lora_A", "init_lora_weights": "pissa"}, r"zero_init=lora_A.*neither is zero"),
        ({"target_modules": []}, "target_modules=\\[\\]: nothing"),
        ({"target_parameters": ["experts.gate_up_proj"], "lora_dropout": 0.1}, "lora_dropout=0.1"),
        ({"layers_to_transform": []}, "layers_to_transform=\\[\\]"),
    ],
)
def test_contradictions(settings, trainable_, match):
    with pytest.raises(ConfigError, match=match):
        configure(settings, {"trainable": trainable_})


def test_names_of_other_libraries():
    from luthier.faults import ELSEWHERE, keys

    for name in ("additional_target", "lora_modules_to_save", "use_dora", "pissa_init", "lora_target_parameters"):
        assert ELSEWHERE[name] in {*keys(), "method"}


def test_only_in_some_layers(tmp_path):
    model, base = make_model(), make_model()
    settings = LoRA(r=2, layers_to_transform=[1], target_modules="attention")
    settings.apply(model)
    assert {name for name, _ in adapters(model)} == {f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"}
    disturb(model)
    torch.testing.assert_close(logits(in_peft(model, base, settings, tmp_path)), logits(model), rtol=1e-5, atol=1e-5)


def test_a_rank_above_the_layers_is_told():
    model = make_model()
    settings = LoRA(r=20)
    settings.apply(model)
    (line,) = settings.remarks(model)
    assert (
        "rank 20 is more than the 16 that model.layers.0.self_attn.k_proj [16, 32] can have, and so of 4 layers" in line
    )
    assert LoRA(r=16).remarks(model)  # what is told is what stands in the model
    low = make_model()
    LoRA(r=16).apply(low)
    assert LoRA(r=16).remarks(low) == []


def test_the_papers_number_of_weights_that_move():
    """arXiv:2106.09685: 4.7M and 37.7M for GPT-3 175B with r = 1 and 8 on q and v, whose shapes OPT-175B has."""
    from transformers import OPTConfig, OPTForCausalLM

    for r, counted in ((1, "4.7M"), (8, "37.7M")):
        with torch.device("meta"):
            model = OPTForCausalLM(
                OPTConfig(hidden_size=12288, num_hidden_layers=96, num_attention_heads=96, ffn_dim=49152,
                          word_embed_proj_dim=12288)
            )  # fmt: skip
        LoRA(r=r, target_modules=["q_proj", "v_proj"]).apply(model)
        assert f"{sum(p.numel() for p in trainable(model).values()) / 1e6:.1f}M" == counted


# ---------------------------------------------------------------------------- first values


def test_first_values():
    """Drawn with the deviations that their definitions have, and one matrix zero; `true` is PEFT's word for kaiming."""
    found = {}
    for init in ("kaiming", True, "gaussian"):
        for zero in (None, "lora_A"):
            torch.manual_seed(0)
            model = nn.Module()
            layer = nn.Linear(500, 300)
            from luthier.surgery import Adapter

            model = Adapter(layer, LoRA(r=8, init_lora_weights=init, zero_init=zero).rule("x", layer))
            drawn, still = (model.lora_B, model.lora_A) if zero else (model.lora_A, model.lora_B)
            assert not still.any()
            columns = drawn.shape[1]
            deviation = 1 / 8 if init == "gaussian" else 1 / (3 * columns) ** 0.5
            assert drawn.std().item() == pytest.approx(deviation, rel=0.05)
            found[init, zero] = drawn.detach()
    assert torch.equal(found[True, None], found["kaiming", None])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8"])
def test_pissa_equals_peft(family, init, tmp_path):
    """Outputs and gradients of PEFT's, which changes the base; the base here is as it was, with adapters off and in
    what is saved, which is a plain LoRA of twice the rank over the model as it was."""
    from peft import LoraConfig, get_peft_model

    net, base = packed_network(family), make_model(family)
    settings = LoRA(r=4, lora_alpha=6, init_lora_weights=init)
    settings.apply(net.model)
    torch.manual_seed(3)
    theirs = get_peft_model(
        make_model(family),
        LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, target_modules="all-linear", task_type="CAUSAL_LM",
                   fan_in_fan_out=family == "gpt2"),
    )  # fmt: skip
    wrapped = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    for name, adapter in adapters(net.model):
        other = wrapped[name]
        a, b = (side["default"].weight.detach() for side in (other.lora_A, other.lora_B))
        if init == "pissa":
            torch.testing.assert_close(adapter.lora_B @ adapter.lora_A, b @ a, rtol=1e-3, atol=1e-4)
        else:  # found at random, but as near to the weight as theirs
            mine, other_ = ((w - 1.5 * product).norm().item() for w, product in (
                (dense(adapter.base)["weight"], adapter.lora_B @ adapter.lora_A),
                (dense(adapter.base)["weight"], b @ a),
            ))  # fmt: skip
            assert mine == pytest.approx(other_, rel=0.05)
        with torch.no_grad():  # vectors are free in sign, and in the randomised case in more: from here on the same
            adapter.lora_A.copy_(a)
            adapter.lora_B.copy_(b)
            adapter.lora_A_start.copy_(a)
            adapter.lora_B_start.copy_(b)
            torch.manual_seed(len(name))
            for mine, side in ((adapter.lora_A, other.lora_A), (adapter.lora_B, other.lora_B)):
                mine.add_(torch.randn_like(mine) * 0.1)
                side["default"].weight.copy_(mine)
    docs = documents()
    loss = NextToken().build()(net, Batch.pack(docs))
    expected = sum(plain_loss(theirs, d)[0] for d in docs)
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=1e-3)
    loss.total.backward()
    expected.backward()
    for name, adapter in adapters(net.model):
        for side in ("lora_A", "lora_B"):
            gradient = getattr(wrapped[name], side)["default"].weight.grad
            torch.testing.assert_close(getattr(adapter, side).grad, gradient, rtol=5e-3, atol=5e-4)
    with net.natively() as model:
        with adapters_off(model):
            assert torch.equal(logits(model), logits(base))
        written = in_peft(model, base, settings, tmp_path)
        torch.testing.assert_close(logits(written), logits(model), rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8


def test_pissa_starts_at_the_base_with_the_best_approximation():
    """By Eckart and Young no matrix of rank r is nearer to W than the principal part, whose error is known."""
    model, base = make_model(), make_model()
    settings = LoRA(r=4, lora_alpha=6, init_lora_weights="pissa")
    settings.apply(model)
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-5, atol=1e-5)
    for _, adapter in adapters(model):
        weight = adapter.base.weight
        left = weight - settings.scale("")[1] * adapter.lora_B @ adapter.lora_A
        assert left.norm().item() == pytest.approx(torch.linalg.svdvals(weight)[4:].norm().item(), rel=1e-4)


def test_pissa_of_peft_that_was_not_converted_is_refused():
    values = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 4}
    assert LoRA.from_peft({**values, "init_lora_weights": "gaussian"}).r == 4
    for first in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"):
        with pytest.raises(ModelError, match=f"init_lora_weights='{first}'.*path_initial_model_for_weight_conversion"):
            LoRA.from_peft({**values, "init_lora_weights": first})


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_qalora", True), ("trainable_token_indices", [1]), ("lora_bias", True), ("bias", "all"),
     ("layer_replication", [[0, 2]]), ("alora_invocation_tokens", [3]), ("megatron_config", {"a": 1}),
     ("arrow_config", {"top_k": 2}), ("kasa_config", {"beta": 1}), ("use_bdlora", {"nblocks": 2}),
     ("corda_config", {"x": 1}), ("lora_ga_config", {"x": 1}), ("velora_config", {"x": 1}),
     ("monteclora_config", {"x": 1}), ("a_key_of_tomorrow", 1)],
)  # fmt: skip
def test_what_would_be_ignored_of_a_foreign_configuration_is_refused(key, value):
    values = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 4, key: value}
    with pytest.raises(ModelError, match=key):
        LoRA.from_peft(values)


def test_every_key_that_peft_writes_is_understood(tmp_path):
    from peft import LoraConfig

    LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert LoRA.from_peft(values) == LoRA(r=4, lora_alpha=2, target_modules=["q_proj"], target_parameters=[])


# ---------------------------------------------------------------------------- embeddings and heads


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("zero_init", [None, "lora_B"])
def test_embeddings_and_head_equal_peft(family, zero_init, tmp_path):
    """Identity at the start, loss and gradients, what is saved, merged = unmerged."""
    net, base, merged = packed_network(family), make_model(family), make_model(family)
    base.get_input_embeddings().padding_idx = None  # no token is left out of training here
    table, head = ("wte", "lm_head") if family == "gpt2" else ("embed_tokens", "lm_head")
    settings = LoRA(r=4, lora_alpha=6, target_modules=["all-linear", table, head], zero_init=zero_init)
    with torch.no_grad():
        before = net.hidden(Batch.pack(documents()))
        settings.apply(net.model)
        torch.testing.assert_close(net.hidden(Batch.pack(documents())), before, rtol=0, atol=0)
    trials.check_head(net)
    disturb(net.model)
    folder = tmp_path / "adapter"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True.*|.*tied.*|fan_in_fan_out")
        with net.natively() as model:
            theirs = in_peft(model, base, settings, folder, is_trainable=True)
            torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    docs = documents()
    loss = NextToken().build()(net, Batch.pack(docs))
    expected = sum(plain_loss(theirs, d)[0] for d in docs)
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-3)
    loss.total.backward()
    expected.backward()
    wrapped = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    for name, adapter in adapters(net.model):
        for leaf, p in adapter.named_parameters(recurse=False):
            other = getattr(wrapped[name], leaf)["default"]
            gradient = (other if isinstance(other, nn.Parameter) else other.weight).grad
            torch.testing.assert_close(
                p.grad, gradient, rtol=5e-3, atol=5e-4, msg=lambda m, n=f"{name} {leaf}": f"{n}: {m}"
            )
    state = merged_state(net.model)
    merged.config.tie_word_embeddings = False
    merged.lm_head.weight = nn.Parameter(merged.lm_head.weight.detach().clone())
    merged.load_state_dict(state)
    with net.natively() as model:
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
        with adapters_off(model):
            torch.testing.assert_close(logits(model), logits(make_model(family)), rtol=0, atol=0)


@pytest.mark.parametrize("which", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("in_full", [False, True])
def test_tied_embeddings_stay_one_matrix_or_it_is_told(which, in_full, tmp_path):
    """Without ensure_weight_tying what is named moves alone, and that is said; with it both ends compute one matrix."""
    more = {"modules_to_save": [which]} if in_full else {"target_modules": ["q_proj", which]}
    apart, together = tied_llama(), tied_llama()
    LoRA(r=4, **more).apply(apart)
    (line,) = LoRA(r=4, **more).remarks(apart)
    assert "are one matrix, and" in line
    assert which in line.partition("and ")[2]
    assert "ensure_weight_tying=true" in line
    settings = LoRA(r=4, **more, ensure_weight_tying=True)
    settings.apply(together)
    assert settings.remarks(together) == []
    before = logits(together)
    torch.testing.assert_close(before, logits(tied_llama()), rtol=0, atol=0)
    disturb(together)
    disturb(apart)
    state, parted = merged_state(together), merged_state(apart)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert not torch.equal(parted["lm_head.weight"], parted["model.embed_tokens.weight"])
    assert (logits(together) - before).abs().max() > 1e-2
    plain = tied_llama()
    plain.load_state_dict(state)
    torch.testing.assert_close(logits(plain), logits(together), rtol=1e-4, atol=1e-4)
    for name, model, config in (("together", together, settings), ("apart", apart, LoRA(r=4, **more))):
        loaded = in_peft(model, tied_llama(), config, tmp_path / name)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    moved = [p for p in trainable(together).values() if p.shape[0] == 320 or p.shape[-1] == 320]
    assert len(moved) == 1, "one matrix with a row or column for each token, whichever end was named"


def test_the_gradient_of_tied_ends_is_that_of_one_matrix():
    """A copy that both ends share gets the gradient that a tied embedding gets in plain full fine-tuning."""
    ours, plain = network.Network(tied_llama()), tied_llama()
    LoRA(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True).apply(ours.model)
    docs = documents()
    NextToken().build()(ours, Batch.pack(docs)).total.backward()
    sum(plain_loss(plain, d)[0] for d in docs).backward()
    mine = ours.model.get_input_embeddings().trained.weight.grad
    torch.testing.assert_close(mine, plain.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------- trained in full beside it


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens", "lm_head"], ["input_layernorm"], ["layers.1.mlp"]])
def test_modules_to_save(names, tmp_path):
    """A copy moves, the base stays; PEFT reads the copy; the fused loss is used where the head is plain."""
    net, base, merged = packed_network(), make_model(), make_model()
    settings = LoRA(r=4, modules_to_save=names)
    settings.apply(net.model)
    copies = {n for n, a in adapters(net.model) if hasattr(a, "trained")}
    assert all(any(n.endswith(name) for n in copies) for name in names)
    assert not any(n.startswith("model.layers.1.mlp.") for n, _ in adapters(net.model) if "layers.1.mlp" in names)
    with net.natively() as model:
        torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=0)
    assert net.head.linear
    disturb(net.model, 0.05)
    merged.load_state_dict(merged_state(net.model))
    with net.natively() as model:
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
        assert (logits(model) - logits(base)).abs().max() > 1e-2
        with adapters_off(model):
            torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=0)
            assert net.head.linear
        torch.testing.assert_close(
            logits(in_peft(model, base, settings, tmp_path)), logits(model), rtol=1e-5, atol=1e-5
        )


def test_a_copy_has_the_gradient_of_full_fine_tuning():
    ours, plain = packed_network(), make_model()
    LoRA(r=2, modules_to_save=["lm_head", "embed_tokens"]).apply(ours.model)
    docs = documents()
    NextToken().build()(ours, Batch.pack(docs)).total.backward()
    sum(plain_loss(plain, d)[0] for d in docs).backward()
    for name in ("lm_head", "model.embed_tokens"):
        adapter = ours.model.get_submodule(name)
        torch.testing.assert_close(
            adapter.trained.weight.grad, plain.get_submodule(name).weight.grad, rtol=1e-3, atol=1e-4
        )
        assert adapter.base.weight.grad is None


def test_a_copy_by_a_share():
    model, base = make_model(), make_model()
    LoRA(r=2, target_modules=["q_proj"], modules_to_save=["norm", "lm_head"]).apply(model)
    disturb(model, 0.1)
    for _, adapter in adapters(model):
        adapter.share = 0.3
    plain = make_model()
    plain.load_state_dict(merged_state(model))
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(plain) - logits(base)).abs().max() > 1e-3


def test_a_copy_of_a_quantised_layer_is_plain():
    from test_dora import Halves

    model = make_model()
    model.model.layers[0].mlp.up_proj = Halves(model.model.layers[0].mlp.up_proj)
    before = logits(model)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp holds layers in fewer bits"):
        LoRA(r=2, target_modules=["q_proj"], modules_to_save=["layers.0.mlp"]).apply(model)
    LoRA(r=2, target_modules=["q_proj"], modules_to_save=["layers.0.mlp.up_proj"]).apply(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    adapter = model.model.layers[0].mlp.up_proj
    assert type(adapter.trained) is nn.Linear
    assert adapter.trained.weight.requires_grad
    disturb(model)
    plain = make_model()
    plain.load_state_dict(merged_state(model))
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- experts


@pytest.mark.parametrize("family", MIXTURES)
def test_fused_experts_equal_peft(family, tmp_path):
    """all-linear reaches the experts, not the routers; PEFT reads what is saved, with equal logits and gradients."""
    made = MIXTURES[family]
    model, base, merged = made(), made(), made()
    settings = LoRA(r=3, lora_alpha=6)
    before = logits(model)
    settings.apply(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    names = {n for n, _ in adapters(model)}
    assert {n for n in names if n.endswith("experts")} == {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert not any("router" in n or "gate" in n for n in names)
    disturb(model)
    merged.load_state_dict(merged_state(model))
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    with adapters_off(model):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    theirs = in_peft(model, base, settings, tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    for one in (model, theirs):
        one(input_ids=TOKENS, labels=TOKENS).loss.backward()
    theirs_of = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(theirs_of) == len(trainable(model))
    for name, adapter in adapters(model):
        if not name.endswith("experts"):
            continue
        order = list(adapter.rule.weights)
        assert order == ["gate_up_proj", "down_proj"]
        for depth, weight in enumerate(reversed(order)):
            for side in ("lora_A", "lora_B"):
                key = f"base_model.model.{name}{'.base_layer' * depth}.{side}.default.weight"
                mine = getattr(adapter, side)[weight].grad
                assert mine.abs().max() > 0
                torch.testing.assert_close(mine, theirs_of[key].grad, rtol=1e-3, atol=1e-6, msg=key)


def test_experts_of_peft_are_read(tmp_path):
    """Theirs loads here: their file's tensors into ours by name, and the settings from their configuration."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    model = mixtral()
    given = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=["experts.down_proj", "experts.gate_up_proj"]
    )
    theirs = get_peft_model(mixtral(), given)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    given.save_pretrained(tmp_path)
    settings = LoRA.from_peft(json.loads((tmp_path / "adapter_config.json").read_text()))
    settings.apply(model)
    live, read = settings.saved(model), get_peft_model_state_dict(theirs)
    assert live.keys() == read.keys()
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(read[key])
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_what_of_the_experts_is_adapted():
    def found(**settings):
        model = mixtral()
        LoRA(r=2, **settings).apply(model)
        return {n.rpartition(".")[2]: tuple(getattr(a.rule, "weights", ())) for n, a in adapters(model) if ".0." in n}

    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), ())
    assert found() == attention | {"experts": ("gate_up_proj", "down_proj")}
    assert found(target_modules="mlp") == {"experts": ("gate_up_proj", "down_proj")}
    assert found(target_modules="attention") == attention
    assert found(target_modules=[], target_parameters=["experts.down_proj"]) == {"experts": ("down_proj",)}
    assert found(target_parameters=["gate_up_proj"]) == attention | {"experts": ("gate_up_proj",)}
    assert found(exclude_modules=["down_proj"]) == attention | {"experts": ("gate_up_proj",)}
    with pytest.raises(
        ModelError, match=r"'experts.down_prj' matches no fused expert weight; did you mean 'experts.down_proj'"
    ):
        found(target_parameters=["experts.down_prj"])
    with pytest.raises(ModelError, match=r"lora_dropout=0\.1: fused expert weights"):
        found(lora_dropout=0.1)
    with pytest.raises(ModelError, match="init_lora_weights=pissa is of linear layers, not of fused expert weights"):
        found(init_lora_weights="pissa")


def test_experts_have_ranks_of_their_own_and_stack():
    model, plain = mixtral(), mixtral()
    LoRA(r=2, target_modules="mlp", rank_pattern={"experts.down_proj": 1}).apply(model, "first")
    disturb(model)
    LoRA(r=3, target_modules="mlp").apply(model, "second")
    disturb(model)
    layer = model.model.layers[0].mlp.experts
    assert layer.base.lora_A["down_proj"].shape[0] == 4 * 1
    assert layer.lora_A["down_proj"].shape[0] == 4 * 3
    for names in ((), ("first",), ("second",)):
        with adapters_off(model, names):
            plain.load_state_dict(merged_state(model))
            torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".base.lora" in n)
    assert innermost(layer).gate_up_proj.requires_grad is False


@pytest.mark.parametrize("settings", [LoRA(r=2), LoRA(r=2, target_modules="attention")])
def test_experts_are_no_matter_of_rows_or_micro_batches(settings):
    """Gradients of all documents at once, of smaller batches, and of each document by itself. (The family runs padded:
    its sums over tokens of an expert are not the same to the bit with other neighbours.)"""
    net, plain = network.Network(mixtral()), mixtral()
    trials.prepare(net, "auto")
    for model in (net.model, plain):
        torch.manual_seed(7)
        settings.apply(model)
        disturb(model)
    docs, objective, found = documents((9, 17, 4, 12)), NextToken().build(), []
    for limit in (1000, 18):
        net.model.zero_grad()
        for part in Batch.pack(docs).split(limit):
            objective(net, part).total.backward()
        found.append({n: p.grad.clone() for n, p in trainable(net.model).items()})
    sum(plain_loss(plain, d)[0] for d in docs).backward()
    for name, p in trainable(plain).items():
        for gradients in found:
            torch.testing.assert_close(gradients[name], p.grad, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------------- in 16 bits


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (make_model, LoRA(r=2, target_modules=["all-linear", "embed_tokens", "lm_head"])),
        (make_model, LoRA(r=2, init_lora_weights="pissa")),
        (make_model, LoRA(r=2, modules_to_save=["embed_tokens", "lm_head", "norm"])),
        (make_model, DoRA(r=2)),
        (tied_llama, LoRA(r=2, target_modules=["all-linear", "embed_tokens"], ensure_weight_tying=True)),
        (mixtral, LoRA(r=2)),
    ],
)
def test_over_a_base_in_16_bits(make, settings):
    """The output keeps its dtype, a fresh adapter changes nothing, what is merged and rounded is near, all that moves
    has a gradient."""
    model, merged = make().bfloat16(), make().bfloat16()
    before = logits(model)
    settings.apply(model)
    fresh = logits(model)
    assert fresh.dtype == torch.bfloat16
    torch.testing.assert_close(fresh, before, rtol=0, atol=2e-2 if settings.pissa else 0)
    disturb(model)
    tuned = logits(model)
    state = merged_state(model)
    assert all(t.dtype == torch.bfloat16 for t in state.values())
    if make is tied_llama:
        assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    else:
        merged.load_state_dict(state)
        assert (logits(merged) - tuned).float().norm() < 0.1 * (tuned - before).float().norm()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(model).values())


# ---------------------------------------------------------------------------- in the loop


def test_lora_plus_acts_on_every_b():
    """Those of linear layers and experts, not embeddings, whose second matrix is no B of that paper, nor copies."""
    from luthier.optim import AdamW, groups

    model = mixtral()
    LoRA(r=2, target_modules=["all-linear", "embed_tokens"], modules_to_save=["norm"]).apply(model)
    moving = trainable(model)
    made = groups.buckets(moving, AdamW(learning_rate=1e-3, loraplus_lr_ratio=8), {})
    rates = {name: bucket.rate for bucket in made for name in bucket.names}
    assert set(rates) == set(moving)
    for name, rate in rates.items():
        assert rate == pytest.approx(8e-3 if ".lora_B" in name else 1e-3), name
    assert {"down_proj", "lora_B"} <= {name.rpartition(".")[2] for name, rate in rates.items() if rate > 1e-3}


def test_a_mixture_of_experts_in_the_loop(settings, tmp_path):
    """Trained, resumed, exported; PEFT and transformers read it in a fresh process."""
    from luthier.export import export

    mixtral().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    given = {"model": str(tmp_path / "base"), "trainable": {"r": 2}, "checkpoint": {"every": 2}}
    whole = configure(settings, given)
    train(whole, QUIET)
    parted = configure(settings, given, {"output_dir": str(tmp_path / "parted")})
    for step in steps(parted, QUIET):
        if step.step == 3:
            break
    train(parted, QUIET)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")
    for kind in ("adapter", "merged"):
        compared = export(tmp_path / "run", tmp_path / kind, kind)
        assert compared["largest_difference"] < 1e-4
        assert compared["difference_to_base"] > 1e-3


EVERYTHING = {
    "r": 4, "lora_dropout": 0.1, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5.0},
    "target_modules": ["all-linear", "embed_tokens"], "modules_to_save": ["lm_head", "model.norm"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "kinds"),
    [(EVERYTHING, ["adapter", "merged"]), ({"r": 4, "init_lora_weights": "pissa_niter_2"}, ["adapter"]),
     ({"r": 4, "zero_init": "lora_A"}, [])],
)  # fmt: skip
def test_stopped_and_resumed_and_exported(settings, given, kinds, tmp_path):
    from luthier.export import export

    optim = {"optim": {"loraplus_lr_ratio": 4}, "checkpoint": {"every": 2}}
    whole = configure(settings, {"trainable": given}, optim)
    assert whole.trainable.model_dump(include=set(given)) == given, "in the resolved configuration"
    train(whole, QUIET)
    parted = configure(settings, {"trainable": given}, optim, {"output_dir": str(tmp_path / "parted")})
    in_two_parts(parted, 3)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")
    for kind in kinds:
        compared = export(tmp_path / "run", tmp_path / kind, kind)
        assert compared["largest_difference"] < 1e-4
        assert compared["difference_to_base"] > 1e-2


@pytest.mark.parametrize("together", [False, True])
def test_new_tokens_are_learnt_beside_a_lora(settings, rows_file, tmp_path, together):
    """Embeddings and head move in full, tied or not; the export is read by PEFT over the base with its rows added."""
    from luthier.export import export

    base = tmp_path / "tied"
    (tied_llama() if together else make_model()).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    given = {"r": 2, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True} if together else {
        "r": 2, "modules_to_save": ["embed_tokens", "lm_head"]
    }  # fmt: skip
    rows = [{"prompt": f"<tool> {n}", "completion": f"{n} <tool>"} for n in range(16)]
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    new = [f"<extra_{i}>" for i in range(70)]
    run = {
        "model": {"name": str(base), "new_tokens": ["<tool>", *new], "new_tokens_special": False},
        "trainable": given,
    }
    train(configure(settings, run), QUIET)
    for kind in ("adapter", "merged"):
        compared = export(tmp_path / "run", tmp_path / kind, kind)
        assert compared["largest_difference"] < 1e-4
    tied = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert tied is together


def test_new_tokens_whose_embeddings_would_not_move_are_refused(settings, tmp_path):
    run = {"model": {"name": settings["model"], "new_tokens": ["<tool>"]}}
    with pytest.raises(ConfigError, match="modules_to_save"):
        configure(settings, run)
    with pytest.raises(ModelError, match="the head would not move"):
        train(configure(settings, run, {"trainable": {"modules_to_save": ["embed_tokens"]}}), QUIET)
