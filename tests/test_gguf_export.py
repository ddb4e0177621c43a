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
