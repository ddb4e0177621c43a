"""Starts that neighbours share: run once, the same values and gradients as padded and one by one, nothing leaks."""

import numpy as np
import pytest
import torch
from conftest import LLAMA, VOCABULARY, write_rows
from test_parity import packed_network
from test_virtual import KINDS, adapted, close, graphs_of, learnt, loss_and_gradients, pretend_flash

from luthier.batch import Batch, Document, Known, begin_alike
from luthier.models import attention, network, starts, trials
from luthier.objectives import NextToken
from luthier.parallel import Parallel, layers
from luthier.trainable import LoRA

FAMILIES = ("llama", "qwen3", "gemma3", "mistral")  # two with windows of 6, shorter than the prompts here


def network_of(family):
    if family != "mistral":
        return packed_network(family)
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    net = network.Network(MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=6)).eval())
    assert trials.prepare(net, "packed") is None
    return net


def answers(prompt, lengths, row=0, seed=0, learnt_prompt=False):
    """Documents that begin with the same `prompt` tokens and go on with answers of these lengths, all different."""
    rng = np.random.default_rng(seed + 100 * row)
    start = rng.integers(0, VOCABULARY, prompt)
    made = []
    for i, n in enumerate(lengths):
        own = rng.integers(0, VOCABULARY, n + 1)  # the last is a target only
        own[0] = (7 * row + i) % VOCABULARY  # so that answers differ from their first token on
        weights = np.r_[np.zeros(prompt), np.ones(n + 1)].astype(np.float32)
        weights[1:prompt], weights[0] = learnt_prompt, 0
        made.append(Document(np.r_[start, own].astype(np.int32), weights, row))
    return made


ROWS = {
    "pairs": [*answers(20, (9, 5), 1), *answers(6, (11, 14), 2), *answers(13, (3, 4), 3)],
    "groups of 8": [*answers(20, (3, 9, 4, 4, 1, 12, 7, 6), 1), *answers(9, (3, 2, 9, 30, 1, 1, 4, 5), 2)],
    "pairs and singles": [
        *answers(20, (9, 5), 1), *answers(0, (7,), 2), *answers(13, (3, 14), 3), *answers(0, (2,), 4)
    ],
    "learnt prompts": [*answers(20, (9, 5, 8), 1, learnt_prompt=True), *answers(15, (9, 9), 2, learnt_prompt=True)],
}


def nested():
    """Pairs whose prompts begin with the same system turn, and one without a pair."""
    turn = np.arange(40, 52, dtype=np.int32)
    docs = [*answers(20, (9, 5), 1), *answers(6, (11, 14), 2), *answers(0, (4,), 3)]
    return [d._replace(tokens=np.r_[turn, d.tokens], weights=np.r_[np.zeros(12, np.float32), d.weights]) for d in docs]


ROWS["nested"] = nested()
every_row = pytest.mark.parametrize("rows", ROWS)


def losses(net, batch):
    loss = NextToken().build()(net, batch).total
    parameters = {n: p for n, p in net.model.named_parameters() if p.requires_grad}
    return loss.detach(), dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))


def same(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=atol)
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def lengths_run(net):
    ran = []
    net.model.get_input_embeddings().register_forward_hook(lambda m, i, o: ran.append(o.shape[1]))
    return ran


# ---------------------------------------------------------------------------- what is shared


def test_what_neighbours_begin_with_by_hand():
    """5 6 7 8 | 5 6 9 | 5 6 9 9 1 | 5 | 2 3: of the third all of the second is shared, of the fourth nothing, as each
    keeps a token of its own."""
    docs = [np.array(d) for d in ([5, 6, 7, 8], [5, 6, 9], [5, 6, 9, 9, 1], [5], [2, 3])]
    assert begin_alike(docs) == (0, 2, 3, 0, 0)
    assert begin_alike([docs[0]] * 3) == (0, 3, 3)
    assert begin_alike([]) == ()
    row = starts.once((0, 4, 7, 12, 13, 15), (0, 2, 3, 0, 0), torch.device("cpu"))
    assert row.kept.tolist() == [0, 1, 2, 3, 6, 10, 11, 12, 13, 14]  # 5 6 7 8 | 9 | 9 1 | 5 | 2 3
    assert row.ends == (0, 4, 5, 7, 8, 10)
    assert row.keys == (0, 4, 7, 12, 13, 15)
    assert row.copies.index.tolist() == [0, 1, 2, 3, 0, 1, 4, 0, 1, 4, 5, 6, 7, 8, 9]
    assert row.copies.rounds == 2  # 5 and 6 stand in three documents


def test_gradients_of_copies_are_added_by_hand():
    """The third of a, a b, a b c stands three times: gradients 1 + 2 + 4; what fills the row up gives none."""
    row = starts.once((0, 2, 5, 9), (0, 1, 2), torch.device("cpu"))
    assert row.copies.index.tolist() == [0, 1, 0, 2, 3, 0, 2, 4, 5]
    values = torch.arange(6.0, requires_grad=True)
    made = starts.copied(values, row.copies)
    assert made.tolist() == [0, 1, 0, 2, 3, 0, 2, 4, 5]
    made.backward(torch.tensor([1.0, 8, 2, 16, 32, 4, 64, 128, 256]))
    assert values.grad.tolist() == [7, 8, 80, 32, 128, 256]
    values = torch.randn(4, 2, 3, requires_grad=True)
    row = starts.once((0, 3, 6), (0, 2), torch.device("cpu"), total=8, longest=1)
    assert row.kept.tolist() == [0, 1, 2, 5]
    assert len(row.copies.index) == 9
    upstream = torch.full((9, 2, 3), float("nan"))
    upstream[:6] = 1
    starts.copied(values, row.copies).backward(upstream)
    assert values.grad[:, 0, 0].tolist() == [2, 2, 1, 1]


def test_sums_of_many_copies_are_those_of_float64():
    keys, alike = tuple(range(0, 60 * 9, 9)), (0, *[7] * 30, *[3] * 28)
    row = starts.once(keys, alike, torch.device("cpu"))
    values = torch.randn(len(row.kept), 5, requires_grad=True)
    upstream = torch.randn(keys[-1], 5)
    starts.copied(values, row.copies).backward(upstream)
    expected = torch.zeros(len(row.kept), 5, dtype=torch.float64).index_add_(0, row.copies.index, upstream.double())
    torch.testing.assert_close(values.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_known_of_tokens_is_of_these_only():
    batch = Batch.pack(ROWS["pairs"])
    moved = batch.to(torch.device("meta"))
    assert moved.alike() == batch.alike() == (0, 20, 0, 6, 0, 13)
    assert moved.padded_to(len(moved) + 5).alike() == (0, 20, 0, 6, 0, 13, 0)
    assert moved.to(torch.device("meta")).alike() == batch.alike()
    other = Batch(**{**vars(moved), "tokens": torch.empty_like(moved.tokens)})
    assert other.alike() == (0,) * 6
    assert Batch(**{**vars(batch), "known": Known(moved.tokens, (0,) * 6)}).alike() == batch.alike()


def test_parts_of_a_batch_know_what_they_share():
    docs = [d._replace(row=i) for i, d in enumerate(ROWS["groups of 8"])]
    batch = Batch.pack(docs)
    part = batch.to(torch.device("cpu")).select(3, 12)
    assert part.alike() == Batch.pack(docs[3:12]).alike() == (0, *[20] * 4, 0, *[9] * 3)


def test_members_on_a_device_know_what_they_share():
    """Rows of two members: 1 2 3 4 and 1 2 3 5, then 1 2 6 7 and 1 8 9 9. First members begin alike with 2 tokens, the
    second ones with 1, as those between say: the least of what neighbours have in common. It may be more."""
    def row(*members):
        tokens = np.concatenate(members).astype(np.int32)
        return Document(tokens, np.r_[0.0, np.ones(len(members[0]) - 1), 0.0, np.ones(len(members[1]) - 1)], 0,
                        (0, len(members[0])))  # fmt: skip

    batch = Batch.pack([row([1, 2, 3, 4, 0], [1, 2, 3, 5, 0]), row([1, 2, 6, 7, 0], [1, 8, 9, 9, 0])])
    assert batch.alike() == (0, 3, 2, 1)
    there = batch.to(torch.device("meta"))
    assert batch.members(0).alike() == there.members(0).alike() == (0, 2)
    assert batch.members(1).alike() == there.members(1).alike() == (0, 1)
    two = Batch.pack([row([1, 2, 3, 4, 0], [1, 5, 5, 5, 0]), row([1, 2, 3, 6, 0], [7, 8, 9, 9, 0])])
    assert two.members(0).alike() == (0, 3)
    assert two.to(torch.device("meta")).members(0).alike() == (0, 1)


# ---------------------------------------------------------------------------- the same numbers


@every_row
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_is_apart_is_padded_is_one_by_one(family, rows):
    docs, net = ROWS[rows], network_of(family)
    batch, ran = Batch.pack(docs), lengths_run(net)
    shared = losses(net, batch)
    assert ran == [len(batch) - sum(batch.alike())]
    assert sum(batch.alike()) > 20
    net.shares = False
    same(shared, losses(net, batch))
    assert ran[1:] == [len(batch)]
    each = [losses(net, Batch.pack([d])) for d in docs]
    same(shared, (sum(e[0] for e in each), {n: sum(e[1][n] for e in each) for n in shared[1]}), 3e-5)
    network.unpack(net)
    same(shared, losses(net, batch), 3e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_each_alone(family):
    net = network_of(family)
    for docs in ROWS.values():
        batch = Batch.pack(docs)
        with torch.no_grad():
            hidden = net.hidden(batch)
            each = torch.cat([net.hidden(Batch.pack([d])) for d in docs])
        assert hidden.shape == (len(batch), 32)
        torch.testing.assert_close(hidden, each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_leak(family, fast, monkeypatch):
    """Another answer, of the same length and different from its first token on, changes no bit of the others."""
    net = network_of(family)
    if fast:
        pretend_flash(monkeypatch)
    docs = [*answers(20, (9, 5), 1), *answers(6, (11, 14, 8), 2)]
    ends = Batch.pack(docs).ends
    with torch.no_grad():
        before = net.hidden(Batch.pack(docs))
        for i, doc in enumerate(docs):
            prompt = 20 if i < 2 else 6
            tokens = doc.tokens.copy()
            tokens[prompt:] = (tokens[prompt:] + 100) % VOCABULARY
            changed = Batch.pack([*docs[:i], doc._replace(tokens=tokens), *docs[i + 1 :]])
            assert changed.alike() == Batch.pack(docs).alike()
            after = net.hidden(changed)
            same_rows = (after == before).all(1)
            assert same_rows[: ends[i] + prompt].all()
            assert not same_rows[ends[i] + prompt : ends[i + 1]].any()
            assert same_rows[ends[i + 1] :].all()


# ---------------------------------------------------------------------------- the layout of a GPU


@every_row
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_copied_keys_give_the_same(family, compiled, rows, monkeypatch):
    """As on a GPU, where keys of each document lie end to end; with fixed shapes also filled up."""
    net, batch = network_of(family), Batch.pack(ROWS[rows])
    expected = losses(net, batch)
    pretend_flash(monkeypatch)
    ran, least = lengths_run(net), len(batch) - sum(batch.alike())
    if compiled:
        net.compiled, batch = True, batch.padded_to(-(-len(batch) // 16) * 16)
        unit = -(-len(batch) // starts.SHARE)
        least = -(-least // unit) * unit
    same(losses(net, batch), expected, 3e-5)
    assert ran == [least]
    assert least < len(batch)


def test_keys_are_not_copied_for_little(monkeypatch):
    net, ran = network_of("llama"), None
    pretend_flash(monkeypatch)
    ran = lengths_run(net)
    for prompt, shares in ((4, False), (16, True)):
        batch = Batch.pack(answers(prompt, (20, 30)))
        with torch.no_grad():
            net.hidden(batch)
        assert ran.pop() == len(batch) - prompt * shares


def test_fixed_shapes_are_few():
    """Rows of 128 tokens with 16 ratios of prompt to answer have at most 8 lengths, and one of keys."""
    seen = set()
    for prompt in range(2, 62, 4):
        batch = Batch.pack(answers(prompt, (62 - prompt, 60 - prompt))).padded_to(128)
        row = starts.once(batch.ends[:3], batch.alike()[:2], torch.device("cpu"), total=128, longest=64)
        if row is not None:
            seen.add((len(row.kept), len(row.copies.index)))
            lengths = np.diff(row.ends)
            assert row.ends[-1] == len(row.kept)
            assert lengths.max() <= 64
            assert (np.diff(row.keys) >= lengths).all()
    assert len(seen) <= 8
    assert {n for _, n in seen} == {128 + 16}


@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_share_their_graphs(monkeypatch):
    """Of rows with other answers, and of every layer; forward and backward."""

    def cases():
        for keys, alike in (((0, 20, 35, 40), (0, 15, 0)), ((0, 14, 30, 40), (0, 12, 0))):
            row = starts.once(keys, alike, torch.device("cpu"), total=48, longest=20)
            x = torch.randn(1, 2, len(row.kept), 4, requires_grad=True)
            yield x, x, attention.borders(row.ends, row.keys, 20, x.device) | {"shared_starts": row.copies}

    counts = graphs_of(monkeypatch, 2, cases)
    assert counts[0] > 0
    assert counts == counts[:1] * 4


def test_a_kernel_that_aligns_otherwise_is_noticed(monkeypatch):
    """Queries that are taken for a document's first tokens, as causal masks of other kernels have it."""
    right = attention._band

    def first(starts, *rest):
        return right(tuple(0 for _ in starts), *rest)

    assert attention.aligned(8, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(attention, "_band", first)
    assert not attention.aligned(8, torch.float32, torch.device("cpu"))
    net = packed_network("llama")
    assert not net.shares
    ran, batch = lengths_run(net), Batch.pack(ROWS["pairs"])
    net.hidden(batch)
    assert ran == [len(batch)]


# ---------------------------------------------------------------------------- what it goes with


@pytest.mark.parametrize("rows", ["pairs", "nested"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_virtual_tokens(kind, rows):
    docs, net = ROWS[rows], adapted(kind)
    batch, ran = Batch.pack(docs), lengths_run(net)
    together = loss_and_gradients(net, batch)
    assert ran == [len(batch) - sum(batch.alike())]
    each = [loss_and_gradients(net, Batch.pack([d])) for d in docs]
    torch.testing.assert_close(together[0], sum(loss for loss, _ in each), rtol=1e-5, atol=1e-4)
    close(together[1], {name: sum(g[name] for _, g in each) for name in together[1]})


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_on_a_gpu_lie_before_each_document(kind, monkeypatch):
    net, batch = adapted(kind), Batch.pack(ROWS["pairs"])
    expected = loss_and_gradients(net, batch)
    pretend_flash(monkeypatch)
    ran = lengths_run(net)
    loss, gradients = loss_and_gradients(net, batch)
    assert ran == [len(batch)]
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-4)
    close(gradients, expected[1])


@pytest.mark.parametrize("fast", [False, True])
def test_with_recomputed_layers_and_lora(fast, monkeypatch):
    net, batch = packed_network("llama"), Batch.pack(ROWS["pairs and singles"])
    LoRA(r=4).apply(net.model)
    for p in learnt(net).values():
        torch.nn.init.normal_(p, std=0.1)
    if fast:
        pretend_flash(monkeypatch)
    net.model.train()
    plain = losses(net, batch)
    layers.checkpoint_activations(Parallel(activation_checkpointing=1), net.model)
    ran = lengths_run(net)
    again = losses(net, batch)
    assert ran == [len(batch) - sum(batch.alike())]
    assert torch.equal(again[0], plain[0])
    assert all(torch.equal(again[1][n], plain[1][n]) for n in plain[1])
    net.shares = False
    same(plain, losses(net, batch))


def test_dropout_is_the_same_in_all_answers():
    """What is run once is dropped once: two equal documents are one to their last tokens, which each runs alone."""
    net = packed_network("llama")
    LoRA(r=4, lora_dropout=0.5).apply(net.model)
    for p in learnt(net).values():
        torch.nn.init.normal_(p, std=0.5)
    net.model.train()
    doc = answers(12, (6,))[0]
    with torch.no_grad():
        one, two = net.hidden(Batch.pack([doc, doc])).split(len(doc.tokens) - 1)
        assert torch.equal(one[:-1], two[:-1])
        assert not torch.equal(one[-1], two[-1])
        assert not torch.equal(net.hidden(Batch.pack([doc])), one)


def test_noise_on_embeddings_is_of_each_document():
    net, batch = packed_network("llama"), Batch.pack(ROWS["pairs"])
    net.noise, ran = 5.0, lengths_run(net)
    net.model.train()
    net.hidden(batch)
    with torch.no_grad():  # evaluation has none
        net.hidden(batch)
    assert ran == [len(batch), len(batch) - sum(batch.alike())]


def test_micro_batches_do_not_change_the_gradient():
    """Pairs are rows of two members, which no split parts; prompts that are shared across rows may be parted."""
    net = packed_network("llama")
    docs = []
    for row, (first, second) in enumerate(zip(nested()[::2], nested()[1::2])):
        docs.append(Document(np.r_[first.tokens, second.tokens], np.r_[first.weights, second.weights], row,
                             (0, len(first.tokens))))  # fmt: skip
    batch = Batch.pack(docs * 2)
    parts = [losses(net, part) for part in batch.split(90)]
    assert len(parts) > 2
    same(losses(net, batch), (sum(p[0] for p in parts), {n: sum(p[1][n] for p in parts) for n in parts[0][1]}), 3e-5)


def test_a_batch_is_the_same_every_time():
    net, batch = packed_network("llama"), Batch.pack(ROWS["nested"])
    first, second = losses(net, batch), losses(net, batch)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][n], second[1][n]) for n in first[1])


def test_families_that_are_told_which_text_a_token_is_of_run_apart():
    net, batch = packed_network("llama"), Batch.pack(ROWS["pairs"])
    batch.token_fields["types"] = torch.zeros(len(batch), dtype=torch.int64)
    ran = lengths_run(net)
    net.hidden(batch)
    assert ran == [len(batch)]




# ---------------------------------------------------------------------------- beforehand


def test_explained_as_it_runs(settings, tmp_path):
    """Of pairs with long prompts, what layers keep is that of the tokens that are run: here 3 of 5."""
    from luthier import configure
    from luthier.assemble import outline
    from luthier.explain import plan, rehearsal

    pairs = [{"prompt": "say it again, " * 2 + f"{i}", "chosen": "yes " * 2 + str(i), "rejected": "no " * 3 + str(i)}
             for i in range(12)]  # fmt: skip
    train = write_rows(tmp_path / "pairs.jsonl", pairs)
    settings = settings | {"data": {"train": str(train), "max_length": 128}, "batch": {"examples": 4,
                           "micro_tokens": 1024}}  # fmt: skip
    config = configure(settings, method="dpo")
    row = plan.counted(config).largest
    assert sum(row.alike) > 0.35 * row.tokens
    kept = {}
    for shares in (False, True):
        made = outline(config, "cpu")
        made.network.shares = shares
        memory, work = rehearsal.rehearse(made, [row], False, "cpu")
        kept[shares] = memory.activations, work.forward
    share = 1 - sum(row.alike) / row.tokens
    assert share < kept[True][0] / kept[False][0] < share + 0.15
    assert kept[True][1] < kept[False][1]
