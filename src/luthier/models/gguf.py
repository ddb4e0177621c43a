"""Read a GGUF file: weights dequantised into a transformers model, vocabulary into a `tokenizers` tokenizer.

Llama's architecture is read directly, many times faster than through `transformers`, which reads the others.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def open_file(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(str(path))
    except (OSError, ValueError, IndexError) as error:
        raise ModelError(f"model.name={str(path)!r} is no GGUF file that can be read: {error}") from None


def field(reader: Any, name: str, default: Any = None) -> Any:
    found = reader.get_field(name)
    return default if found is None else found.contents()


def read_model(path: Path, dtype: torch.dtype) -> nn.Module:
    reader = open_file(path)
    if field(reader, "general.architecture") == "llama" and not _rope_extras(reader):
        return _read_llama(reader, path, dtype)
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"model.name={str(path)!r} cannot be read: {error}") from None
    # The weights are dequantised: nothing downstream may think that they are not.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if hasattr(owner, name):
            delattr(owner, name)
    return model


def _rope_extras(reader: Any) -> bool:
    return any(t.name == "rope_freqs.weight" for t in reader.tensors) or any("rope.scaling" in k for k in reader.fields)


def read_config(path: Path, dtype: torch.dtype) -> Any:
    """The configuration that a file's head gives, without reading its tensors."""
    reader = open_file(path)
    if field(reader, "general.architecture") == "llama" and not _rope_extras(reader):
        return _llama_config(reader, dtype)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)


def _llama_config(reader: Any, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig

    def value(key: str, default: Any = None) -> Any:
        return field(reader, f"llama.{key}", default)

    names = {t.name for t in reader.tensors}
    heads, width = value("attention.head_count"), value("embedding_length")
    key_heads = value("attention.head_count_kv", heads)
    embedding = next(t for t in reader.tensors if t.name == "token_embd.weight")
    return LlamaConfig(
        vocab_size=int(embedding.shape[1]),
        hidden_size=width,
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=value("attention.key_length", width // heads),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=round(float(value("attention.layer_norm_rms_epsilon", 1e-5)), 12),
        rope_parameters={"rope_type": "default", "rope_theta": float(value("rope.freq_base", 10000.0))},
        tie_word_embeddings="output.weight" not in names,
        attention_bias="blk.0.attn_q.bias" in names,
        bos_token_id=field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=field(reader, "tokenizer.ggml.padding_token_id"),
        dtype=dtype,
    )


def _read_llama(reader: Any, path: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaForCausalLM

    config = _llama_config(reader, dtype)
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {}
    for tensor in reader.tensors:
        name = _llama_name(tensor.name)
        if name is None:
            raise ModelError(f"model.name={str(path)!r} has a tensor {tensor.name!r} that no Llama has")
        weight = dequantised(tensor).to(dtype)
        if ".q_proj." in name:
            weight = _unpermuted(weight, heads)
        elif ".k_proj." in name:
            weight = _unpermuted(weight, key_heads)
        state[name] = nn.Parameter(weight)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    absent = [n for n in missing if not (n == "lm_head.weight" and config.tie_word_embeddings)]
    if absent or unexpected:
        raise ModelError(f"model.name={str(path)!r}: tensors missing {absent[:5]}, unexpected {unexpected[:5]}")
    model.tie_weights()
    # Buffers are no part of the file: computed anew.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, left
    model.generation_config.eos_token_id = config.eos_token_id
    return model.eval()


def _llama_name(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in NAMES:
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in NAMES:
        return f"{NAMES[parts[0]]}.{parts[1]}"
    return None


def dequantised(tensor: Any) -> Tensor:
    """The values of a GGUF tensor as float32, in PyTorch's order of dimensions."""
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(values.reshape([int(n) for n in reversed(tensor.shape)]).copy())


def _unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Undo the order of rows in which GGUF keeps rotary queries and keys: pairs side by side, not halves."""
    rows = weight.shape[0]
    return weight.view(heads, rows // heads // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def read_tokenizer(path: Path) -> Any:
    reader = open_file(path)
    split = field(reader, "tokenizer.ggml.pre", "default")
    if field(reader, "tokenizer.ggml.model") != "gpt2" or split not in PRE_TOKENIZERS:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"model.name={str(path)!r}: its tokenizer cannot be read: {error}") from None
    return _read_bpe(reader, split)


def _digits() -> list:
    from tokenizers import pre_tokenizers

    return [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]


def _gpt2() -> list:
    from tokenizers import pre_tokenizers

    return [pre_tokenizers.ByteLevel(add_prefix_space=False)]


def _llama3() -> list:
    from tokenizers import Regex, pre_tokenizers

    return [
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


PRE_TOKENIZERS = {"smollm": _digits, "gpt-2": _gpt2, "llama-bpe": _llama3}


def _read_bpe(reader: Any, split: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = field(reader, "tokenizer.ggml.token_type")
    known = set(tokens)
    merges = [tuple(merge.split(" ", 1)) for merge in field(reader, "tokenizer.ggml.merges")]
    merges = [pair for pair in merges if "".join(pair) in known]  # a file must have one, even of bytes alone
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=split == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[split]())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds) if k == CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t, k in zip(tokens, kinds) if k == USER_DEFINED]
    )
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {key: field(reader, f"tokenizer.ggml.{name}_token_id") for key, name in named.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=field(reader, "tokenizer.chat_template"),
        model_max_length=field(reader, f"{field(reader, 'general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
        **{key: tokens[i] for key, i in ids.items() if i is not None},
    )
