"""Loss parity: packed = padded, accumulation = one batch, adapters = PEFT's, a step = a plain transformers step."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES, VOCABULARY, make_model
from torch._dynamo import testing as dynamo_testing

from luthier.batch import Batch, Document
from luthier.models import network, trials
from luthier.objectives import NextToken
from luthier.optim import AdamW
from luthier.optim.clipping import clip_scale
from luthier.optim.optimizer import Optimizer
from luthier.surgery import adapters, adapters_off, merged_state, trainable
from luthier.trainable import Full, LoRA, Partial


def documents(lengths=(9, 17, 4, 12), seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for i, n in enumerate(lengths):
        weights = (rng.random(n) < 0.6).astype(np.float32)
        weights[-1], weights[0] = 1, 0
        made.append(Document(rng.integers(0, VOCABULARY, n).astype(np.int32), weights, i))
    return made


def packed_network(family="llama"):
    model = make_model(family)
    net = network.Network(model)
    assert trials.prepare(net, "packed") is None
    assert net.packed
    return net


def plain_loss(model, document):
    """The sum of losses of one document, as transformers and a plain cross-entropy give it."""
    tokens = torch.from_numpy(document.tokens.astype(np.int64))[None]
    logits = model(input_ids=tokens).logits[0, :-1].float()
    weights = torch.from_numpy(document.weights)[1:]
    losses = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    return (losses * weights).sum(), weights.sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_document_at_a_time(family):
    docs = documents((9, 17, 4, 12, 1, 16))
    net, plain = packed_network(family), make_model(family)
    trials.check_head(net)
    loss = NextToken().build()(net, Batch.pack(docs))
    expected = [plain_loss(plain, d) for d in docs if len(d.tokens) > 1]
    torch.testing.assert_close(loss.total, sum(t for t, _ in expected), rtol=1e-5, atol=1e-4)
    assert loss.count == sum(c for _, c in expected)
    loss.total.backward()
    sum(t for t, _ in expected).backward()
    theirs = dict(plain.named_parameters())
    for name, p in net.model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_path_equals_packed(family):
    net = packed_network(family)
    batch = Batch.pack(documents())
    with torch.no_grad():
        torch.testing.assert_close(net._packed(batch), _padded(net, batch), rtol=1e-4, atol=1e-5)


def _padded(net, batch):
    net.model.set_attn_implementation(net.native)
    try:
        return net._padded(batch)
    finally:
        net.model.set_attn_implementation("luthier_packed")


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_leaks_between_documents(family):
    net = packed_network(family)
    first, second = documents((11, 13))
    changed = first._replace(tokens=(first.tokens + 1) % VOCABULARY)
    with torch.no_grad():
        a, b = (net.hidden(Batch.pack([d, second]))[10:] for d in (first, changed))
    assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_that_documents_share_is_run_once(family):
    """Equal system prompts cost their tokens once; loss and gradients stay those of each document alone."""
    start = np.arange(5, 13, dtype=np.int32)  # longer than Gemma's window here
    nothing = np.zeros(8, np.float32)
    docs = [d._replace(tokens=np.r_[start, d.tokens], weights=np.r_[nothing, d.weights]) for d in documents()]
    docs[2].weights[6] = 1  # learnt inside the shared start, in one document only
    docs.append(Document(np.r_[start, np.int32(77)], np.r_[np.zeros(8), 1.0].astype(np.float32), 9))
    net, plain = packed_network(family), make_model(family)
    batch = Batch.pack(docs)
    assert batch.alike() == (0, 8, 8, 8, 7)  # every document keeps a token of its own, the shortest its eighth
    ran = []
    net.model.get_input_embeddings().register_forward_hook(lambda m, i, o: ran.append(o.shape[1]))
    loss = NextToken().build()(net, batch)
    assert ran == [len(batch) - 8 * 3 - 7]
    loss.total.backward()
    expected = sum(plain_loss(plain, d)[0] for d in docs)
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-4)
    expected.backward()
    theirs = dict(plain.named_parameters())
    for name, p in net.model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-3, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_documents_that_are_all_the_same_can_be_packed():
    net = packed_network()
    one = documents((9,))[0]
    alone, three = (NextToken().build()(net, Batch.pack([one] * n)).total for n in (1, 3))
    torch.testing.assert_close(three, 3 * alone)


def test_soft_capped_family_runs_padded_and_right():
    from conftest import LLAMA
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        **LLAMA, head_dim=8, sliding_window=6, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    )
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    net = network.Network(model)
    reason = trials.prepare(net, "auto")
    assert reason is not None
    assert not net.packed
    trials.check_head(net)
    docs = documents()
    loss = NextToken().build()(net, Batch.pack(docs))
    loss.total.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    expected = sum(plain_loss(model, d)[0] for d in docs)
    expected.backward()
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=2e-5)


def test_accumulation_equals_one_batch():
    docs = documents((9, 17, 4, 12, 20, 3))
    whole, parts = packed_network(), packed_network()
    objective = NextToken().build()
    objective(whole, Batch.pack(docs)).total.backward()
    counts = 0
    for part in Batch.pack(docs).split(21):
        assert len(part) <= 21
        loss = objective(parts, part)
        loss.total.backward()
        counts += loss.count
    assert counts == sum(int(d.weights.sum()) for d in docs)
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


def assert_equal_losses(net, theirs) -> None:
    """Of packed documents here, and of one after the other there; the gradients of both are made."""
    docs = documents()
    loss = NextToken().build()(net, Batch.pack(docs))
    expected = sum(plain_loss(theirs, d)[0] for d in docs)
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-4)
    loss.total.backward()
    expected.backward()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_equals_peft(family, rslora):
    from peft import LoraConfig, get_peft_model

    net = packed_network(family)
    LoRA(r=4, lora_alpha=6, use_rslora=rslora).apply(net.model)
    theirs = get_peft_model(
        make_model(family),
        LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules="all-linear", task_type="CAUSAL_LM",
                   fan_in_fan_out=family == "gpt2"),
    )  # fmt: skip
    ours = dict(adapters(net.model))
    wrapped = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(ours) == set(wrapped)
    torch.manual_seed(1)
    for name, adapter in ours.items():
        a, b = wrapped[name].lora_A["default"].weight, wrapped[name].lora_B["default"].weight
        with torch.no_grad():
            adapter.lora_A.copy_(torch.randn_like(a) * 0.2)
            adapter.lora_B.copy_(torch.randn_like(b) * 0.2)
            a.copy_(adapter.lora_A)
            b.copy_(adapter.lora_B)
    assert_equal_losses(net, theirs)
    for name, adapter in ours.items():
        for side in ("lora_A", "lora_B"):
            gradient = getattr(wrapped[name], side)["default"].weight.grad
            torch.testing.assert_close(getattr(adapter, side).grad, gradient, rtol=2e-3, atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing(family):
    net = packed_network(family)
    batch = Batch.pack(documents())
    with torch.no_grad():
        before = net.hidden(batch)
        LoRA(r=4).apply(net.model)
        assert torch.equal(net.hidden(batch), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged_and_off_equals_base(family):
    net, base = packed_network(family), packed_network(family)
    LoRA(r=4).apply(net.model)
    with torch.no_grad():
        for _, adapter in adapters(net.model):
            adapter.lora_B.normal_(std=0.1)
    batch = Batch.pack(documents())
    live = {n: t.clone() for n, t in net.model.state_dict().items()}
    merged = packed_network(family)
    missing, extra = merged.model.load_state_dict(merged_state(net.model), strict=False)
    assert not extra
    assert all(n == "lm_head.weight" for n in missing)
    with torch.no_grad():
        tuned = net.hidden(batch)
        torch.testing.assert_close(merged.hidden(batch), tuned, rtol=1e-4, atol=1e-4)
        assert (tuned - base.hidden(batch)).abs().max() > 1e-2
        with adapters_off(net.model):
            assert torch.equal(net.hidden(batch), base.hidden(batch))
    assert all(torch.equal(t, live[n]) for n, t in net.model.state_dict().items()), (
        "merging must not touch live weights"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_step_equals_a_plain_transformers_step(family):
    docs = documents()
    net, plain = packed_network(family), make_model(family)
    Full().apply(net.model)
    parameters = trainable(net.model)
    config = AdamW(learning_rate=1e-2, weight_decay=0.1)
    optimizer = Optimizer(parameters, config)
    decays = [p for p in plain.parameters() if p.ndim >= 2]
    rest = [p for p in plain.parameters() if p.ndim < 2]
    reference = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2
    )
    for _ in range(3):
        loss = NextToken().build()(net, Batch.pack(docs))
        loss.total.backward()
        norm = optimizer.norm() / loss.count
        optimizer.step(1.0, clip_scale(norm, 0.5) / loss.count)
        optimizer.zero_grad()
        sums = [plain_loss(plain, d) for d in docs]
        (sum(t for t, _ in sums) / sum(c for _, c in sums)).backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(norm, expected_norm, rtol=1e-4, atol=1e-5)
    theirs = dict(plain.named_parameters())
    for name, p in net.model.named_parameters():
        torch.testing.assert_close(p, theirs[name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_partial_moves_what_is_named_and_nothing_else():
    model = make_model("llama")
    Partial(last_layers=1, norms=True, patterns=["layers.0.mlp.up_proj"]).apply(model)
    moving = set(trainable(model))
    assert "model.layers.0.mlp.up_proj.weight" in moving
    assert {n for n in moving if "norm" not in n and "layers.1." not in n} == {"model.layers.0.mlp.up_proj.weight"}
    assert "model.norm.weight" in moving
    assert "model.embed_tokens.weight" not in moving


def test_mastered_adamw_in_bfloat16_follows_float32():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 8).bfloat16())
    exact = torch.nn.Parameter(weight.detach().float())
    ours = Optimizer({"w": weight}, AdamW(learning_rate=1e-3, weight_decay=0.1))
    reference = torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.1)
    for _ in range(20):
        gradient = torch.randn(8, 8).bfloat16()
        weight.grad, exact.grad = gradient, gradient.float()
        ours.step(1.0, torch.tensor(1.0))
        reference.step()
    torch.testing.assert_close(ours.masters["w"], exact.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(weight, exact.bfloat16())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a")
def test_compiled_layers_have_one_graph_for_all_rows_of_a_length():
    """Where no kernel for packed rows is at hand (float32, a CPU), their documents' borders are in no graph."""
    torch._dynamo.reset()
    plain, compiled = packed_network("llama"), packed_network("llama")
    counter = dynamo_testing.CompileCounterWithBackend("aot_eager")
    for layer in compiled.model.model.layers:
        layer.compile(backend=counter, dynamic=False)
    graphs = []
    plain.longest = compiled.longest = 64
    for seed, lengths in enumerate(((9, 30, 21), (20, 20, 20), (41, 7, 12), (58, 1, 1))):
        docs = documents([n + 1 for n in lengths], seed)
        found = []
        for net in (plain, compiled):
            loss = NextToken().build()(net, Batch.pack(docs)).total
            loss.backward()
            found.append((loss.item(), net.model.model.embed_tokens.weight.grad.clone()))
            net.model.zero_grad()
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
        graphs.append(counter.frame_count)
    assert graphs == [graphs[0]] * 4
