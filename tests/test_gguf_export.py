"""GGUF files that real llama.cpp reads: families, positions, windows, tokenizers, types of numbers, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_tokenizer

from luthier.errors import ExportError
from luthier.export import export

pytest.importorskip("xllamacpp")

WIDE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)], "original_max_position_embeddings": 512}  # fmt: skip
GEMMA = {
    "head_dim": 16, "sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
}  # fmt: skip
LOCAL = {"rope_type": "default", "rope_theta": 5000.0}
CASES = {
    "llama": ("Llama", {}),
    "llama, tied, biases, wide heads": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 32}),
    "llama3 positions": ("Llama", {"rope_parameters": LLAMA3}),
    "linear positions": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "yarn": ("Qwen2", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, a window": ("Mistral", {"sliding_window": 48}),
    "qwen2": ("Qwen2", {}),
    "qwen2, a window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma3": ("Gemma3", GEMMA),
    "gemma3, scales": ("Gemma3", GEMMA | {
        "query_pre_attn_scalar": 64,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                            "sliding_attention": LOCAL},
    }),
    "phi3": ("Phi3", {"sliding_window": None, "pad_token_id": 0}),
    "phi3, a window": ("Phi3", {"sliding_window": 40, "pad_token_id": 0}),
    "phi3, part of a head": ("Phi3", {"sliding_window": None, "pad_token_id": 0, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "phi3, longrope": ("Phi3", {"sliding_window": None, "pad_token_id": 0, "rope_parameters": LONG,
                                "original_max_position_embeddings": 512, "max_position_embeddings": 2048}),
}  # fmt: skip


def make(case: str, folder):
    """A model whose outputs depend on all it has: weights large enough that attention is not flat."""
    import transformers

    name, extra = CASES[case]
    text = "TextConfig" if name == "Gemma3" else "Config"
    config = getattr(transformers, name + text)(**(WIDE | extra))
    torch.manual_seed(0)
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.ndim < 2 else 0.12))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_family_answers_in_llama_cpp_as_in_transformers(case, tmp_path):
    """F32: log-probabilities to 3 decimals on real text, the likeliest text, the same tokens of texts, and stops."""
    done = export(make(case, tmp_path / "model"), tmp_path / "out", "gguf", "F32")
    assert done["largest_difference"] < (2e-3 if "gemma" in case else 1e-3)  # ggml's GELU is a table in float16
    assert done["mean_difference"] < 2e-4
    assert any("sliding window" in r for r in done["remarks"]) == ("a window" in case)
    assert done["greedy_equal"] or case == "gemma3"  # where two tokens are as likely: that was compared
    assert done["files"] == ["Modelfile", "model.gguf"]


# ---------------------------------------------------------------------------- tokenizers

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def corpus():
    from pydoc_data.topics import topics

    more = ["漢字とかな 中文字符 한국어", "Привет как дела Größe naïve café", "  \n\t\n   x\n\n\n\n"]
    return [*topics.values(), *more] * 2


def byte_level(*steps):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def split(expression: str):
    from tokenizers import Regex, pre_tokenizers

    return [
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def sentencepiece(normalizer=None, pre_tokenizer=None):
    """BPE over characters with bytes for those that are unknown, as Llama 2, Mistral, Gemma and Phi 3 have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizer, replace]) if normalizer else replace
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, show_progress=False, limit_alphabet=120)
    tokenizer.train_from_iterator(corpus(), trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] < 3]  # bytes are none
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if pre_tokenizer is not None:
        tokenizer.normalizer, tokenizer.pre_tokenizer = None, pre_tokenizer
    else:
        tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def _tokenizers():
    from tokenizers import normalizers, pre_tokenizers

    from luthier.export.gguf.vocabulary import SPLITS

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {
        "gpt-2": lambda: byte_level(plain),
        "smollm": lambda: byte_level(digits, plain),
        **{name: (lambda e=e: byte_level(*split(e))) for e, name in SPLITS.items()},
        "llama 2": lambda: sentencepiece(normalizers.Prepend("▁")),
        "mistral": lambda: sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
        "gemma": lambda: sentencepiece(),
        "unigram": unigram,
    }


TOKENIZERS = _tokenizers()


def with_tokenizer(folder, made, template=None, add_bos=False):
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    byte = made.token_to_id("<|im_end|>") is not None
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} if byte else {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # fmt: skip
    if add_bos:
        from tokenizers import processors

        made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", made.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **named)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(WIDE | {"vocab_size": len(tokenizer) + 5}))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_the_same_tokens(name, tmp_path):
    """Languages, emoji, code, white space; with a token at the start where the tokenizer puts one; conversations."""
    spm = name in ("llama 2", "mistral", "gemma")
    template = MISTRAL if spm else None
    folder = with_tokenizer(tmp_path / "model", TOKENIZERS[name](), template, add_bos=spm)
    done = export(folder, tmp_path / "out", "gguf", "F32")
    assert done["same_tokens"] == ("14 texts" if spm else "12 texts")
    assert bool(done["remarks"]) == (name == "mistral")


PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_white_space_behind_phi_3s_special_tokens_is_theirs(tmp_path):
    from tokenizers import AddedToken, normalizers
    from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

    made = sentencepiece(normalizers.Prepend("▁"))
    named = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>")
    made.add_special_tokens([AddedToken(t, special=True, normalized=False, rstrip=True) for t in named])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=PHI3, eos_token="<|end|>", unk_token="<unk>", pad_token="<|endoftext|>"
    )
    wide = WIDE | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "sliding_window": None}
    Phi3ForCausalLM(Phi3Config(**wide)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "out", "gguf", "F16")
    assert done["same_tokens"] == "14 texts"


def test_tokenizers_that_the_format_cannot_hold_are_refused(tmp_path):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    unknown = with_tokenizer(tmp_path / "cut", byte_level(*split(r"\w+|\W+")))
    with pytest.raises(ExportError, match=r"cuts texts in a way that llama.cpp does not know \(\\w\+"):
        export(unknown, tmp_path / "out", "gguf")
    spaced = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    with pytest.raises(ExportError, match="puts a space before each text"):
        export(with_tokenizer(tmp_path / "spaced", spaced), tmp_path / "out", "gguf")
    numbers = {str(i): i + 2 for i in range(200)}
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "<|im_end|>": 1, **numbers}, "0"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "removed")
    with pytest.raises(ExportError, match=r"llama\.cpp cannot hold this tokenizer: its model is WordLevel"):
        export(with_tokenizer(tmp_path / "words", words), tmp_path / "out", "gguf")
    assert not list(tmp_path.glob("*out*"))


def test_more_tokens_than_rows_of_embeddings_are_refused():
    from luthier.export.gguf.vocabulary import vocabulary

    with pytest.raises(ExportError, match="tokens up to number 258, and the model 250 rows"):
        vocabulary(make_tokenizer(), 250)
    made = vocabulary(make_tokenizer(), 320)
    assert (made.tokens[258], made.kinds[258]) == ("<|im_end|>", 3)
    assert (made.tokens[319], made.kinds[319]) == ("[PAD319]", 5)


@pytest.mark.parametrize(("family", "extra", "message"), [
    ("gpt2", {}, "family 'gpt2' cannot be written; those that can are llama, mistral, qwen2, qwen3, gemma3_text, phi3"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type dynamic"),
    ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
    ("llama", {"mlp_bias": True}, "biases in the feed-forward"),
])  # fmt: skip
def test_networks_that_llama_cpp_does_not_have_are_refused(family, extra, message, tmp_path):
    from conftest import make_model

    make_model(family, **extra).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "model", tmp_path / "out", "gguf")
    assert not list(tmp_path.glob("*out*"))


# ---------------------------------------------------------------------------- types of numbers


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0"])
def test_types_of_numbers(dtype, tmp_path):
    """Matrices of 256 columns are whole blocks of all types; perplexity stays within the type's bound."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    wide = WIDE | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4}
    LlamaForCausalLM(LlamaConfig(**wide)).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "out", "gguf", dtype)
    assert done["perplexity_after"] <= done["perplexity_before"] * (1 + done["bound"])
    assert not done["remarks"]
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    kind = dtype.removesuffix("_M")
    assert found["blk.1.attn_q.weight"] == kind
    assert found["blk.1.attn_norm.weight"] == "F32"
    head = {"Q8_0": "Q8_0", "F16": "F16", "BF16": "BF16"}.get(dtype, "Q6_K" if "K" in dtype else "Q8_0")
    assert found["output.weight"] == head
    if dtype.endswith("_M"):
        assert {found[f"blk.{i}.ffn_down.weight"] for i in range(4)} == {kind, "Q6_K"}


def test_rows_that_are_no_whole_blocks_are_kept_in_another_type(tmp_path):
    done = export(make("llama", tmp_path / "model"), tmp_path / "out", "gguf", "Q4_K_M")
    assert done["remarks"] == ["matrices whose rows are no whole blocks of Q4_K are kept in Q5_0, Q8_0"]


def test_a_file_that_loses_too_much_is_none(tmp_path, monkeypatch):
    """The figures are in the message, and nothing is left."""
    from dataclasses import replace

    from luthier.export.gguf import numbers

    monkeypatch.setitem(numbers.TABLE, "Q4_0", replace(numbers.TABLE["Q4_0"], bound=-0.5))
    with pytest.raises(ExportError, match=r"perplexity went from \d+.* to \d+.*, by -?\d+\.\d\d% \(allowed -50\.00%\)"):
        export(make("llama", tmp_path / "model"), tmp_path / "out", "gguf", "Q4_0")
    assert not list(tmp_path.glob("*out*"))


def test_rows_in_the_wrong_order_are_noticed(tmp_path, monkeypatch):
    from luthier.export.gguf import families

    monkeypatch.setattr(families, "interleaved", lambda config, name, tensor: tensor)
    with pytest.raises(ExportError, match="log-probabilities differ by up to"):
        export(make("llama", tmp_path / "model"), tmp_path / "out", "gguf", "F32")


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    from luthier.export.gguf import library

    folder = make("llama", tmp_path / "model")
    with pytest.raises(ExportError, match="dtype='Q3_K': known are F32, F16"):
        export(folder, tmp_path / "out", "gguf", "Q3_K")
    monkeypatch.setattr(library, "installed", lambda: False)
    with pytest.raises(ExportError, match=r"pip install luthier\[gguf\]"):
        export(folder, tmp_path / "out", "gguf")
    assert not list(tmp_path.glob("*out*"))


# ---------------------------------------------------------------------------- runs


@pytest.fixture
def run(settings, tmp_path):
    """A function that trains a small run over a model of a family."""
    from conftest import save_model

    from luthier.config import configure
    from luthier.monitor import Console
    from luthier.train import train

    def trained(family="llama", method="lora", **changes):
        model = save_model(tmp_path / family, family)
        return train(configure(settings, {"model": str(model)}, changes, method=method), Console(quiet=True)).folder

    return trained


@pytest.mark.parametrize(("family", "changes"), [
    ("llama", {}), ("qwen3", {"trainable": {"use_rslora": True, "rank_pattern": {"q_proj": 4}}}),
    ("gemma3", {"trainable": {"alpha_pattern": {"v_proj": 4.0}}}),
    ("llama", {"trainable": {"init_lora_weights": "pissa", "r": 4}}),
])  # fmt: skip
def test_an_adapter_acts_in_llama_cpp_as_trained(run, family, changes, tmp_path):
    """Ranks and scales of each layer, and PiSSA, whose file holds an adapter of twice the rank."""
    folder = run(family, **changes)
    done = export(folder, tmp_path / "out", "gguf-adapter")
    assert done["largest_difference"] < 1e-3
    assert done["difference_to_base"] > 0.1
    assert done["files"] == ["Modelfile", "adapter.gguf"]
    told = (tmp_path / "out" / "Modelfile").read_text()
    assert "ADAPTER ./adapter.gguf" in told
    assert f"luthier export {tmp_path / family} base --as gguf" in told
    merged = export(folder, tmp_path / "merged", "gguf", "F32")
    assert merged["largest_difference"] < 1e-3
    assert merged["checkpoint"] == done["checkpoint"]


def test_an_adapter_that_does_nothing_is_no_export(run, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from luthier.export import compare
    from luthier.export.gguf import adapter, checked

    folder = run()
    zeros = SimpleNamespace(rounded=lambda tensor, kind: torch.zeros(tensor.shape).numpy())
    monkeypatch.setattr(adapter, "numbers", zeros)
    with pytest.raises(ExportError, match="log-probabilities differ"):
        export(folder, tmp_path / "out", "gguf-adapter")
    monkeypatch.setattr(checked, "bound_of", lambda *of: compare.Bound())  # as rounding would allow
    monkeypatch.setattr(checked, "_near", lambda *of: None)
    with pytest.raises(ExportError, match="it does nothing"):
        export(folder, tmp_path / "out", "gguf-adapter")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(("method", "changes", "kind", "message"), [
    ("dora", {}, "gguf-adapter", "LoRA alone beside a model, and the run trained dora"),
    ("full", {}, "gguf-adapter", "and the run trained full"),
    ("prefix", {}, "gguf", "no plain weights compute what prefix adds"),
    ("lora", {"trainable": {"modules_to_save": ["lm_head"]}}, "gguf-adapter", "changed whole modules"),
    ("lora", {"trainable": {"target_modules": ["embed_tokens"]}}, "gguf-adapter", "between embeddings and head"),
])  # fmt: skip
def test_runs_that_cannot_be_written_are_refused(run, method, changes, kind, message, tmp_path):
    folder = run("llama", method, **changes)
    with pytest.raises(ExportError, match=message):
        export(folder, tmp_path / "out", kind)
    assert not list(tmp_path.glob("*out*"))


def test_weights_beyond_half_precision_are_refused():
    from luthier.export.gguf.numbers import rounded

    with pytest.raises(ExportError, match="weights up to 1e\\+05 are beyond its 65504; use BF16"):
        rounded(torch.tensor([[1e5, 0.0]]), "F16")


def test_the_command_says_what_was_compared(tmp_path, capsys):
    from luthier.cli import main

    folder = str(make("mistral, a window", tmp_path / "model"))
    command = ["export", folder, str(tmp_path / "out"), "--as", "gguf", "--dtype", "Q8_0"]
    assert main([*command, "--bound", "0.000001"]) in (0, 7)
    assert main(["export", folder, str(tmp_path / "two"), "--as", "full", "--bound", "0.1"]) == 7
    assert "of formats that round (as=gguf)" in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "three"), *command[3:], "--bound", "0.5"]) == 0
    said = capsys.readouterr()
    assert "(allowed +50.00%)" in said.out
    assert "note: its context ends at 48 tokens" in said.err
    assert main([*command[:2], str(tmp_path / "four"), *command[3:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "Q8_0"
    assert main(["export", folder, str(tmp_path / "five"), "--as", "merged"]) == 7
    assert "is a model and no run; of those there are as=full, as=gguf" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "six"), "--as", "gguf"]) == 4


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    import errno

    import gguf

    from luthier.cli import main

    def full(*of):
        raise OSError(errno.ENOSPC, "No space left on device", "model.gguf")

    folder = str(make("llama", tmp_path / "model"))
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    assert main(["export", folder, str(tmp_path / "out"), "--as", "gguf"]) == 1
    assert not list(tmp_path.glob("*out*"))


# ---------------------------------------------------------------------------- plain models, Modelfiles


def test_a_plain_model_is_a_source_of_safetensors_too(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make("llama, tied, biases, wide heads", tmp_path / "model")
    done = export(folder, tmp_path / "out", "full", "bfloat16")
    assert done["largest_difference"] < 0.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    written = export(folder, tmp_path / "gguf", "gguf")
    assert written["dtype"] == "F32"
    again = export(tmp_path / "gguf" / "model.gguf", tmp_path / "back", "full")
    assert again["largest_difference"] < 1e-5


GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.mark.parametrize(("template", "wanted"), [
    ("chatml", '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
     '{{ else }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
     '{{ else }}{{ if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
     "{{ end }}{{ end }}{{ end }}{{ end }}<|im_start|>assistant\n"),
    ("{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}chatml",
     '{{ if ne (index .Messages 0).Role "system" }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}'
     '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'),
    (GEMMA_TEMPLATE, '{{ range .Messages }}{{ if eq .Role "user" }}<start_of_turn>user\n{{ .Content }}<end_of_turn>\n'
     '{{ else }}{{ if eq .Role "assistant" }}<start_of_turn>model\n{{ .Content }}<end_of_turn>\n'
     "{{ end }}{{ end }}{{ end }}<start_of_turn>model\n"),
    ("{% for m in messages %}{{ m['content'][::-1] }}{% endfor %}", None),
])  # fmt: skip
def test_a_chat_template_in_ollamas_language(template, wanted):
    """Checked by rendering what was found as Ollama would; None where a template is more than texts around texts."""
    from conftest import TEMPLATE

    from luthier.export.gguf import modelfile

    made = modelfile.turns(make_tokenizer(template.replace("chatml", TEMPLATE)))
    assert (made is None) == (wanted is None)
    if made is not None:
        assert made.template().startswith(wanted)


@pytest.mark.parametrize(("method", "changes"), [
    ("qlora", {}), ("qat", {"precision": {"group_size": 16}}), ("full", {"precision": {"dtype": "bfloat16"}}),
])  # fmt: skip
def test_runs_in_fewer_bits_are_written_as_they_answer(run, method, changes, tmp_path):
    """Over weights in 4 bits; trained for rounding, whose floating-point weights are written; in 16 bits."""
    folder = run("llama", method, **changes)
    done = export(folder, tmp_path / "out", "gguf")
    assert done["dtype"] == ("BF16" if method == "full" else "F32")
    assert done["largest_difference"] < (0.1 if method == "full" else 1e-3)


@pytest.mark.parametrize("before", ["", "a"])
def test_a_log_that_is_cut_inside_of_a_character_is_no_failure(before, tmp_path):
    """llama.cpp tells the first bytes of each text of a file, whatever they are the half of."""
    from conftest import TEMPLATE

    folder = make("llama", tmp_path / "model")
    make_tokenizer("{# " + before + "é" * 60 + " #}" + TEMPLATE).save_pretrained(folder)
    assert export(folder, tmp_path / "out", "gguf", "F16")["files"]


def test_other_tokens_are_an_error_but_for_combining_marks_where_that_is_known():
    from luthier.export.gguf import checked

    tokenizer = make_tokenizer()
    texts = [checked.Text("नमस्ते", "नमस्ते", False)]
    theirs = {"counts": torch.tensor([2]), "ids": torch.tensor([1, 2])}
    assert "combining marks" in checked._same_tokens(tokenizer, texts, theirs, True)[0]
    with pytest.raises(ExportError, match="reads a text as other tokens"):
        checked._same_tokens(tokenizer, texts, theirs, False)
    with pytest.raises(ExportError, match="reads a text as other tokens"):
        checked._same_tokens(tokenizer, [checked.Text("name", "name", False)], theirs, True)
