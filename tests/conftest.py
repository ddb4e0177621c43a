"""Small random models of many families, a real tokenizer made on the spot, and rows to learn."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)

VOCABULARY = 320
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE):
    """Bytes as tokens, with ChatML's special tokens: every text can be written, and offsets are easy to check."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 512}


def _llama(**extra):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**LLAMA, **extra))


def _qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=8))


def _gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **LLAMA, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
        )
    )  # fmt: skip


def _phi():
    from transformers import PhiConfig, PhiForCausalLM

    return PhiForCausalLM(
        PhiConfig(**SMALL, intermediate_size=48, max_position_embeddings=512, resid_pdrop=0.0, embd_pdrop=0.0)
    )


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0.0,
                   embd_pdrop=0.0, attn_pdrop=0.0)
    )  # fmt: skip


FAMILIES = {"llama": _llama, "qwen3": _qwen3, "gemma3": _gemma3, "phi": _phi, "gpt2": _gpt2}


def make_model(family: str = "llama", **extra):
    torch.manual_seed(0)
    model = FAMILIES[family](**extra)
    with torch.no_grad():  # norms, biases and tied heads must not be at the values that hide a mistake
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.05 if p.ndim < 2 else 0.02), alpha=1.0)
            assert p.isfinite().all(), name
    return model.eval()


def save_model(folder: Path, family: str = "llama", template: str | None = TEMPLATE) -> Path:
    make_model(family).save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a small Llama and its tokenizer."""
    return save_model(tmp_path_factory.mktemp("model"))


ROWS = [
    {"prompt": f"{word} {n}", "completion": f"{n} {word[::-1]}"}
    for n in range(8)
    for word in ("one", "three", "seven", "ab")
]


def write_rows(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def rows_file(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def settings(tiny_model, rows_file, tmp_path) -> dict:
    """A run of a few seconds."""
    return {
        "model": str(tiny_model),
        "data": {"train": str(rows_file), "validation": 6, "max_length": 64},
        "batch": {"examples": 4, "micro_tokens": 64},
        "monitor": {"report_to": []},
        "optim": {"learning_rate": 1e-2},
        "max_steps": 6,
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def searched(settings) -> dict:
    """The same, evaluated on the way, for a search over it."""
    return settings | {"evaluation": {"every": 2}, "max_steps": 4}
