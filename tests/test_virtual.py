"""Prefix, prompt and P-tuning: PEFT's numbers, positions by hand, packing, caches, whole runs, files, refusals."""

import json

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import save_file
from test_generate import PROMPTS
from test_parity import documents, packed_network
from test_train import QUIET, finished, in_two_parts

from luthier import configure, explain, open_run, train
from luthier.batch import Batch
from luthier.errors import ConfigError, ExportError, ModelError
from luthier.export import export
from luthier.generate import generate
from luthier.models import attention, network, trials
from luthier.objectives import NextToken
from luthier.surgery import adapters_off, merged_state, trainable
from luthier.trainable import LoRA, Prefix, Prompt, PTuning, soft_prompts

P = 5
KINDS = {
    "prefix": Prefix(num_virtual_tokens=P),
    "projected": Prefix(num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=12),
    "prompt": Prompt(num_virtual_tokens=P),
    "mlp": PTuning(num_virtual_tokens=P, encoder_hidden_size=12),
    "lstm": PTuning(num_virtual_tokens=P, encoder_reparameterization_type="LSTM", encoder_hidden_size=12),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def adapted(kind, family="llama", scale=0.5):
    """A network with virtual tokens that are far from what they begin as."""
    net = packed_network(family)
    KINDS[kind].apply(net.model)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in trainable(net.model).values():
            p.copy_(torch.randn_like(p) * scale)
    trials.check_virtual(net)
    return net


def learnt(net):
    return {name: p for name, p in net.model.named_parameters() if p.requires_grad}


def loss_and_gradients(net, batch):
    loss = NextToken().build()(net, batch).total
    found = torch.autograd.grad(loss, list(learnt(net).values()))
    return loss.detach(), dict(zip(learnt(net), found))


def close(ours, theirs, rtol=1e-3, atol=2e-5):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.abs().max() > 1e-4, f"{name} gets no gradient"
        torch.testing.assert_close(gradient, theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------------- PEFT


def peft_of(kind, family):
    """PEFT's own module for the same settings, around the same model."""
    import peft

    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
    config = {
        "prefix": lambda: peft.PrefixTuningConfig(**common),
        "projected": lambda: peft.PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=12),
        "prompt": lambda: peft.PromptTuningConfig(**common),
        "mlp": lambda: peft.PromptEncoderConfig(**common, encoder_hidden_size=12),
        "lstm": lambda: peft.PromptEncoderConfig(
            **common, encoder_hidden_size=12, encoder_reparameterization_type="LSTM"
        ),
    }[kind]()
    return peft.get_peft_model(make_model(family), config)


RENAMED = {
    "projected": {"encoder.": "transform."}, "mlp": {"encoder.": "mlp_head."},
    "lstm": {"encoder.lstm.": "lstm_head.", "encoder.mlp.": "mlp_head."},
}  # fmt: skip


def theirs_by_our_names(kind, model):
    """Our name of each parameter -> PEFT's parameter."""
    encoder = dict(model.prompt_encoder["default"].named_parameters())
    made = {}
    for name in list(encoder):
        ours = name
        for own, other in RENAMED.get(kind, {}).items():
            ours = ours.replace(other, own)
        made[f"virtual_tokens.{ours}"] = encoder[name]
    return made


def plain_loss(model, document, skipped=0):
    tokens = torch.from_numpy(document.tokens.astype("int64"))[None]
    mask = torch.ones_like(tokens)
    logits = model(input_ids=tokens, attention_mask=mask).logits[0, skipped:-1].float()
    losses = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    return (losses * torch.from_numpy(document.weights)[1:]).sum()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3"])
@every_kind
def test_outputs_and_gradients_are_those_of_peft(kind, family):
    """Packed rows of ours against one document at a time there. Gemma's window of 6 is shorter than documents here."""
    net, theirs = adapted(kind, family), peft_of(kind, family)
    named = theirs_by_our_names(kind, theirs)
    assert named.keys() == learnt(net).keys()
    with torch.no_grad():
        for name, p in learnt(net).items():
            named[name].copy_(p)
    docs = documents()
    loss, gradients = loss_and_gradients(net, Batch.pack(docs))
    skipped = 0 if "pr" in kind and kind != "prompt" else P
    expected = sum(plain_loss(theirs, d, skipped) for d in docs)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-4)
    expected.backward()
    close(gradients, {name: p.grad for name, p in named.items()})


# ---------------------------------------------------------------------------- by hand


def test_positions_of_a_prefix_by_hand(monkeypatch):
    """One head of width 1, queries of 0: each token sees all that it may see alike, and gives the mean of the values.

    The prefix has the values 10 and 20, document A has 3 and 6, document B has 9. As if the prefix stood before each:
        A0: (10 + 20 + 3) / 3 = 11        A1: (10 + 20 + 3 + 6) / 4 = 9.75        B0: (10 + 20 + 9) / 3 = 13
    With a window of 2, a token sees itself and one before it, which is the end of the prefix for the first tokens:
        A0: (20 + 3) / 2 = 11.5           A1: (3 + 6) / 2 = 4.5                   B0: (20 + 9) / 2 = 14.5
    Gradients of the sum of outputs: of 10, 1/3 + 1/4 + 1/3 = 11/12; of 9, 1/3; with the window, of 10 0 and of 20 1.
    """
    module = torch.nn.Module()
    module.virtual_layer = torch.tensor([1])
    values = torch.tensor([3.0, 6.0, 9.0], requires_grad=True)
    prefix = torch.zeros(2, 2, 1, 2, 1)  # [layers, 2, K, P, d]; the module is of layer 1
    prefix[1, 1, 0, :, 0] = torch.tensor([10.0, 20.0])
    prefix.requires_grad_()

    def attend(window, layout):
        zeros = torch.zeros(1, 1, 3, 1)
        borders = attention.cumulative((0, 2, 3), torch.device("cpu"))
        given = {"cu_seq_lens_q": borders, "max_length_q": 2}
        if layout == "copies":
            places, ends = attention.places((0, 2, 3), 2)
            assert ends == (0, 4, 7)
            assert places.row.tolist() == [0, 1, 2, 3, 0, 1, 4]
            assert places.tokens.tolist() == [2, 3, 6]
            assert places.copies.tolist() == [[0, 1], [4, 5]]
            given |= {"virtual_places": places, "cu_seq_lens_k": attention.cumulative(ends, torch.device("cpu")),
                      "max_length_k": 4}  # fmt: skip
        out, _ = attention.packed_attention(
            module, zeros, zeros, values[None, None, :, None], None, sliding_window=window, virtual_prefix=prefix,
            **given,
        )  # fmt: skip
        return out[0, :, 0, 0]

    for layout in ("shared", "copies"):
        if layout == "copies":
            pretend_flash(monkeypatch)
        assert attend(None, layout).tolist() == pytest.approx([11, 9.75, 13])
        assert attend(2, layout).tolist() == pytest.approx([11.5, 4.5, 14.5])
        of_prefix, of_values = torch.autograd.grad(attend(None, layout).sum(), [prefix, values])
        assert of_prefix[1, 1, 0, :, 0].tolist() == pytest.approx([11 / 12, 11 / 12])
        assert of_values.tolist() == pytest.approx([1 / 3 + 1 / 4, 1 / 4, 1 / 3])
        assert torch.autograd.grad(attend(2, layout).sum(), prefix)[0][1, 1, 0, :, 0].tolist() == [0, pytest.approx(1)]


def test_real_tokens_begin_after_the_virtual_ones():
    seen = {}
    for kind in KINDS:
        net = adapted(kind)
        net.model.base_model.register_forward_pre_hook(
            lambda module, args, given, k=kind: seen.update({k: given["position_ids"][0].tolist()}), with_kwargs=True
        )
        net.hidden(Batch.pack(documents((3, 2))))
    assert seen["prefix"] == seen["projected"] == [5, 6, 5]  # a document's last token is a target only
    assert seen["prompt"] == seen["mlp"] == seen["lstm"] == [0, 1, 2, 3, 4, 5, 6, 5]  # on a CPU the five run once


# ---------------------------------------------------------------------------- layouts


def pretend_flash(monkeypatch):
    """The layout and the call of a GPU's kernels, with plain attention in place of the kernel."""

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale=None, window_size=(-1, 0), **_):
        outs = torch.full_like(q, float("nan"))
        borders = list(zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:]))
        assert max(b - a for a, b, _, _ in borders) <= max_q
        assert max(d - c for _, _, c, d in borders) <= max_k
        parts = []
        for a, b, c, d in borders:
            if b > a:
                distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)  # bottom right
                mask = (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
                one = torch.nn.functional.scaled_dot_product_attention(
                    *(t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d])), attn_mask=mask, scale=scale,
                    enable_gqa=True,
                )  # fmt: skip
                parts.append(one[0].transpose(0, 1))
        joined = torch.cat(parts)
        assert len(joined) == len(outs), "a row has tokens of no document"
        return joined

    monkeypatch.setattr(attention, "varlen_attn", varlen)
    monkeypatch.setattr(attention, "on_flash", lambda t: True)
    monkeypatch.setattr(attention, "apart", lambda t: True)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_copies_before_each_document_are_the_shared_ones(kind, compiled, family, monkeypatch):
    """The row of a GPU, where each document has its own copy; with fixed shapes also filled up."""
    net, batch = adapted(kind, family), Batch.pack(documents((9, 17, 4, 12, 6)))
    expected = loss_and_gradients(net, batch)
    ran = []
    pretend_flash(monkeypatch)
    net.compiled = compiled
    handle = net.model.base_model.register_forward_hook(lambda m, i, o: ran.append(o.last_hidden_state.shape[1]))
    loss, gradients = loss_and_gradients(net, batch)
    handle.remove()
    extra = {("prefix", False): 0, ("prefix", True): 0, ("prompt", False): 5 * P, ("prompt", True): 8 * P}
    assert ran == [len(batch) + extra[kind, compiled]]
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-4)
    close(gradients, expected[1])


def test_what_a_row_is_filled_with_has_no_gradient():
    virtual, tokens = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    where, ends = attention.places((0, 3, 5), 2, copies=4)
    made = attention.before(virtual, tokens, where)
    assert made.shape == (5 + 4 * 2, 3)
    assert ends == (0, 5, 9)
    assert torch.equal(made[:9], torch.cat([virtual, tokens[:3], virtual, tokens[3:]]))
    upstream = torch.randn_like(made)
    upstream[9:] = float("nan")
    made.backward(upstream)
    torch.testing.assert_close(virtual.grad, upstream[:2] + upstream[5:7])
    torch.testing.assert_close(tokens.grad, torch.cat([upstream[2:5], upstream[7:9]]))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "phi"])
@every_kind
def test_padded_equals_packed(kind, family):
    net, batch = adapted(kind, family), Batch.pack(documents())
    packed = loss_and_gradients(net, batch)
    network.unpack(net)
    padded = loss_and_gradients(net, batch)
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=1e-4)
    close(packed[1], padded[1])


def soft_capped():
    from conftest import LLAMA
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        **LLAMA, head_dim=8, sliding_window=6, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    )
    net = network.Network(Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval())
    assert trials.prepare(net, "auto") is not None
    return net


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_family_that_cannot_be_packed_runs_padded(kind):
    net = soft_capped()
    KINDS[kind].apply(net.model)
    trials.check_virtual(net)
    docs = documents()
    together = loss_and_gradients(net, Batch.pack(docs))
    each = [loss_and_gradients(net, Batch.pack([d])) for d in docs]
    torch.testing.assert_close(together[0], sum(loss for loss, _ in each), rtol=1e-5, atol=1e-4)
    close(together[1], {name: sum(g[name] for _, g in each) for name in together[1]})


@every_kind
def test_a_start_that_documents_share_still_runs_once(kind):
    start = torch.arange(5, 13).numpy().astype("int32")
    docs = [d._replace(tokens=torch.cat([torch.from_numpy(start), torch.from_numpy(d.tokens)]).numpy(),
                       weights=torch.cat([torch.zeros(8), torch.from_numpy(d.weights)]).numpy())
            for d in documents()]  # fmt: skip
    net = adapted(kind)
    ran = []
    net.model.get_input_embeddings().register_forward_hook(lambda m, i, o: ran.append(o.shape[1]))
    batch = Batch.pack(docs)
    together = loss_and_gradients(net, batch)
    assert ran == [len(batch) - 8 * 3]
    each = [loss_and_gradients(net, Batch.pack([d])) for d in docs]
    torch.testing.assert_close(together[0], sum(loss for loss, _ in each), rtol=1e-5, atol=1e-4)
    close(together[1], {name: sum(g[name] for _, g in each) for name in together[1]})


@every_kind
def test_micro_batches_do_not_change_the_gradient(kind):
    net, batch = adapted(kind), Batch.pack(documents((9, 17, 4, 12, 20, 3)))
    whole = loss_and_gradients(net, batch)
    parts = [loss_and_gradients(net, part) for part in batch.split(21)]
    assert len(parts) > 2
    close(whole[1], {name: sum(g[name] for _, g in parts) for name in whole[1]})


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@every_kind
def test_off_is_the_base_to_the_last_bit(kind, family):
    net, base, batch = adapted(kind, family), packed_network(family), Batch.pack(documents())
    with torch.no_grad():
        expected = base.hidden(batch)
        assert (net.hidden(batch) - expected).abs().max() > 1e-2
        with adapters_off(net.model):
            assert torch.equal(net.hidden(batch), expected)
    state = base.model.state_dict()
    merged = merged_state(net.model)
    assert merged.keys() == state.keys(), "virtual tokens are no part of the model's own state"
    assert all(torch.equal(t, state[n]) for n, t in merged.items())


def test_several_stand_one_after_another_and_beside_lora():
    """A prompt of 5 beside one of 3 is one of 8, and a prefix stands before both."""
    net, joined = packed_network(), packed_network()
    Prompt(num_virtual_tokens=5).apply(net.model, "one")
    Prompt(num_virtual_tokens=3).apply(net.model, "two")
    Prompt(num_virtual_tokens=8).apply(joined.model)
    one, two = (net.model.get_submodule(f"virtual_tokens_{n}").embedding.weight for n in ("one", "two"))
    batch = Batch.pack(documents())
    with torch.no_grad():
        joined.model.get_parameter("virtual_tokens.embedding.weight").copy_(torch.cat([one, two]))
        torch.testing.assert_close(net.hidden(batch), joined.hidden(batch))
        with adapters_off(net.model, ["two"]):
            alone = net.hidden(batch)
        Prefix(num_virtual_tokens=2).apply(net.model, "three")
        LoRA(r=2).apply(net.model, "four")
        both = net.hidden(batch)
        assert (both - joined.hidden(batch)).abs().max() > 1e-4
        with adapters_off(net.model, ["two", "three"]):
            assert torch.equal(net.hidden(batch), alone)
    assert all("lora" in name for name in learnt(net)), "what was there before is frozen"
    with pytest.raises(ModelError, match="two adapters of the name 'one'"):
        Prompt().apply(net.model, "one")


@every_kind
def test_recomputed_layers_give_the_same_gradient(kind):
    from luthier.parallel import Parallel
    from luthier.parallel.layers import checkpoint_activations

    net, batch = adapted(kind), Batch.pack(documents())
    net.model.train()
    plain = loss_and_gradients(net, batch)
    checkpoint_activations(Parallel(activation_checkpointing=1), net.model)
    calls = []
    net.model.base_model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    again = loss_and_gradients(net, batch)
    assert len(calls) == 2, "the layer was not recomputed"
    close(plain[1], again[1], rtol=1e-5, atol=1e-6)


class Attending(torch.nn.Module):
    """A layer's attention and nothing else."""

    def __init__(self, number):
        super().__init__()
        self.layer_idx = number
        self.register_buffer("virtual_layer", torch.tensor([number]))

    def forward(self, x, **given):
        return attention.packed_attention(self, x, x, x, None, **given)[0]


def graphs_of(monkeypatch, layers, cases):
    """How many graphs there are after each case of each layer, compiled ones being compared with plain ones.

    A case of `cases()` is what goes through, the tensor that learns, and what attention is given beside."""
    pretend_flash(monkeypatch)
    monkeypatch.setattr(attention, "varlen_attn", torch.compiler.disable(attention.varlen_attn))
    seen, counts = [], []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for number in range(layers):
        layer, plain = Attending(number), Attending(number)
        layer.compile(backend=backend, dynamic=False)
        for x, learns, given in cases():
            ours, theirs = layer(x, **given), plain(x, **given)
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), learns)[0] for out in (ours, theirs)))
            counts.append(len(seen))
    torch._dynamo.reset()
    return counts


@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_share_their_graphs(monkeypatch):
    """Attention takes its layer's keys by a tensor: by the layer's number, there would be graphs for each layer."""
    x, prefix = torch.randn(1, 2, 9, 4), torch.randn(3, 2, 2, 3, 4, requires_grad=True)

    def cases():
        for ends in ((0, 4, 9), (0, 2, 3, 9)):  # as many borders, as they are filled up
            where, after = attention.places(ends, 3, copies=4)
            yield x, prefix, {
                "cu_seq_lens_q": attention.cumulative(ends, x.device), "max_length_q": 9,
                "cu_seq_lens_k": attention.cumulative(after, x.device), "max_length_k": 12,
                "virtual_prefix": prefix, "virtual_places": where,
            }  # fmt: skip

    counts = graphs_of(monkeypatch, 3, cases)
    assert counts[0] > 0
    assert counts == counts[:1] * 6


def test_noise_on_embeddings_leaves_virtual_tokens_alone():
    net, batch = adapted("prompt"), Batch.pack(documents())
    net.model.train()
    net.noise = 50.0
    seen = []
    net.model.base_model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["inputs_embeds"][0]), with_kwargs=True
    )
    for _ in range(2):
        net.hidden(batch)
    own = net.model.get_submodule("virtual_tokens").embedding.weight
    assert torch.equal(seen[0][:P], own)
    assert torch.equal(seen[1][:P], own)
    assert ((seen[0] - seen[1])[P:] != 0).any(-1).all()


# ---------------------------------------------------------------------------- answers


def speaking(kind, family):
    net = adapted(kind, family)
    with torch.no_grad():
        for name, p in net.model.named_parameters():  # else a random model repeats one token
            if "virtual" not in name:
                p.mul_(4.0 if p.ndim > 1 else 1.0)
    return net


def without_cache(net, prompt, count):
    """Greedy decoding in which the whole row is run anew for each token, by the path of training."""
    tokens = list(prompt)
    for _ in range(count):
        n = len(tokens)
        batch = Batch(torch.tensor(tokens), torch.arange(n), (0, n), torch.zeros(n, dtype=torch.int64), torch.ones(n),
                      torch.arange(n))  # fmt: skip
        with torch.no_grad():
            tokens.append(int(net.head(net.hidden(batch)[-1:]).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("kind", ["prefix", "prompt", "lstm"])
def test_answers_with_the_cache_are_those_without(kind, family):
    """Prompts of several lengths in one batch; Gemma's window of 6 moves past the virtual tokens on the way."""
    net = speaking(kind, family)
    expected = [without_cache(net, p, 12) for p in PROMPTS]
    assert len(set(map(tuple, expected))) > 1
    stop = {expected[0][3], expected[2][8]}  # rows leave the batch at different lengths
    for size in (1, 3, 5):
        assert generate(net, PROMPTS, set(), 12, batch_size=size) == expected
        cut = [a[: next((i for i, t in enumerate(a) if t in stop), 12)] for a in expected]
        assert generate(net, PROMPTS, stop, 12, batch_size=size) == cut
    with adapters_off(net.model):
        assert generate(net, PROMPTS, set(), 12) != expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_answers_are_those_of_peft(kind):
    net, theirs = speaking(kind, "llama"), peft_of(kind, "llama")
    theirs.get_base_model().load_state_dict({n: t for n, t in net.model.state_dict().items() if "virtual" not in n})
    with torch.no_grad():
        for name, p in theirs_by_our_names(kind, theirs).items():
            p.copy_(learnt(net)[name])
    theirs.eval()
    for prompt, answer in zip(PROMPTS, generate(net, PROMPTS, set(), 12)):
        tokens = torch.tensor([prompt])
        for token in answer:
            with torch.no_grad():
                logits = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -1]
            assert int(logits.argmax()) == token
            tokens = torch.cat([tokens, torch.tensor([[token]])], 1)
        if kind == "prefix":
            continue  # with the cache's new name in transformers 5.24, PEFT 0.21's generate leaves the prefix out
        start = torch.tensor([prompt])
        out = theirs.generate(
            input_ids=start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=12,
            eos_token_id=None, pad_token_id=0, use_cache=False,
        )[0].tolist()  # fmt: skip
        assert out[-12:] == answer


# ---------------------------------------------------------------------------- files


def write(folder, config, model, base):
    """An adapter's folder, in PEFT's layout."""
    folder.mkdir()
    tensors = {k: t.detach().contiguous().clone() for k, t in config.saved(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    values = {"peft_type": config.peft_type, "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "inference_mode": True, **config.peft(), **config.placed(model)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@every_kind
def test_what_we_save_is_what_peft_loads(kind, family, tmp_path):
    from peft import PeftModel

    net = adapted(kind, family)
    write(tmp_path / "adapter", KINDS[kind], net.model, "")
    theirs = PeftModel.from_pretrained(make_model(family), str(tmp_path / "adapter")).eval()
    docs = documents()
    with torch.no_grad():
        hidden = net.head(net.hidden(Batch.pack(docs)))
        start = 0
        for d in docs:
            n = d.inputs
            tokens = torch.from_numpy(d.tokens[:n].astype("int64"))[None]
            logits = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -n:]
            torch.testing.assert_close(hidden[start : start + n], logits, rtol=1e-5, atol=1e-5)
            start += n


@pytest.mark.filterwarnings("ignore")
@every_kind
def test_what_peft_saves_is_what_we_load(kind, tmp_path):
    from safetensors.torch import load_file

    theirs = peft_of(kind, "llama").eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for p in theirs.prompt_encoder.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    cls = type(KINDS[kind])
    assert [c for c in (Prefix, Prompt, PTuning) if c.reads(values)] == [cls]
    config, net = cls.from_peft(values), packed_network()
    config.apply(net.model)
    tensors, live = load_file(tmp_path / "adapter_model.safetensors"), config.saved(net.model)
    assert {k: t.shape for k, t in live.items()} == {k: t.shape for k, t in tensors.items()}
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(tensors[key])
        docs = documents((9,))
        tokens = torch.from_numpy(docs[0].tokens[:8].astype("int64"))[None]
        logits = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -8:]
        torch.testing.assert_close(net.head(net.hidden(Batch.pack(docs))), logits, rtol=1e-5, atol=1e-5)


def test_a_table_that_an_encoder_made_cannot_be_written_to():
    net = adapted("mlp")
    with torch.no_grad(), pytest.raises(RuntimeError, match="inference tensor"):
        KINDS["mlp"].saved(net.model)["prompt_embeddings"].zero_()


@pytest.mark.parametrize("extra", [{"num_transformer_submodules": 2}, {"modules_to_save": ["lm_head"]}])
def test_what_would_be_ignored_in_a_file_is_refused(extra):
    with pytest.raises(ModelError, match=next(iter(extra))):
        Prompt.from_peft({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4} | extra)
    with pytest.raises(ModelError, match="num_virtual_tokens=0"):
        Prompt.from_peft({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 0})


# ---------------------------------------------------------------------------- first values


def test_a_prompt_begins_as_it_is_told():
    model = make_model("gemma3")  # whose embeddings are scaled
    words = model.get_input_embeddings()
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "abc"}
    Prompt(num_virtual_tokens=5, **text).apply(model, "long", tokenize=lambda t: make_tokenizer()(t)["input_ids"])
    ids = make_tokenizer()("abc")["input_ids"]
    assert len(ids) == 3
    assert torch.equal(model.virtual_tokens_long.embedding.weight, words(torch.tensor([*ids, *ids[:2]])))
    Prompt(num_virtual_tokens=2, **text).apply(model, "short", tokenize=lambda t: ids)
    assert torch.equal(model.virtual_tokens_short.embedding.weight, words(torch.tensor(ids[:2])))
    Prompt(num_virtual_tokens=6).apply(model, "drawn")
    every = words(torch.arange(words.weight.shape[0]))
    drawn = model.virtual_tokens_drawn.embedding.weight
    assert (drawn[:, None] == every).all(-1).any(-1).all(), "each is a word"
    Prompt(num_virtual_tokens=6, prompt_tuning_init="RANDOM").apply(model, "random")
    assert not (model.virtual_tokens_random.embedding.weight[:, None] == every).all(-1).any()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_prefix_begins_as_the_tokens_of_a_prompt(family, monkeypatch):
    """Documents after a fresh prefix have the hidden states that they have after the tokens that it began as."""
    net, base = packed_network(family), packed_network(family)
    chosen = torch.tensor([7, 200, 3, 41])
    monkeypatch.setattr(soft_prompts, "drawn", lambda count, model: chosen[:count].tolist())
    Prefix(num_virtual_tokens=4).apply(net.model)
    own = torch.arange(20, 29)

    def row(tokens):
        n = len(tokens)
        return Batch(tokens, torch.arange(n), (0, n), tokens, torch.ones(n), torch.arange(n))

    with torch.no_grad():
        torch.testing.assert_close(
            net.hidden(row(own)), base.hidden(row(torch.cat([chosen, own])))[4:], rtol=1e-4, atol=1e-5
        )


# ---------------------------------------------------------------------------- whole runs

RUNS = {
    "prefix": {"num_virtual_tokens": 4},
    "prompt": {"num_virtual_tokens": 4, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "backwards: "},
    "p_tuning": {"num_virtual_tokens": 4, "encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.2},
}


@pytest.mark.parametrize("method", RUNS)
def test_stopped_and_resumed_ends_with_the_same_bytes(settings, method, tmp_path):
    more = {"trainable": RUNS[method], "checkpoint": {"every": 2}, "evaluation": {"generate": 2, "max_new_tokens": 4}}
    result = train(configure(settings, more, method=method), QUIET)
    parted = configure(settings, more, {"output_dir": str(tmp_path / "parted")}, method=method)
    in_two_parts(parted, 3)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")
    assert configure(result.folder / "config.yaml").trainable.num_virtual_tokens == 4
    # What is called the base is the model without virtual tokens, at the run's start as well as afterwards.
    plain = configure(settings, {"output_dir": str(tmp_path / "lora"), "max_steps": 1}, method="lora")
    of_lora = train(plain, QUIET).report["held_out_loss"]["base"]
    assert result.report["held_out_loss"]["base"] == pytest.approx(of_lora, abs=1e-6)
    opened = open_run(result.folder)
    assert opened.report["held_out_loss"] == result.report["held_out_loss"]


@pytest.mark.parametrize("method", RUNS)
def test_a_run_learns_whatever_its_rows(settings, method, tmp_path):
    weights = []
    for i, batch in enumerate(({"micro_tokens": 64}, {"micro_tokens": 256}, {"micro_tokens": 128, "packing": False})):
        more = {"trainable": {"num_virtual_tokens": 4}, "batch": batch, "output_dir": str(tmp_path / str(i)),
                "max_steps": 12}  # fmt: skip
        result = train(configure(settings, more, method=method), QUIET)
        from luthier.checkpoint import listed, read_tensors

        weights.append(read_tensors(listed(result.folder / "checkpoints")[-1], "weights"))
        held_out = result.report["held_out_loss"]
        assert held_out["tuned"] < held_out["base"]
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            assert "virtual_tokens" in name
            torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", RUNS)
def test_explained_before_it_runs(settings, method):
    config = configure(settings, {"trainable": RUNS[method]}, method=method)
    told = explain(config)
    layers, kv, width, hidden = 2, 16, 32, 32
    expected = {
        "prefix": 4 * layers * 2 * kv,
        "prompt": 4 * width,
        # two layers in both directions: 4 gates x (inputs + own state + two biases), then two layers of the MLP
        "p_tuning": 4 * width
        + 2 * (4 * hidden * (width + hidden + 2)) + 2 * (4 * hidden * (2 * hidden + hidden + 2))
        + 2 * hidden * (2 * hidden + 1) + width * (2 * hidden + 1),
    }[method]  # fmt: skip
    assert sum(row.trainable for row in told.moving) == expected
    assert told.memory.adapters == 4 * expected
    assert told.memory.optimizer == 8 * expected


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("method", "given", "told"),
    [
        ("prefix", {"num_virtual_tokens": 0}, r"trainable.num_virtual_tokens=0: should be greater than or equal to 1"),
        ("prompt", {"num_virtual_tokens": 2.5}, "num_virtual_tokens=2.5"),
        ("prefix", {"encoder_hidden_size": 4}, "trainable.prefix_projection=true"),
        ("prefix", {"encoder_hidden_size": 0, "prefix_projection": True}, "encoder_hidden_size=0"),
        ("prompt", {"prompt_tuning_init": "TEXT"}, "give trainable.prompt_tuning_init_text"),
        ("prompt", {"prompt_tuning_init": "WORDS"}, "prompt_tuning_init='WORDS'"),
        ("prompt", {"prompt_tuning_init_text": "a"}, "prompt_tuning_init=SAMPLE_VOCAB"),
        ("prompt", {"prefix_projection": True}, "prefix_projection: unknown key"),
        ("p_tuning", {"encoder_num_layers": 3}, "encoder_num_layers=3 is of the LSTM"),
        ("p_tuning", {"encoder_dropout": 0.5}, "encoder_dropout=0.5 is of the LSTM"),
        ("p_tuning", {"encoder_dropout": 1.0}, "encoder_dropout=1.0"),
        ("p_tuning", {"encoder_reparameterization_type": "GRU"}, "GRU"),
        ("p_tuning", {"encoder_reparameterization_type": None, "encoder_hidden_size": 4}, "has no network"),
        ("p_tuning", {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1, "encoder_dropout": 0.5},
         "acts between layers"),
        ("prompt", {"pre_seq_len": 4}, "did you mean 'trainable.num_virtual_tokens'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(settings, method, given, told):
    with pytest.raises(ConfigError, match=told):
        configure(settings, {"trainable": given}, method=method)


def test_a_prefix_in_the_cache_does_not_go_with_recomputed_layers(settings):
    more = {"parallel": {"activation_checkpointing": 1}, "batch": {"packing": False}}
    with pytest.raises(ConfigError, match=r"batch.packing=false a prefix lies in the cache"):
        configure(settings, more, method="prefix")
    assert configure(settings, more, method="prompt")
    net = soft_capped()
    KINDS["prefix"].apply(net.model)
    with pytest.raises(ModelError, match=r"parallel.activation_checkpointing=0"):
        trials.check_virtual(net, checkpointed=True)


@pytest.mark.parametrize(
    ("count", "remedy"), [(449, "use data.max_length=63"), (600, "use fewer than 512 virtual tokens")]
)
@pytest.mark.parametrize("method", RUNS)
def test_longer_than_the_context(settings, method, count, remedy):
    config = configure(settings, {"trainable": {"num_virtual_tokens": count}}, method=method)
    told = f"tokens={count} and data.max_length=64 take {count + 64} positions, but LlamaForCausalLM has 512"
    for run in (explain, lambda c: train(c, QUIET)):
        with pytest.raises(ModelError, match=told) as error:
            run(config)
        assert remedy in str(error.value)
    assert explain(configure(settings, {"trainable": {"num_virtual_tokens": 448}}, method=method))


@pytest.mark.parametrize("kind", ["merged", "full"])
def test_there_is_no_model_to_merge_into(settings, kind, tmp_path):
    train(configure(settings, {"max_steps": 1}, method="prefix"), QUIET)
    with pytest.raises(ExportError, match=f"as={kind}: no plain weights .* as=adapter"):
        export(tmp_path / "run", tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


def test_families_that_cannot_are_refused_by_name():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Lfm2Config, Lfm2ForCausalLM

    small = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48, "num_key_value_heads": 4}  # fmt: skip
    compressed = DeepseekV3Config(**small, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
                                  v_head_dim=6, n_routed_experts=4, first_k_dense_replace=2)  # fmt: skip
    mixed = Lfm2Config(**small, layer_types=["conv", "full_attention"])
    for model, told in (
        (DeepseekV3ForCausalLM(compressed), "keeps compressed keys"),
        (Lfm2ForCausalLM(mixed), "layers of the kinds conv"),
    ):
        with pytest.raises(ModelError, match=f"{type(model).__name__} .*{told}.*use method=prompt"):
            Prefix().apply(model)
    model = make_model()
    model.config.num_kv_shared_layers = 1
    with pytest.raises(ModelError, match="use the keys and values of others"):
        Prefix().apply(model)
    model.config.hidden_size_per_layer_input = 4
    with pytest.raises(ModelError, match="LlamaForCausalLM looks each token up again"):
        Prompt().apply(model)


def test_virtual_tokens_that_do_not_reach_the_layers_are_an_error():
    net = packed_network()
    KINDS["prefix"].apply(net.model)
    with torch.no_grad():
        net.model.virtual_tokens.embedding.weight.normal_()
    net.model.base_model.layers[1].self_attn.virtual_layer.fill_(0)  # the wrong layer's keys
    with pytest.raises(ModelError, match="packed and padded rows give different hidden states"):
        trials.check_virtual(net)


@every_kind
def test_they_are_kept_in_float32_beside_a_model_in_16_bits(kind):
    model = make_model().bfloat16()
    KINDS[kind].apply(model)
    net = network.Network(model)
    network.pack(net)
    assert all(p.dtype == torch.float32 for p in learnt(net).values())
    loss, gradients = loss_and_gradients(net, Batch.pack(documents()))
    assert net.hidden(Batch.pack(documents())).dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    network.unpack(net)
    padded = loss_and_gradients(net, Batch.pack(documents()))
    torch.testing.assert_close(loss, padded[0], rtol=1e-2, atol=1e-1)
    assert generate(net, PROMPTS, set(), 3)


# ---------------------------------------------------------------------------- beside others


@every_kind
def test_a_run_goes_on_with_a_saved_one(kind, settings, tiny_model, tmp_path):
    """From its finished table, whatever made that; the run's checkpoints have the table alone."""
    from luthier.assemble import assemble

    net = adapted(kind)
    write(tmp_path / "adapter", KINDS[kind], net.model, str(tiny_model))
    table = KINDS[kind].saved(net.model)["prompt_embeddings"]
    method = {"projected": "prefix", "mlp": "p_tuning", "lstm": "p_tuning"}.get(kind, kind)
    config = configure(settings, {"trainable": {"init_from": str(tmp_path / "adapter")}}, method=method)
    assert config.trainable.num_virtual_tokens == P
    made = assemble(config)
    assert list(made.parameters()) == ["virtual_tokens.embedding.weight"]
    assert torch.equal(made.parameters()["virtual_tokens.embedding.weight"], table)
    train(config, QUIET)
    with pytest.raises(ConfigError, match=rf"num_virtual_tokens=3, but the adapter in trainable.init_from has {P}"):
        configure(config.model_dump(), {"trainable": {"num_virtual_tokens": 3}}, method=method)


@pytest.mark.parametrize("kind", ["prefix", "mlp"])
def test_lora_learns_on_frozen_virtual_tokens(kind, settings, tiny_model, tmp_path):
    from luthier.assemble import assemble

    net = adapted(kind)
    write(tmp_path / "adapter", KINDS[kind], net.model, str(tiny_model))
    config = configure(settings, {"model": {"name": str(tiny_model), "adapters": [str(tmp_path / "adapter")]}})
    made = assemble(config, training=False)
    assert all("lora" in name for name in made.parameters())
    batch = Batch.pack(documents())
    with torch.no_grad():
        torch.testing.assert_close(made.network.hidden(batch), net.hidden(batch), rtol=1e-5, atol=1e-5)
    found = train(config, QUIET).report["held_out_loss"]
    assert found["tuned"] < found["base"]
    # The base has what lies beneath, as it has what a run goes on with; it is not the plain model.
    short = {"max_steps": 1, "output_dir": str(tmp_path / "on")}
    further = {"trainable": {"init_from": str(tmp_path / "adapter")}, **short}
    on = train(configure(settings, further, method="prefix" if kind == "prefix" else "p_tuning"), QUIET).report
    plain = train(configure(settings, {"max_steps": 1, "output_dir": str(tmp_path / "plain")}), QUIET).report
    assert found["base"] == pytest.approx(on["held_out_loss"]["base"], abs=1e-5)
    assert abs(found["base"] - plain["held_out_loss"]["base"]) > 1e-3
