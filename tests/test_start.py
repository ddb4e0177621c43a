"""Random starts: the family's own first values, from the seed alone; what contradicts itself or loads in part."""

import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_model, make_tokenizer, save_model, write_rows
from safetensors.torch import load_file, save_file
from test_ranks import run_on_two
from test_train import Forked

from luthier import checkpoint, configure, train
from luthier.assemble import assemble, tokenizer_and_renderer
from luthier.data.formats import FORMATS
from luthier.errors import ConfigError, ModelError
from luthier.models import Model, load, names, start
from luthier.models.sizes import SIZES
from luthier.monitor import Console

QUIET = Console(quiet=True)
CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "llama": SMALL | {"model_type": "llama", "num_key_value_heads": 2},
    "qwen3": SMALL | {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.05},
    "gemma3": SMALL | {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 8},
    "phi": SMALL | {"model_type": "phi"},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def random_start(keys, dtype=torch.float32, seed=3, **extra):
    model = names.resolved(Model(config=keys, **extra))
    return start.random_model(model, make_tokenizer(), dtype, seed, 64)


# ---------------------------------------------------------------------------- first values


@pytest.mark.parametrize("family", CONFIGS)
def test_first_values_are_those_of_the_family(family):
    """As `from_config` of transformers draws them after the same seed, whatever was drawn before."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    state = torch.get_rng_state()
    ours = random_start(CONFIGS[family])
    assert torch.equal(torch.get_rng_state(), state)
    values = {k: v for k, v in CONFIGS[family].items() if k != "model_type"} | {"vocab_size": 259}
    unnamed = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(CONFIGS[family]["model_type"], **values, **unnamed)
    torch.manual_seed(3)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert ours.get_input_embeddings().weight.abs().sum(1).min() > 0  # no row is left at zero


def test_matrices_have_the_deviation_and_norms_are_one():
    model = random_start(CONFIGS["qwen3"])
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert p.std().item() == pytest.approx(0.05, rel=0.1), name
            assert abs(p.mean().item()) < 0.01, name
        else:
            assert torch.equal(p, torch.ones_like(p)), name


def test_another_seed_gives_other_values():
    one, two = (random_start(CONFIGS["llama"], seed=seed) for seed in (3, 4))
    assert not torch.equal(one.get_input_embeddings().weight, two.get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_16_bits_are_rounded_from_32_as_transformers_loads_them(family, tmp_path):
    """Parameters and buffers alike: rotary frequencies stay in float32, or angles would be wrong far away."""
    from transformers import AutoModelForCausalLM

    wide, short = (random_start(CONFIGS[family], dtype) for dtype in (torch.float32, torch.bfloat16))
    wide.save_pretrained(tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(short, kind)()), dict(getattr(loaded, kind)())
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
    assert short.config.dtype == torch.bfloat16
    assert random_start(CONFIGS[family], torch.bfloat16)(torch.arange(5)[None]).logits.isfinite().all()


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_as_counted(size):
    from transformers import AutoModelForCausalLM

    made = SIZES[size]
    config = start._of_keys(made.config(1000, 64))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == made.parameters(1000)
    assert config.head_dim in (32, 64)
    assert config.max_position_embeddings == made.context
    assert start._of_keys(made.config(1000, 9999)).max_position_embeddings == 9999
    written = {"tiny": 1.3, "1b": 1236}.get(size) or float(size.removesuffix("m"))
    assert made.parameters(made.vocabulary) / 1e6 == pytest.approx(written, rel=0.1)


def test_named_tokens_agree_everywhere():
    for family in ("llama", "gemma3", "gpt2"):  # each has other ids by default
        model, tokenizer = random_start(CONFIGS[family]), make_tokenizer()
        for part in (model.config, model.generation_config):
            ids = (part.bos_token_id, part.eos_token_id, part.pad_token_id)
            assert ids == (None, tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_the_vocabulary_follows_the_tokenizer_or_is_padded():
    assert random_start(CONFIGS["llama"]).config.vocab_size == 259
    padded = random_start(CONFIGS["llama"] | {"vocab_size": 320})
    assert padded.config.vocab_size == 320 == len(padded.get_input_embeddings().weight)
    with pytest.raises(ModelError, match=r"vocab_size=100, but the tokenizer has 259"):
        random_start(CONFIGS["llama"] | {"vocab_size": 100})


# ---------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "llama", "num_layers": 2}, "num_layers: a llama has no such key"),
        ({"model_type": "llama", "hidden_sizes": 2}, "did you mean 'hidden_size'"),
        ({"model_type": "llama", "hidden_size": "wide"}, "llama refuses it"),
        ({"model_type": "t5"}, "encoder with a decoder"),
        ({"model_type": "vit"}, "no causal language model"),
    ],
)  # fmt: skip
def test_a_config_that_is_none(keys, told):
    with pytest.raises(ModelError, match=told):
        random_start(keys)


HERE = {"data": "owner/rows"}


@pytest.mark.parametrize(
    ("method", "model", "told"),
    [
        ("pretrain", {}, "model.name: required, and not given (for example model.name=..., model.size=15m)"),
        ("full", {}, "model.name: required"),
        ("pretrain", {"size": "15m", "name": "a/b"}, "one of name, size and config"),
        ("pretrain", {"size": "14m"}, "should be 'tiny', '5m'"),
        ("pretrain", {"config": {"hidden_size": 8}}, "has no model_type"),
        ("pretrain", {"name": "a/b", "init": "loaded"}, "use method=continued_pretraining"),
        ("continued_pretraining", {"name": "a/b", "init": "random"}, "use method=pretrain"),
        ("continued_pretraining", {"size": "tiny"}, "has no weights"),
        ("full", {"size": "tiny", "init": "loaded"}, "has no weights"),
        ("lora", {"size": "tiny"}, "freezes weights, which would stay random"),
        ("partial", {"name": "a/b", "init": "random"}, "freezes weights, which would stay random"),
        ("full", {"name": "a/b", "tokenizer": "train"}, "loaded weights know the tokens"),
        ("pretrain", {"name": "a/b", "vocab_size": 999}, "no tokenizer is trained"),
        ("pretrain", {"size": "tiny", "vocab_size": 200}, "greater than or equal to 260"),
        ("pretrain", {"size": "tiny", "tokenizer": "./none"}, "'./none' does not exist"),
        ("pretrain", {"size": "tiny", "revision": "main"}, "there is no model.name"),
        ("full", {"name": "a/b", "new_tokens": ["<a>", "<a>"]}, "twice"),
        ("full", {"name": "a/b", "new_tokens": [" <a>"]}, "spaces around"),
        ("full", {"name": "a/b", "new_tokens_special": False}, "there are no model.new_tokens"),
        ("lora", {"name": "a/b", "new_tokens": ["<a>"]}, "method=partial with trainable.embeddings"),
        ("partial", {"name": "a/b", "new_tokens": ["<a>"]}, "use method=full"),
        ("full", {"name": "a/b", "additional_special_tokens": ["<a>"]}, "did you mean 'model.new_tokens'?"),
    ],
)  # fmt: skip
def test_what_contradicts_itself(method, model, told):
    with pytest.raises(ConfigError) as caught:
        configure(HERE, {"model": model}, method=method)
    assert told in "\n".join(caught.value.problems)


def test_a_random_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        configure(HERE, {"model": str(tmp_path / "m.gguf")}, method="pretrain")


def test_what_follows_is_resolved():
    model = configure(HERE, {"model": {"size": "15m"}}, method="pretrain").model
    assert (model.init, model.tokenizer, model.vocab_size) == ("random", "train", 8192)
    model = configure(HERE, {"model": {"config": {"model_type": "llama", "vocab_size": 777}}}, method="full").model
    assert (model.init, model.tokenizer, model.vocab_size) == ("random", "train", 777)
    model = configure(HERE, {"model": "a/b"}).model
    assert (model.init, model.tokenizer, model.vocab_size) == ("loaded", None, None)


# ---------------------------------------------------------------------------- loaded in part


def changed(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return Model(name=str(folder))


def test_a_tensor_that_is_missing_is_an_error(tmp_path):
    model = changed(save_model(tmp_path / "m"), lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj.*start at random"):
        load.load_model(model, torch.float32, CPU)


def test_a_tensor_too_many_is_an_error_and_the_remedy_works(tmp_path):
    model = changed(save_model(tmp_path / "m"), lambda t: t.update({"score.weight": torch.ones(2, 32)}))
    with pytest.raises(ModelError, match=r"has 1 tensors .*score\.weight.*would be lost") as caught:
        load.load_model(model, torch.float32, CPU)
    _, *command = shlex.split(str(caught.value).splitlines()[-1])
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True)
    found = load.load_model(Model(name=str(tmp_path / "m-clean")), torch.float32, CPU)
    assert torch.equal(found.get_input_embeddings().weight, make_model().get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_tied_heads_and_buffers_are_not_missed(tmp_path, family):
    extra = {"tie_word_embeddings": True} if family == "llama" else {}
    make_model(family, **extra).save_pretrained(tmp_path / "m")
    found = load.load_model(Model(name=str(tmp_path / "m")), torch.float32, CPU)
    assert found.get_input_embeddings().weight is found.get_output_embeddings().weight


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=64)
                               ).save_pretrained(tmp_path / "t5")  # fmt: skip
    with pytest.raises(ModelError, match="encoder with a decoder"):
        load.load_model(Model(name=str(tmp_path / "t5")), torch.float32, CPU)


def test_a_network_that_looks_ahead_is_refused(settings):
    keys = {"model_type": "bert"} | SMALL
    config = configure(settings, {"model": {"name": "", "config": keys, "tokenizer": settings["model"]}}, method="full")
    with pytest.raises(ModelError, match="BertLMHeadModel sees the tokens after each one"):
        assemble(config)


def test_documents_longer_than_the_positions():
    told = []
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel has 512 positions: use data\.max_length=512"):
        load.check_context(make_model("gpt2"), 513, told.append)
    load.check_context(make_model("llama"), 512, told.append)
    assert not told
    load.check_context(make_model("llama"), 513, told.append)
    assert "LlamaForCausalLM has 512 positions" in told[0]


def test_a_token_that_is_named_for_padding_is_learnt(settings, tmp_path):
    """transformers never moves the embedding of `pad_token_id`, which often is the end of a turn as well."""
    folder = save_model(tmp_path / "m")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": tokenizer.eos_token_id}))
    made = assemble(configure(settings, {"model": str(folder)}, method="full"))
    embeddings = made.network.model.get_input_embeddings()
    embeddings(torch.tensor([tokenizer.eos_token_id])).sum().backward()
    assert embeddings.weight.grad[tokenizer.eos_token_id].abs().sum() > 0


# ---------------------------------------------------------------------------- runs

TEXTS = [{"text": f"the {a} of the {b} was {n} and not {n * 7}."} for n in range(30) for a, b in (("sea", "sun"),)]


@pytest.fixture
def pretraining(tmp_path) -> dict:
    return {
        "model": {"config": CONFIGS["llama"], "vocab_size": 280},
        "data": {"train": str(write_rows(tmp_path / "texts.jsonl", TEXTS)), "validation": 6, "max_length": 64},
        "batch": {"examples": 4, "micro_tokens": 64}, "monitor": {"report_to": []}, "max_steps": 12,
        "checkpoint": {"every": 3}, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def weights(folder):
    return (checkpoint.listed(folder / "checkpoints")[-1] / "weights.safetensors").read_bytes()


def test_a_pretrained_model_is_written_whole_and_read_by_transformers(pretraining, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    faster = {"max_steps": 40, "optim": {"learning_rate": 1e-2}}
    result = train(configure(pretraining, faster, method="pretrain"), QUIET)
    figures = result.report["held_out_loss"]
    assert figures["base"] == pytest.approx(torch.tensor(280.0).log().item(), abs=0.3)  # knows nothing yet
    assert figures["tuned"] < figures["base"] - 1
    told = result.export(tmp_path / "out", "full")
    assert told["largest_difference"] < 1e-3
    model, tokenizer = (c.from_pretrained(tmp_path / "out") for c in (AutoModelForCausalLM, AutoTokenizer))
    ours = tokenizer_and_renderer(result_config := configure(tmp_path / "run" / "config.yaml"))[0]
    for text in ("the sea of the sun was 12", " é🙂\n\n  x"):
        assert tokenizer(text)["input_ids"] == ours(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert result_config.model.tokenizer == "train"
    assert (model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id) == (0, 0, 1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in card
    out = model.generate(**tokenizer("the sea", return_tensors="pt"), max_new_tokens=30, do_sample=False)
    assert "of the sun" in tokenizer.decode(out[0])
    assert result.chat() is not None


def test_killed_and_resumed_a_pretraining_ends_with_the_same_bytes(pretraining, tmp_path):
    """Killed once as soon as the tokenizer is there, before any checkpoint, and once between checkpoints."""
    extra = {"max_steps": 60, "checkpoint": {"every": 1}}
    train(configure(pretraining, extra, method="pretrain"), QUIET)
    config = configure(pretraining, extra, {"output_dir": str(tmp_path / "killed")}, method="pretrain")
    folder, wanted = tmp_path / "killed", random.Random(0).randint(5, 30)
    made = []
    for ready in (
        lambda: (folder / "tokenizer").is_dir(),
        lambda: checkpoint.step_of((checkpoint.listed(folder / "checkpoints") or [folder / "step-0"])[-1]) >= wanted,
    ):
        process = Forked(config)
        while process.poll() is None and not ready():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        made.append((folder / "tokenizer" / "tokenizer.json").stat().st_mtime_ns)
    (tmp_path / "texts.jsonl").touch()
    train(config, QUIET)
    made.append((folder / "tokenizer" / "tokenizer.json").stat().st_mtime_ns)
    assert len(set(made)) == 1  # made once
    for file in ("tokenizer.json", "training.json"):
        assert (tmp_path / "run/tokenizer" / file).read_bytes() == (folder / "tokenizer" / file).read_bytes()
    for file in ("weights.safetensors", "optimizer.safetensors", "random.safetensors"):
        one, two = (checkpoint.listed(tmp_path / n / "checkpoints")[-1] / file for n in ("run", "killed"))
        assert one.read_bytes() == two.read_bytes()


def test_two_ranks_start_alike_from_one_tokenizer(pretraining, tmp_path):
    train(configure(pretraining, method="pretrain"), QUIET)
    config = configure(pretraining, {"output_dir": str(tmp_path / "two")}, method="pretrain")
    assert run_on_two(config.model_dump(mode="json")) == [0, 0]
    name = "tokenizer/tokenizer.json"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = (load_file(checkpoint.listed(tmp_path / n / "checkpoints")[-1] / "weights.safetensors")
                for n in ("run", "two"))  # fmt: skip
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)


def test_a_name_gives_its_configuration_only(pretraining, tmp_path):
    folder = tmp_path / "only-config"
    make_model("llama").config.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"holds no tokenizer: use model\.tokenizer=train"):
        configure(pretraining | {"model": str(folder)}, method="pretrain")
    told = []
    config = configure(pretraining | {"model": {"name": str(folder), "tokenizer": "train", "vocab_size": 270}},
                       method="pretrain")  # fmt: skip
    model = assemble(config, told.append).network.model
    assert model.config.hidden_size == 32
    assert model.config.vocab_size == 270
    assert "none of its weights are used" in told[0]
    make_tokenizer().save_pretrained(folder)
    config = configure(pretraining | {"model": str(folder)}, method="pretrain")
    assert assemble(config).network.model.config.vocab_size == 320  # as its configuration was rounded up to


@pytest.mark.parametrize("method", ["continued_pretraining", "lora"])
def test_continued_pretraining_goes_on_from_weights(pretraining, tiny_model, method):
    faster = {"max_steps": 8, "optim": {"learning_rate": 1e-2}}
    config = configure(pretraining | {"model": str(tiny_model)}, faster, method=method)
    report = train(config, QUIET).report
    assert report["held_out_loss"]["tuned"] < report["held_out_loss"]["base"]


def test_a_plain_text_ends_with_the_end_of_text_not_of_a_turn(pretraining, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    save_model(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    config = configure(pretraining | {"model": str(tmp_path / "m")}, method="continued_pretraining")
    _, renderer = tokenizer_and_renderer(config)
    rendered = renderer.render(FORMATS["text"].convert({"text": "abc"}))
    assert rendered.text == "abc<|endoftext|>"
    shutil.rmtree(tmp_path / "m")
