"""GGUF files: written by llama.cpp's own package, read as transformers reads them."""

import json

import gguf as gguf_package
import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer

from luthier.errors import ModelError
from luthier.models import Model, gguf, load, vocabulary


def permuted(weight, heads):
    """The order in which llama.cpp keeps rotary rows."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


@pytest.fixture(params=["F32", "Q8_0"])
def written(request, tmp_path):
    """A small Llama as a GGUF file, with its byte tokenizer; and the model as it is after quantisation."""
    model = make_model("llama", tie_word_embeddings=False)
    config = model.config
    path = tmp_path / "small.gguf"
    writer = gguf_package.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokenizer = make_tokenizer()
    tokens = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t.startswith("<|") else 1 for t in tokens])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    kind = gguf_package.GGMLQuantizationType[request.param]
    names = {theirs: ours for ours, theirs in gguf.NAMES.items()}
    for name, tensor in model.state_dict().items():
        parts = name.removesuffix(".weight").split(".")
        layer = parts[2] if "layers" in parts else None
        ours = names[".".join(parts[3:] if layer else parts)]
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = permuted(values, heads)
        if values.ndim == 2 and values.shape[-1] % 32 == 0:
            data = gguf_package.quants.quantize(values, kind)
            back = gguf_package.quants.dequantize(data, kind)
            writer.add_tensor(f"blk.{layer}.{ours}.weight" if layer else f"{ours}.weight", data, raw_dtype=kind)
        else:
            back = values
            writer.add_tensor(f"blk.{layer}.{ours}.weight" if layer else f"{ours}.weight", values)
        if "q_proj" in name or "k_proj" in name:
            rows = back.shape[0]
            back = back.reshape(heads, rows // heads // 2, 2, *back.shape[1:]).swapaxes(1, 2).reshape(back.shape)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(back)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_weights_equal_what_was_written(written):
    path, model = written
    found = load.load_model(Model(name=str(path)), torch.float32, torch.device("cpu"))
    tokens = torch.arange(12)[None] + 40
    with torch.no_grad():
        torch.testing.assert_close(found(tokens).logits, model.eval()(tokens).logits, rtol=1e-5, atol=1e-5)
    assert not hasattr(found.config, "quantization_config")


def test_a_model_from_gguf_can_be_saved_and_loaded(written, tmp_path):
    from transformers import AutoModelForCausalLM

    found = load.load_model(Model(name=str(written[0])), torch.float32, torch.device("cpu"))
    found.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for (name, a), (_, b) in zip(found.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name


def test_the_tokenizer_has_its_merges_special_tokens_and_template(written):
    tokenizer = load.load_tokenizer(Model(name=str(written[0])))
    assert tokenizer.decode(tokenizer("abc 12<|im_end|>")["input_ids"]) == "abc 12<|im_end|>"
    assert tokenizer.tokenize("abc") == ["ab", "c"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template
    digits = tokenizer.tokenize("2026")
    assert digits == ["2", "0", "2", "6"]


def test_new_tokens_make_a_model_from_gguf_longer(written, tmp_path):
    from transformers import AutoModelForCausalLM

    model = Model(name=str(written[0]), new_tokens=[f"<new{i}>" for i in range(70)])
    tokenizer = load.load_tokenizer(model)
    found = load.load_model(model, torch.float32, torch.device("cpu"))
    before = found.get_input_embeddings().weight.clone()  # 320 rows, 260 tokens
    vocabulary.fit(found, tokenizer, model.new_tokens)
    after = found.get_input_embeddings().weight
    assert after.shape[0] == 330 == found.config.vocab_size == found.get_output_embeddings().weight.shape[0]
    torch.testing.assert_close(after[260:], before[:260].mean(0).expand(70, -1))
    found.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for (name, a), (_, b) in zip(found.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name


def test_what_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(json.dumps({}).encode())
    with pytest.raises(ModelError, match="no GGUF file"):
        load.load_tokenizer(Model(name=str(tmp_path / "x.gguf")))


def test_a_model_that_scores_texts_is_made_of_one_in_gguf(written):
    """The decoder is the same, with a new head on it."""
    from luthier.models import heads

    path, _ = written
    ending = heads.Ending("text", ("a", "b"), "single_label_classification")
    said: list[str] = []
    made = load.load_model(
        Model(name=str(path), init="loaded"), torch.float32, torch.device("cpu"), ending=ending, seed=1,
        tell_head=said.append,
    )  # fmt: skip
    plain = load.load_model(Model(name=str(path), init="loaded"), torch.float32, torch.device("cpu"))
    assert "score" in said[0]
    assert made.score.weight.shape[0] == 2
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        wanted = made.score(plain.base_model(input_ids=tokens).last_hidden_state[:, -1])
        torch.testing.assert_close(made(input_ids=tokens).logits, wanted)
