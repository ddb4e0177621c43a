"""Adapter files both ways between PEFT and Luthier, the strict loader, and several adapters on one base."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

from luthier import adapters, surgery
from luthier.batch import Batch, Document
from luthier.errors import AdapterError, ConfigError, ModelError
from luthier.methods import METHODS
from luthier.models import network, trials
from luthier.trainable import adapter_files, saved
from luthier.trainable.adapter import BesideLayers
from luthier.trainable.lora import LoRA
from luthier.trainable.prompt import Prompt

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT's own use
TOKENS = torch.tensor([[5, 17, 99, 250, 3, 42, 7, 120, 64]])
KINDS: list[Any] = list(adapter_files.kinds())
OF_PEFT = [cls for cls in KINDS if not cls.peft_type.startswith("LUTHIER_")]


def name_of(cls) -> str:
    return cls.model_fields["kind"].default


def logits(model) -> torch.Tensor:
    """[1, T - 1, V] as the model gives them itself, or, with virtual tokens before it, by way of `Network`."""
    with torch.no_grad():
        if not any(isinstance(m, surgery.VirtualTokens) for m in model.modules()):
            return model(input_ids=TOKENS, use_cache=False).logits[:, -TOKENS.shape[1] : -1]
        net = network.Network(model).eval()
        trials.prepare(net, "padded")
        numbers = TOKENS[0].numpy().astype(np.int32)
        weights = np.r_[0.0, np.ones(len(numbers) - 1)].astype(np.float32)
        return net.head(net.hidden(Batch.pack([Document(numbers, weights, 0)])))[None]


def put(model, folder: Path, name: str = "put", share: float = 1.0) -> None:
    """Of any kind; `adapters.load` refuses virtual tokens, as a plain model does not lay them in."""
    saved.load(model, adapter_files.read(folder), name, share)


def shaken(tensors, seed: int = 1) -> None:
    """Other values than those of the start, of a size that changes the output clearly."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=made) * 0.2)


def adapted(cls=LoRA, family: str = "llama", seed: int = 1, name: str = "default", **settings):
    """A small model with a trained adapter, and the adapter's settings."""
    model = make_model(family)
    config = cls(**settings)
    config.apply(model, name)
    model.eval()
    moving = config.saved(model, name).values()
    shaken(moving if all(t.is_leaf and t.requires_grad for t in moving) else surgery.trainable(model).values(), seed)
    return model, config


def written(folder: Path, model, config, name: str = "default", base=None) -> Path:
    folder.mkdir(parents=True)
    saved.write(folder, model, config, name, base)
    return folder


def lora(folder: Path, seed: int = 1, **settings) -> Path:
    """The folder of a trained LoRA of the small Llama."""
    return written(folder, *adapted(LoRA, seed=seed, **{"r": 4, "lora_alpha": 8, **settings}))


def state(model) -> dict:
    return {n: (id(p), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}


def same(before: dict, model) -> bool:
    after = state(model)
    return before.keys() == after.keys() and all(
        before[n][0] == after[n][0] and torch.equal(before[n][1], after[n][1]) and before[n][2] == after[n][2]
        for n in before
    )


# ---------------------------------------------------------------------------- PEFT and Luthier


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cls", OF_PEFT, ids=name_of)
def test_what_we_write_peft_computes(cls, family, tmp_path):
    from peft import PeftModel

    model, config = adapted(cls, family)
    folder = written(tmp_path / "ours", model, config)
    theirs = PeftModel.from_pretrained(make_model(family), folder).eval()
    assert (logits(theirs) - logits(model)).abs().max() < 1e-5
    assert (logits(make_model(family)) - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cls", OF_PEFT, ids=name_of)
def test_what_peft_writes_we_compute(cls, family, tmp_path):
    theirs, folder = of_peft(tmp_path, cls, family)
    model = make_model(family)
    put(model, folder, "theirs")
    assert (logits(theirs) - logits(model)).abs().max() < 1e-5
    assert (logits(make_model(family)) - logits(model)).abs().max() > 1e-3
    assert not any(t.requires_grad for t in adapter_files.read(folder).settings.saved(model, "theirs").values())


@pytest.mark.parametrize("cls", KINDS, ids=name_of)
def test_what_we_write_we_compute(cls, tmp_path):
    model, config = adapted(cls)
    folder = written(tmp_path / "ours", model, config)
    again = make_model()
    put(again, folder)
    assert torch.equal(logits(again), logits(model))
    assert type(adapter_files.read(folder).settings) is cls
    surgery.remove(again, "put")
    assert state(again).keys() == state(make_model()).keys()
    assert torch.equal(logits(again), logits(make_model()))


@pytest.mark.parametrize("cls", [cls for cls in KINDS if issubclass(cls, BesideLayers)], ids=name_of)
def test_a_share_is_of_what_changes(cls, tmp_path):
    """None of it at 0; and at 1 less than at 2, in which it is counted on."""
    folder = written(tmp_path / "ours", *adapted(cls))
    plain = logits(make_model())
    change = {}
    for share in (0.0, 1e-3, 2e-3, 1.0):
        model = make_model()
        put(model, folder, share=share)
        change[share] = logits(model) - plain
    assert change[0.0].abs().max() < 1e-5
    assert (change[2e-3] - 2 * change[1e-3]).abs().max() < 0.05 * change[2e-3].abs().max()
    assert change[1.0].abs().max() > 1e-3


def test_virtual_tokens_do_not_go_into_a_plain_model(tmp_path):
    folder = written(tmp_path / "ours", *adapted(Prompt))
    refused(make_model(), folder, "virtual tokens (PROMPT_TUNING)", "load it with PEFT")
    with pytest.raises(AdapterError, match="virtual tokens are there or not"):
        put(make_model(), folder, share=0.5)


def of_peft(tmp_path: Path, cls=LoRA, family: str = "llama", **values):
    """A trained model of PEFT and the folder that it saved."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model

    model = make_model(family)
    config = cls()
    config.apply(model)
    given = {**config.peft(), **config.placed(model), "task_type": "CAUSAL_LM", **values}
    made = PEFT_TYPE_TO_CONFIG_MAPPING[cls.peft_type](**{k: v for k, v in given.items() if v is not None})
    theirs = get_peft_model(make_model(family), made).eval()
    shaken([p for p in theirs.parameters() if p.requires_grad])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    return theirs, tmp_path / "theirs"


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": r".*layers\.1\..*(q|v)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "c_attn"]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "nothing"]},
        {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
        {"use_rslora": True, "r": 3, "lora_alpha": 5},
        {"init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"rank_pattern": {"q_proj": 2, r"^model.layers.1.mlp.*": 6}, "alpha_pattern": {"layers.0.mlp.up_proj": 3}},
    ],
    ids=lambda v: ",".join(v),
)
def test_peft_chooses_layers_in_many_ways(values, tmp_path):
    theirs, folder = of_peft(tmp_path, **values)
    model = make_model()
    adapters.load(model, folder)
    assert (logits(theirs) - logits(model)).abs().max() < 1e-5


def test_keys_of_other_tools(tmp_path):
    """With the adapter's name in them, from a compiled model, or without PEFT's prefix."""
    folder = lora(tmp_path / "one")
    expected = make_model()
    adapters.load(expected, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for change in (
        lambda k: k.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda k: k.replace("base_model.model.", ""),
    ):
        save_file({change(k): t for k, t in tensors.items()}, folder / "adapter_model.safetensors")
        model = make_model()
        adapters.load(model, folder)
        assert torch.equal(logits(model), logits(expected))


def test_embeddings_saved_beside(tmp_path):
    """PEFT saves whole embeddings with an adapter for them; those of the base change nothing, others would."""
    folder = lora(tmp_path / "one")
    file = folder / "adapter_model.safetensors"
    tensors, model = load_file(file), make_model()
    key, own = "base_model.model.model.embed_tokens.weight", model.get_input_embeddings().weight.detach()
    save_file(tensors | {key: own.clone()}, file)
    adapters.load(model, folder)
    for other, told in ((own + 0.1, "other values"), (torch.cat([own, own[:2]]), "vocabulary was resized")):
        save_file(tensors | {key: other}, file)
        refused(make_model(), folder, told)


# ---------------------------------------------------------------------------- the strict loader


def refused(model, folder: Path, *told: str) -> None:
    """An error that says all of this, and the model as it was."""
    before, mode = state(model), model.training
    with pytest.raises(AdapterError) as error:
        adapters.load(model, folder, "new")
    for text in told:
        assert text in str(error.value), str(error.value)
    assert same(before, model)
    assert model.training == mode
    assert "new" not in adapters.names(model)
    assert error.value.exit_code == 4


def changed(folder: Path, **values) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def tensors_of(folder: Path, change) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return folder


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD_FILES = {
    "a key that matches nothing": (
        lambda f: tensors_of(f, lambda t: t | {KEY.replace("q_proj", "qq_proj"): torch.zeros(4, 32)}),
        ["1 of its 29 tensors match nothing here", "qq_proj", "LlamaForCausalLM"],
    ),
    "a key that is missing": (
        lambda f: tensors_of(f, lambda t: {k: v for k, v in t.items() if k != KEY}),
        ["1 of the 28 that it would have here are not in it", KEY],
    ),
    "a key twice": (
        lambda f: tensors_of(f, lambda t: t | {KEY.replace("lora_A", "lora_A.default"): t[KEY].clone()}),
        ["are the same tensor", KEY],
    ),
    "another shape": (
        lambda f: tensors_of(f, lambda t: t | {KEY: torch.zeros(4, 48)}), [KEY, "[4, 48]", "[4, 32]"],
    ),
    "another rank": (lambda f: changed(f, r=8), ["lora_A.weight has shape [4, ", "it is [8, "]),
    "not finite": (lambda f: tensors_of(f, lambda t: t | {KEY: t[KEY] * float("nan")}), [KEY, "not finite"]),
    "integers": (lambda f: tensors_of(f, lambda t: t | {KEY: torch.zeros(4, 32, dtype=torch.int8)}), ["kept as I8"]),
    "no tensors": (lambda f: tensors_of(f, lambda t: {}), ["holds no tensor"]),
    "cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-5]),
        ["cut short or damaged", "bytes instead of", "copy the file again"],
    ),
    "cut in its header": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:50]),
        ["cut short or damaged", "header"],
    ),
    "not safetensors": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"hello, world " * 9), ["damaged"]),
    "an empty file": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), ["damaged"]),
    "a damaged configuration": (lambda f: (f / "adapter_config.json").write_text('{"r": 4,'), ["not JSON"]),
    "a damaged fingerprint": (lambda f: (f / "luthier_adapter.json").write_text("{}"), ["_adapter.json", "damaged"]),
    "an unknown kind": (lambda f: changed(f, peft_type="OFT"), ["peft_type='OFT' is not one of", "LORA"]),
    "another task": (lambda f: changed(f, task_type="SEQ_CLS"), ["task_type='SEQ_CLS'", "CAUSAL_LM"]),
    "trained biases": (lambda f: changed(f, bias="all"), ["bias='all'", "not supported"]),
    "biases of LoRA alone": (lambda f: changed(f, bias="lora_only"), ["bias='lora_only'", "not supported"]),
    "biases in B": (lambda f: changed(f, lora_bias=True), ["lora_bias=True", "not supported"]),
    "activated LoRA": (lambda f: changed(f, alora_invocation_tokens=[1, 2]), ["alora_invocation_tokens=[1, 2]"]),
    "repeated layers": (lambda f: changed(f, layer_replication=[[0, 2], [0, 2]]), ["layer_replication"]),
    "a key of tomorrow": (lambda f: changed(f, use_magic=True), ["use_magic=True", "not supported"]),
    "trained tokens": (lambda f: changed(f, trainable_token_indices=[3, 4]), ["trainable_token_indices=[3, 4]"]),
    "a changed base": (lambda f: changed(f, init_lora_weights="loftq"), ["init_lora_weights"]),
    "a rank of 0": (lambda f: changed(f, r=0), ["r=0"]),
    "targets that match nothing": (
        lambda f: changed(f, target_modules=["query"]), ["does not fit this model", "q_proj"],
    ),
    "no targets": (lambda f: changed(f, target_modules=None), ["target_modules: names no layer"]),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        ["holds its tensors as a pickle", "python -c", "weights_only=True"],
    ),
    "no tensors' file": (lambda f: (f / "adapter_model.safetensors").unlink(), ["has no adapter_model.safetensors"]),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), ["has no adapter_config.json"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_bad_file_is_refused_and_the_model_stays(fault, tmp_path):
    folder = lora(tmp_path / "one")
    spoil, told = BAD_FILES[fault]
    spoil(folder)
    model = make_model()
    model.model.norm.weight.requires_grad_(False)
    model.train()
    refused(model, folder, *told)


def test_the_conversion_of_a_pickle_works(tmp_path):
    import shlex
    import subprocess
    import sys

    folder = lora(tmp_path / "one")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    command = shlex.split(adapter_files.conversion(folder))
    subprocess.run([sys.executable, *command[1:]], check=True)
    adapters.load(make_model(), folder)


def test_no_folder_and_a_runs_folder(tmp_path):
    refused(make_model(), tmp_path / "nothing", "there is no such folder")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    refused(make_model(), run, "a run's folder", f"luthier export {run} run-adapter --as adapter")


def test_two_adapters_of_one_name(tmp_path):
    folder, model = lora(tmp_path / "one"), make_model()
    adapters.load(model, folder, "new")
    with pytest.raises(AdapterError, match="has an adapter of the name 'new' already"):
        adapters.load(model, folder, "new")
    with pytest.raises(AdapterError, match="is no name"):
        adapters.load(model, folder, "a b")


def test_another_base_of_the_same_shape_is_noticed(tmp_path):
    folder = lora(tmp_path / "one", target_modules=["q_proj"])
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    refused(model, folder, "trained on another base", "layers.1.mlp.down_proj.weight holds other values")
    refused(make_model("qwen3"), folder, "family 'llama'", "'qwen3'")


def test_the_same_base_in_another_precision_is_not(tmp_path):
    folder = lora(tmp_path / "one")
    for dtype in (torch.bfloat16, torch.float16):
        model = make_model().to(dtype)
        adapters.load(model, folder)
        assert adapters.names(model) == ["one"]


def test_a_longer_vocabulary_is_the_same_base(tmp_path):
    folder, model = lora(tmp_path / "one"), make_model()
    model.resize_token_embeddings(330)
    adapters.load(model, folder)
    shorter = make_model()
    shorter.resize_token_embeddings(310)
    refused(shorter, folder, "[320, 32]", "[310, 32]")


def test_an_adapter_that_does_nothing_is_told(tmp_path):
    model, config = make_model(), LoRA(r=4)
    config.apply(model)
    folder = written(tmp_path / "fresh", model, config)
    with pytest.warns(UserWarning, match="'fresh' changes nothing"):
        adapters.load(make_model(), folder)


def test_another_base_by_name_is_told_where_nothing_else_is_known(tmp_path):
    _, folder = of_peft(tmp_path)
    changed(folder, base_model_name_or_path="meta/other")
    model = make_model()
    model.config._name_or_path = "mine/llama"
    with pytest.warns(UserWarning, match="'meta/other' as its base, and this model is 'mine/llama'"):
        adapters.load(model, folder)


def test_dropout_is_off_in_a_model_that_is(tmp_path):
    folder, model = lora(tmp_path / "one", lora_dropout=0.5), make_model()
    adapters.load(model, folder)
    assert torch.equal(logits(model), logits(model))
    assert not any(a.training for _, a in surgery.adapters(model))


# ---------------------------------------------------------------------------- several on one base


@pytest.fixture
def two(tmp_path):
    """Two trained LoRAs of the same base, of other ranks and other layers."""
    first = lora(tmp_path / "one", 1, r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    return first, lora(tmp_path / "two", 2, r=3, lora_alpha=4, target_modules=["q_proj", "up_proj"], use_rslora=True)


def both(two):
    from peft import PeftModel

    model = make_model()
    for folder in two:
        adapters.load(model, folder)
    theirs = PeftModel.from_pretrained(make_model(), two[0], adapter_name="one")
    theirs.load_adapter(two[1], adapter_name="two")
    return model, theirs.eval()


def test_switching_is_pefts_set_adapter(two):
    model, theirs = both(two)
    assert adapters.names(model) == ["one", "two"]
    for name in ("one", "two", "one"):
        adapters.switch(model, name)
        theirs.set_adapter(name)
        assert (logits(model) - logits(theirs)).abs().max() < 1e-5
    adapters.switch(model, None)
    assert torch.equal(logits(model), logits(make_model()))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (1.5, -0.5), (0.0, 2.0)])
def test_combining_is_pefts_concatenation(two, weights, tmp_path):
    model, theirs = both(two)
    theirs.add_weighted_adapter(["one", "two"], list(weights), "sum", combination_type="cat")
    theirs.set_adapter("sum")
    adapters.combine(model, dict(zip(("one", "two"), weights)))
    assert (logits(model) - logits(theirs)).abs().max() < 2e-5

    done = adapters.concatenate(dict(zip(two, weights)), tmp_path / "sum")
    assert done["r"] == 7
    as_one = make_model()
    adapters.load(as_one, tmp_path / "sum")
    assert (logits(as_one) - logits(model)).abs().max() < 2e-5
    if 0.0 not in weights:
        assert (logits(as_one) - logits(make_model())).abs().max() > 1e-3


def test_shares_and_removal(two):
    model, alone = make_model(), make_model()
    adapters.load(model, two[0], share=0.5)
    adapters.load(alone, two[0])
    adapters.combine(alone, {"one": 0.5})
    assert torch.equal(logits(model), logits(alone))
    adapters.load(model, two[1])
    adapters.remove(model, "one")
    only = make_model()
    adapters.load(only, two[1])
    assert torch.equal(logits(model), logits(only))
    adapters.remove(model, "two")
    assert adapters.names(model) == []
    assert state(model).keys() == state(make_model()).keys()
    for wrong in (lambda: adapters.switch(model, "one"), lambda: adapters.remove(model, "one")):
        with pytest.raises(ModelError, match="no adapter of the name 'one': it has none"):
            wrong()


def test_merging_what_is_on(two):
    for family_tied in (False, True):
        model = make_model("llama", tie_word_embeddings=family_tied)
        config = LoRA(r=4, target_modules=["q_proj", "lm_head"] if family_tied else ["q_proj"])
        config.apply(model)
        shaken(config.saved(model).values())
        expected = logits(model.eval())
        adapters.merge(model)
        assert adapters.names(model) == []
        assert (logits(model) - expected).abs().max() < 1e-5
    model, _ = both(two)
    adapters.combine(model, {"two": 0.4})
    expected = logits(model)
    adapters.merge(model)
    assert (logits(model) - expected).abs().max() < 1e-5


def test_saving_what_was_loaded(two, tmp_path):
    model, _ = both(two)
    adapters.save(model, "two", tmp_path / "again")
    again = make_model()
    adapters.load(again, tmp_path / "again")
    adapters.switch(model, "two")
    assert torch.equal(logits(again), logits(model))
    mask = (tmp_path / "again" / "adapter_model.safetensors").stat().st_mode & 0o777
    (tmp_path / "plain").write_text("")
    assert mask == (tmp_path / "plain").stat().st_mode & 0o777


def test_what_cannot_be_joined(two, tmp_path):
    with pytest.raises(AdapterError, match="two adapters or more"):
        adapters.concatenate({two[0]: 1.0}, tmp_path / "out")
    other = written(tmp_path / "other", *adapted(LoRA, "qwen3"))
    with pytest.raises(AdapterError, match="belong to different bases"):
        adapters.concatenate({two[0]: 1.0, other: 1.0}, tmp_path / "out")
    model = make_model()
    adapters.load(model, two[0])
    stacked = written(tmp_path / "stacked", model, config_on(model))
    with pytest.raises(AdapterError, match="on top of different adapters"):
        adapters.concatenate({two[0]: 1.0, stacked: 1.0}, tmp_path / "out")
    tensors_of(two[1], lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(320, 32)})
    with pytest.raises(AdapterError, match=r"holds base_model.model.lm_head.weight, which is no low-rank"):
        adapters.concatenate({two[0]: 1.0, two[1]: 1.0}, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "other", "stacked", "two"]


def config_on(model) -> LoRA:
    """A new adapter on a model that has one."""
    config = LoRA(r=2)
    config.apply(model)
    shaken(config.saved(model).values())
    return config


def test_the_frozen_stack_is_the_reference(two):
    """What preference methods need: without the adapter that is trained, the base with those beneath it."""
    model = make_model()
    adapters.load(model, two[0])
    reference = logits(model)
    config = LoRA(r=2)
    config.apply(model, saved.TRAINED)
    model.eval()
    assert torch.equal(logits(model), reference)
    moving = {id(p) for p in surgery.trainable(model).values()}
    assert moving == {id(t) for t in config.saved(model, saved.TRAINED).values()}
    shaken(config.saved(model).values())
    assert (logits(model) - reference).abs().max() > 1e-3
    with surgery.adapters_off(model, {saved.TRAINED}):
        assert torch.equal(logits(model), reference)
        with surgery.adapters_off(model):
            assert torch.equal(logits(model), logits(make_model()))
        assert torch.equal(logits(model), reference)
    assert (logits(model) - reference).abs().max() > 1e-3


# ---------------------------------------------------------------------------- runs


def trained(settings, folder: Path, *more):
    from luthier.config import configure
    from luthier.monitor import Console
    from luthier.train import train

    return train(configure(settings, {"output_dir": str(folder)}, *more), Console(quiet=True))


@pytest.fixture
def in_this_process(monkeypatch):
    """The other half of an export's check without a process of its own, which takes seconds to import everything."""
    import io
    import subprocess

    from luthier.export.readers import transformers_reader

    def run(arguments, input, **_):
        assert arguments[-1] == transformers_reader.__file__
        with monkeypatch.context() as patched:
            patched.setattr("sys.stdin", io.StringIO(input))
            transformers_reader.main()
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.fixture(scope="module")
def beneath(tiny_model, tmp_path_factory) -> Path:
    """A LoRA of the small model that runs load, of two layers' queries and values."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = LoRA(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    config.apply(model)
    shaken(config.saved(model).values())
    return written(tmp_path_factory.mktemp("adapters") / "style", model, config, base=str(tiny_model))


def on_base(tiny_model, *loaded) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for folder, share in loaded:
        adapters.load(model, folder, share=share)
    return model


def test_a_run_stacks_a_new_adapter_on_a_frozen_one(settings, tiny_model, beneath, tmp_path, request):
    """Trained, answered, compared and exported both ways; the frozen one stays as it was, and is part of the base."""
    from luthier.assemble import restore
    from luthier.evaluate import base_of
    from luthier.export import export

    digest = adapter_files.read(beneath).digest
    run = tmp_path / "run"
    stacked = {"model": {"name": str(tiny_model), "adapters": [{"path": str(beneath), "share": 0.5}]}}
    result = trained(settings, run, stacked, {"trainable": {"r": 4}})
    assert adapter_files.read(beneath).digest == digest
    made, _ = restore(run)
    model = made.network.model
    assert adapters.names(model) == ["default", "style"]
    with made.network.natively():
        tuned = logits(model)
    with base_of(made, print), made.network.natively():
        assert (logits(model) - logits(on_base(tiny_model, (beneath, 0.5)))).abs().max() < 1e-5
        assert (logits(model) - logits(on_base(tiny_model))).abs().max() > 1e-3
    assert result.report["held_out_loss"]["tuned"] < result.report["held_out_loss"]["base"]

    done = export(run, tmp_path / "adapter", "adapter")
    assert done["largest_difference"] < 1e-4
    again = on_base(tiny_model, (beneath, 0.5), (tmp_path / "adapter", 1.0))
    assert (logits(again) - tuned).abs().max() < 1e-5
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "style" in card
    assert "0.5" in card
    for others in ((), ((beneath, 1.0),)):  # nor with another share
        with pytest.raises(AdapterError, match=r"trained on top of the adapter 'style' \(share 0.5\)"):
            on_base(tiny_model, *others, (tmp_path / "adapter", 1.0))
    request.getfixturevalue("in_this_process")
    export(run, tmp_path / "merged", "merged")
    assert (logits(on_base(tmp_path / "merged")) - tuned).abs().max() < 1e-5


def test_a_run_goes_on_with_a_saved_adapter(settings, tiny_model, beneath, tmp_path, in_this_process):
    """Its settings are the adapter's, its base what it began with, and what lies beneath stays."""
    from luthier.config import configure
    from luthier.export import export

    config = configure(settings, {"trainable": {"init_from": str(beneath)}})
    assert (config.trainable.r, config.trainable.lora_alpha) == (2, 4)
    assert config.trainable.target_modules == ["q_proj", "v_proj"]
    result = trained(settings, tmp_path / "run", {"trainable": {"init_from": str(beneath), "lora_dropout": 0.1}})
    assert configure(tmp_path / "run" / "config.yaml").trainable == configure(
        settings, {"trainable": {"init_from": str(beneath), "lora_dropout": 0.1}}
    ).trainable
    held_out = result.report["held_out_loss"]
    plain = trained(settings, tmp_path / "plain").report["held_out_loss"]
    assert held_out["base"] != plain["base"], "it begins with what the adapter has learnt"
    assert held_out["tuned"] < held_out["base"]

    from luthier.assemble import restore
    from luthier.evaluate import base_of

    made, _ = restore(tmp_path / "run")
    with base_of(made, print), made.network.natively() as model:
        assert (logits(model) - logits(on_base(tiny_model, (beneath, 1.0)))).abs().max() < 1e-5
    export(tmp_path / "run", tmp_path / "out", "adapter")
    with made.network.natively() as model:
        assert (logits(model) - logits(on_base(tiny_model, (tmp_path / "out", 1.0)))).abs().max() < 1e-5


def test_stopped_and_resumed_it_ends_with_the_same_bytes(settings, beneath, tmp_path):
    from luthier.config import configure
    from luthier.monitor import Console
    from luthier.train import Trainer

    more = {"model": {"name": settings["model"], "adapters": [str(beneath)]}, "checkpoint": {"every": 2},
            "trainable": {"r": 4, "lora_dropout": 0.1}}  # fmt: skip
    trained(settings, tmp_path / "whole", more)
    config = configure(settings, more, {"output_dir": str(tmp_path / "cut")})
    part = Trainer(config, Console(quiet=True))
    for step in part.loop():
        if step.step == 3:
            break
    trained(settings, tmp_path / "cut", more)
    ends = [sorted((tmp_path / run / "checkpoints").glob("step-*"))[-1] for run in ("whole", "cut")]
    whole, cut = ((end / "weights.safetensors").read_bytes() for end in ends)
    assert whole == cut


@pytest.mark.parametrize("cls", [cls for cls in KINDS if cls is not LoRA], ids=name_of)
def test_every_kind_is_exported_gone_on_with_and_laid_beneath(cls, settings, tiny_model, tmp_path, in_this_process):
    """Trained, exported as a file, trained further from it, and frozen beneath a LoRA."""
    from luthier.assemble import restore
    from luthier.evaluate import base_of
    from luthier.export import export

    point = {"trainable": name_of(cls), "precision": "as_loaded"}
    method = next(m.name for m in METHODS.values() if point.items() <= m.kinds.items())
    small = {"method": method, "max_steps": 3, "data": {"max_length": 48}}
    if "num_virtual_tokens" in cls.model_fields:
        small["trainable"] = {"num_virtual_tokens": 3}
    trained(settings, tmp_path / "first", small)
    file = tmp_path / "file"
    export(tmp_path / "first", file, "adapter")
    first, _ = restore(tmp_path / "first")

    on = trained(settings, tmp_path / "on", small, {"trainable": {"init_from": str(file)}})
    made, _ = restore(tmp_path / "on")
    with base_of(made, print):
        assert hidden(made).sub(hidden(first)).abs().max() < 1e-5, "it begins where the first run ended"
    assert hidden(made).sub(hidden(first)).abs().max() > 1e-4
    assert on.report["held_out_loss"]["tuned"] != on.report["held_out_loss"]["base"]

    stack = {"model": {"name": str(tiny_model), "adapters": [{"path": str(file), "name": "below"}]}, "max_steps": 3}
    trained(settings, tmp_path / "over", stack, {"data": {"max_length": 48}})
    over, _ = restore(tmp_path / "over")
    with base_of(over, print):
        assert hidden(over).sub(hidden(first)).abs().max() < 1e-5, "the base is with what lies beneath"
    done = export(tmp_path / "over", tmp_path / "over-file", "adapter")
    assert done["largest_difference"] < 1e-4


def hidden(made) -> torch.Tensor:
    made.network.eval()
    numbers = TOKENS[0].numpy().astype(np.int32)
    weights = np.r_[0.0, np.ones(len(numbers) - 1)].astype(np.float32)
    with torch.no_grad():
        return made.network.hidden(Batch.pack([Document(numbers, weights, 0)]))


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_over_weights_in_fewer_bits(kind, settings, tiny_model, beneath, tmp_path, in_this_process):
    """A frozen adapter of the plain base, and a new one, over weights kept in fewer bits; exported and loaded."""
    from luthier.assemble import restore
    from luthier.export import export

    more = {"model": {"name": str(tiny_model), "adapters": [str(beneath)]}, "precision": {"kind": kind},
            "max_steps": 3, "method": "qlora"}  # fmt: skip
    trained(settings, tmp_path / "run", more)
    made, _ = restore(tmp_path / "run")
    assert adapters.names(made.network.model) == ["default", "style"]
    export(tmp_path / "run", tmp_path / "file", "adapter")
    trained(settings, tmp_path / "on", more, {"trainable": {"init_from": str(tmp_path / "file")}})
    other = written(tmp_path / "other", *shifted(tiny_model))
    with pytest.raises(AdapterError, match="another base"):
        trained(settings, tmp_path / "wrong", more, {"trainable": {"init_from": str(other)}})


def shifted(folder: Path):
    """A model of the same shapes with other weights in its layers alone, and an adapter of it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(module.weight.flip(0))
    config = LoRA(r=2)
    config.apply(model)
    shaken(config.saved(model).values())
    return model, config


def test_it_is_reckoned_with_beforehand(settings, tiny_model, beneath):
    """What lies beneath and what is gone on with, without values."""
    from luthier import configure, explain

    stack = {"name": str(tiny_model), "adapters": [str(beneath)]}
    told = explain(configure(settings, {"model": stack, "trainable": {"init_from": str(beneath)}}))
    moving = sum(p.numel() for p in told.made.parameters().values())
    assert moving == 2 * 2 * (64 + 48), "rank 2 beside queries and values of two layers, once"


def test_an_adapter_that_changed_under_a_run_is_noticed(settings, tiny_model, beneath, tmp_path):
    import shutil

    from luthier.assemble import restore
    from luthier.errors import CheckpointError

    copy = tmp_path / "copy"
    shutil.copytree(beneath, copy)
    more = {"model": {"name": str(tiny_model), "adapters": [str(copy)]}, "max_steps": 2}
    trained(settings, tmp_path / "run", more)
    tensors_of(copy, lambda t: {k: v * 1.01 for k, v in t.items()})
    with pytest.raises(CheckpointError, match="is not what it was when the run began"):
        restore(tmp_path / "run")
    with pytest.raises(CheckpointError, match="is not what it was when the run began"):
        trained(settings, tmp_path / "run", more)


def faults(settings, *more) -> str:
    from luthier.config import configure

    with pytest.raises(ConfigError) as error:
        configure(settings, *more)
    return str(error.value)


def test_settings_that_do_not_go_together(settings, tiny_model, beneath, tmp_path):
    def stack(*entries, **more) -> dict:
        return {"model": {"name": str(tiny_model), "adapters": list(entries)}, **more}

    one = str(beneath)
    assert "two adapters of the name 'style'" in faults(settings, stack(one, one))
    assert "'default' is that of the adapter" in faults(settings, stack({"path": one, "name": "default"}))
    assert "share=0" in faults(settings, stack({"path": one, "share": 0.0}))
    assert "there is no such folder" in faults(settings, stack(str(tmp_path / "none")))
    assert "method=full trains the model itself" in faults(settings, stack(one), {"method": "full"})
    assert "of a random start" in faults(settings, stack(one), {"model": {"init": "random"}})
    assert "should be" in faults(settings, stack({"path": one, "name": "a.b"}))
    assert "model.adapters" in faults(settings, {"adapter_name_or_path": one})
    go_on = {"trainable": {"init_from": one}}
    assert "the adapter in trainable.init_from has 2" in faults(settings, go_on, {"trainable": {"r": 8}})
    assert "init_from: " + str(tmp_path) in faults(settings, {"trainable": {"init_from": str(tmp_path / "none")}})
    cut = lora(tmp_path / "cut")
    (cut / "adapter_model.safetensors").write_bytes(b"12345")
    assert "cut short or damaged" in faults(settings, {"trainable": {"init_from": str(cut)}})
    assert "cut short or damaged" in faults(settings, stack(str(cut)))


def test_an_adapter_of_another_base_stops_a_run(settings, tmp_path, rows_file):
    other = written(tmp_path / "other", *adapted(LoRA, "qwen3"))
    stack, go_on = {"name": settings["model"], "adapters": [str(other)]}, {"init_from": str(other)}
    for more in ({"model": stack}, {"trainable": go_on}):
        with pytest.raises(AdapterError, match="trained on another base"):
            trained(settings, tmp_path / "run", more)


# ---------------------------------------------------------------------------- the command line


def command(capsys, *words) -> tuple[int, str, str]:
    from luthier.cli import main

    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_adapters_show(two, capsys, tmp_path):
    code, out, _ = command(capsys, "adapters", "show", two[0])
    assert code == 0
    assert "lora, 1,536 parameters in 12 tensors" in out  # 2 layers, rank 4; in + out: q 64, v 48, down 80
    code, out, _ = command(capsys, "adapters", "show", *two, "--json")
    shown = json.loads(out)
    assert [entry["settings"].get("r") for entry in shown] == [4, 3]
    assert [entry["parameters"] for entry in shown] == [2 * 4 * (64 + 48 + 80), 2 * 3 * (64 + 80)]
    assert all(entry["fingerprint"] for entry in shown)
    code, _, err = command(capsys, "adapters", "show", tmp_path / "none")
    assert (code, "there is no such folder" in err) == (4, True)


def test_adapters_combine(two, capsys, tmp_path):
    out = tmp_path / "both"
    code, said, _ = command(capsys, "adapters", "combine", *two, "--weights", 1.0, 0.5, "--out", out)
    assert code == 0
    assert "a LoRA of rank 7 beside 8 layers" in said
    model, _ = both(two)
    adapters.combine(model, {"one": 1.0, "two": 0.5})
    as_one = make_model()
    adapters.load(as_one, out)
    assert (logits(as_one) - logits(model)).abs().max() < 2e-5
    for words, told in (
        (["combine", *two], "--out: required"),
        (["combine", *two, "--weights", 1.0, "--out", tmp_path / "x"], "1 numbers for 2 folders"),
        (["combine", two[0], two[0], "--out", tmp_path / "x"], "given twice"),
        (["show", two[0], "--out", tmp_path / "x"], "`show` only looks"),
    ):
        code, _, err = command(capsys, "adapters", *words)
        assert (code, told in err) == (2, True), err
    code, _, err = command(capsys, "adapters", "combine", *two, "--out", out)
    assert (code, "exists: give another folder" in err) == (7, True), err
    assert not (tmp_path / "x").exists()
