"""The engine: whoever shares a step, each answer is the one that transformers gives to its prompt alone."""

import asyncio
import re
import threading
import time
import uuid
from dataclasses import replace

import pytest
import torch
from conftest import make_model, make_tokenizer
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from luthier import adapters
from luthier.errors import ModelError
from luthier.generate import distribution, drawn, generate
from luthier.models.network import Network
from luthier.serve.draws import Wish, _sampled, draw
from luthier.serve.engine import Engine, Limits
from luthier.serve.pool import Pool
from luthier.serve.requests import Busy, Refused, Request, Stopping, Unknown, collected
from luthier.serve.texts import Texts

PROMPTS = [[7, 9, 11], [40, 41, 42, 43, 44, 45, 46, 47] * 5, [5], [100, 3, 100, 3, 100], [250, 2, 77] * 9]
NEW = 14
TOKENIZER = make_tokenizer()


def sharp(model):
    """Weights so large that answers vary: a small random model repeats one token otherwise."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0 if p.ndim > 1 else 1.0)
    return model


def network(family="llama", **extra):
    return Network(sharp(make_model(family, **extra)))


def theirs(model, prompt, count=NEW):
    """Greedy decoding of one prompt by transformers."""
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
        max_new_tokens=count, eos_token_id=None, pad_token_id=0,
    )[0, len(prompt) :]  # fmt: skip
    return out.tolist()


@pytest.fixture(scope="module")
def llama():
    return network()


@pytest.fixture(scope="module")
def engine():
    with Engine(network(), TOKENIZER, Limits(slots=4, chunk=6, cache_tokens=600)) as made:
        yield made


# ---------------------------------------------------------------------------- the same answers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi", "gpt2"])
def test_answers_are_those_of_transformers_one_by_one(family):
    model = sharp(make_model(family))
    expected = [theirs(model, prompt) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) > 2
    with Engine(Network(sharp(make_model(family))), TOKENIZER, Limits(slots=3, chunk=6)) as engine:
        assert engine.apart is None
        streams = [engine.submit(Request(prompt, NEW)) for prompt in PROMPTS]
        assert [stream.result().tokens for stream in streams] == expected
        assert engine.stats()["steps"] < NEW * len(PROMPTS)


def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=5.0,
        query_pre_attn_scalar=8,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "apart"), [(gemma2, False), (mamba, True)])
def test_other_families_are_exact_too(make, apart):
    """Soft caps run together, a state-space mixer alone."""
    model = sharp(make())
    expected = [theirs(model, prompt) for prompt in PROMPTS]
    with Engine(Network(sharp(make())), TOKENIZER, Limits(slots=3, chunk=6)) as engine:
        assert (engine.apart is not None) == apart, engine.apart
        streams = [engine.submit(Request(prompt, NEW)) for prompt in PROMPTS]
        assert [stream.result().tokens for stream in streams] == expected


def test_what_is_drawn_follows_from_the_seed_alone(engine):
    def ask(seed, others):
        streams = [engine.submit(Request([8, 9, n], 9, temperature=1.3, seed=n)) for n in range(others)]
        made = engine.submit(Request([7, 9, 11], NEW, temperature=1.0, top_p=0.9, top_k=50, seed=seed)).result()
        return made.tokens, [stream.result() for stream in streams]

    first, _ = ask(3, 0)
    assert ask(3, 5)[0] == first
    assert ask(4, 0)[0] != first
    loose = {tuple(engine.submit(Request([7], 4, temperature=1.0)).result().tokens) for _ in range(4)}
    assert len(loose) > 1, "without a seed answers differ"


def test_a_seed_draws_what_generate_draws(engine):
    for settings in ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.5, "top_k": 7}):
        expected = generate(network(), [PROMPTS[1]], set(), NEW, seed=11, **settings)[0]
        assert engine.submit(Request(PROMPTS[1], NEW, seed=11, **settings)).result().tokens == expected


def again(request):
    """The same question, under another name."""
    return replace(request, id=uuid.uuid4().hex)


@examples(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(1, 40), st.integers(1, 12), st.sampled_from([0.0, 1.0]),
            st.sampled_from(["at once", "after a token of the last", "cancelled"]),
        ),
        min_size=1, max_size=8,
    ),
    st.sampled_from([Limits(slots=2, chunk=5, cache_tokens=80), Limits(slots=5, chunk=16, cache_tokens=140, kept=3)]),
)  # fmt: skip
def test_random_arrivals_are_answered_as_alone(llama, wanted, limits):
    """Prompts with equal beginnings, cut off, put back in a small cache, and cancelled."""
    requests = [
        Request([(i * 31 + 7) % 300 for i in range(n)] + [start], new, temperature=temperature, seed=start)
        for start, n, new, temperature, _ in wanted
    ]
    with Engine(llama, TOKENIZER, limits) as engine:
        streams, begun = [], []
        for request, (*_, way) in zip(requests, wanted):
            if way == "after a token of the last" and streams and not begun:
                begun.append((len(streams) - 1, next(iter(streams[-1]))))
            streams.append(engine.submit(request))
            if way == "cancelled":
                streams[-1].cancel()
        answers = []
        for i, stream in enumerate(streams):
            before = [event for which, event in begun if which == i]
            rest = [] if before and before[0].finish_reason else list(stream)
            answers.append(collected(before + rest))
        stats = engine.stats()
        assert stats["running"] == stats["waiting"] == stats["cache_tokens"] == 0
    with Engine(llama, TOKENIZER, Limits(slots=1, kept=0)) as one:
        for request, answer in zip(requests, answers):
            whole = one.submit(again(request)).result()
            if answer.finish_reason == "cancelled":
                assert answer.tokens == whole.tokens[: len(answer.tokens)]
            else:
                assert answer == whole


# ---------------------------------------------------------------------------- beginnings that were there already


def test_equal_beginnings_are_run_once(llama):
    system, questions = [(i * 13) % 300 for i in range(50)], [[n, n + 1, 5] for n in range(6)]
    with Engine(llama, TOKENIZER, Limits(kept=0)) as plain:
        expected = [plain.submit(Request(system + q, 8)).result() for q in questions]
    with Engine(llama, TOKENIZER, Limits(slots=4)) as engine:
        streams = [engine.submit(Request(system + q, 8)) for q in questions]
        assert [stream.result() for stream in streams] == expected
        assert [stream.reused for stream in streams] == [0, 50, 50, 50, 50, 50]
        assert engine.stats()["reused_tokens"] == 250
        # The next turn of a conversation goes on where it was, without a copy.
        turn = system + questions[0] + expected[0].tokens + [9, 9]
        stream = engine.submit(Request(turn, 8))
        answer = stream.result()
        assert stream.reused == len(turn) - 3  # the last token of an answer was never run
        known = engine.submit(Request(system, 8))  # all of it is known, and one token is run again
        known_answer = known.result()
        assert known.reused == 49
        with pytest.raises(ModelError, match="an engine answers with this network already"):
            Engine(llama, TOKENIZER).start()
    with Engine(llama, TOKENIZER, Limits(kept=0)) as plain:
        assert plain.submit(Request(turn, 8)).result() == answer
        assert plain.submit(Request(system, 8)).result() == known_answer


def test_a_small_cache_holds_what_it_can_and_no_more(llama):
    """Stretches that grow, move and are put back: 6 answers of 90 tokens over room for 200."""
    prompts = [[n * 7 + i for i in range(10)] for n in range(6)]
    with Engine(llama, TOKENIZER, Limits(slots=1, kept=0)) as plain:
        expected = [plain.submit(Request(p, 80)).result().tokens for p in prompts]
    with Engine(llama, TOKENIZER, Limits(slots=6, cache_tokens=200)) as engine:
        streams = [engine.submit(Request(p, 80)) for p in prompts]
        assert [stream.result().tokens for stream in streams] == expected
        stats = engine.stats()
        assert stats["put_back"] > 0
        assert stats["cache_capacity"] == 200
        with pytest.raises(Refused, match="the limit is 200"):
            engine.submit(Request([1] * 100, 101))


# ---------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A base with two LoRAs, one on the embeddings and the head, too, and their folders."""
    folder = tmp_path_factory.mktemp("adapters")
    from peft import LoraConfig, get_peft_model

    for name, modules in (("one", ["q_proj", "v_proj", "down_proj"]), ("two", ["k_proj", "up_proj", "embed_tokens"])):
        torch.manual_seed(len(name))
        tuned = get_peft_model(sharp(make_model()), LoraConfig(r=4, lora_alpha=16, target_modules=modules))
        for key, p in tuned.named_parameters():
            if "lora_" in key:
                p.data.normal_(0, 0.3)
        tuned.save_pretrained(folder / name)
    model = sharp(make_model())
    for name in ("one", "two"):
        adapters.load(model, folder / name)
    adapters.switch(model, None)
    return model, folder


@pytest.mark.filterwarnings("ignore")
def test_each_request_has_its_adapter_in_one_batch(adapted):
    from peft import PeftModel

    model, folder = adapted
    expected = {None: [theirs(sharp(make_model()), p) for p in PROMPTS]}
    for name in ("one", "two"):
        alone = PeftModel.from_pretrained(sharp(make_model()), folder / name).eval()
        expected[name] = [theirs(alone, p) for p in PROMPTS]
    assert len({str(answers) for answers in expected.values()}) == 3
    with Engine(Network(model), TOKENIZER, Limits(slots=15)) as engine:
        assert sorted(engine.variants) == ["one", "two"]
        assert engine._runner.mixes
        streams = {
            (name, i): engine.submit(Request(prompt, NEW, adapter=name))
            for i, prompt in enumerate(PROMPTS) for name in expected
        }  # fmt: skip
        for (name, i), stream in streams.items():
            assert stream.result().tokens == expected[name][i], (name, i)
        assert engine.stats()["steps"] < 3 * NEW
        with pytest.raises(Unknown, match="no adapter 'three'; there are: one, two"):
            engine.submit(Request([1], adapter="three"))
    assert not any(module.enabled for module in model.modules() if hasattr(module, "choice")), "as it was"


@pytest.mark.filterwarnings("ignore")
def test_variants_name_what_is_on(adapted):
    model, _ = adapted
    adapters.switch(model, "one")
    try:
        both = {"both": ("one", "two"), "base": ()}
        with Engine(Network(model), TOKENIZER, variants=both) as engine:
            plain = theirs(sharp(make_model()), PROMPTS[0])
            answers = {n: engine.submit(Request(PROMPTS[0], NEW, adapter=n)) for n in (None, "both", "base")}
            found = {name: stream.result().tokens for name, stream in answers.items()}
        assert found["base"] == plain != found[None]
        assert found[None] == generate(Network(model), [PROMPTS[0]], set(), NEW)[0]
        adapters.combine(model, {"one": 1.0, "two": 1.0})
        assert found["both"] == generate(Network(model), [PROMPTS[0]], set(), NEW)[0]
    finally:
        adapters.switch(model, None)
    with pytest.raises(ModelError, match="no adapter 'three'"):
        Engine(Network(model), TOKENIZER, variants={"x": ("three",)})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("together", [True, False])
def test_adapters_of_other_kinds_share_a_batch_too(tmp_path, together):
    """A DoRA, which has no product of its own to add, beside a LoRA; in one pass, or in one for each."""
    from peft import LoraConfig, get_peft_model

    for name, dora in (("lora", False), ("dora", True)):
        torch.manual_seed(dora)
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "lm_head"], use_dora=dora)
        tuned = get_peft_model(sharp(make_model()), config)
        for key, p in tuned.named_parameters():
            if "lora_B" in key:
                p.data.normal_(0, 0.3)
        tuned.save_pretrained(tmp_path / name)
    model = sharp(make_model())
    for name in ("lora", "dora"):
        adapters.load(model, tmp_path / name)
    expected = {}
    for name in (None, "lora", "dora"):
        adapters.switch(model, name)
        expected[name] = generate(Network(model), PROMPTS, set(), NEW)
    adapters.switch(model, None)
    assert len({str(answers) for answers in expected.values()}) == 3
    with Engine(Network(model), TOKENIZER) as engine:
        assert engine._runner.mixes
        engine._runner.mixes = together
        streams = {(n, i): engine.submit(Request(p, NEW, adapter=n)) for i, p in enumerate(PROMPTS) for n in expected}
        for (name, i), stream in streams.items():
            assert stream.result().tokens == expected[name][i]


def by_documents(q, k, v, queries, keys, most_queries, most_keys, scale=None, window_size=(-1, 0), enable_gqa=False):
    """What the kernel for GPUs computes, one document after another: queries are the last of their keys."""
    out = torch.zeros(*q.shape[:2], v.shape[-1])
    for i in range(len(queries) - 1):
        mine, theirs = slice(*queries[i : i + 2].tolist()), slice(*keys[i : i + 2].tolist())
        n, m = mine.stop - mine.start, theirs.stop - theirs.start
        if n == 0:
            continue
        assert n <= most_queries and m <= most_keys  # noqa: PT018
        far = torch.arange(m - n, m)[:, None] - torch.arange(m)
        seen = (far >= 0) & ((far <= window_size[0]) if window_size[0] >= 0 else True)
        rows = (t.transpose(0, 1) for t in (q[mine], k[theirs], v[theirs]))
        made = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=seen, scale=scale, enable_gqa=True)
        out[mine] = made.transpose(0, 1)
    return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_borders_for_the_kernel_of_gpus(family, monkeypatch):
    """Where it runs, the cache is read where it is, and what lies between requests has no queries."""
    from luthier.serve import attention

    monkeypatch.setattr(attention, "on_flash", lambda t: True)
    monkeypatch.setattr(attention, "varlen_attn", by_documents)
    net = network(family)
    expected = [theirs(sharp(make_model(family)), prompt) for prompt in PROMPTS]
    with Engine(net, TOKENIZER, Limits(slots=3, chunk=6)) as engine:
        assert engine.apart is None
        for _ in range(2):
            streams = [engine.submit(Request(prompt, NEW)) for prompt in PROMPTS]
            assert [stream.result().tokens for stream in streams] == expected


def test_weights_laid_out_otherwise_give_the_same_numbers(llama):
    from luthier.serve.packed import packed

    model = llama.model
    tokens = torch.tensor([[7, 9, 11, 40, 41, 42]])
    with torch.no_grad():
        plain = model(tokens).logits
        with packed(model, 1 << 30) as used:
            if used == 0:
                pytest.skip("this PyTorch has no such operators")
            assert used >= model.lm_head.weight.nbytes and "forward" in vars(model.lm_head)  # noqa: PT018
            torch.testing.assert_close(model(tokens).logits, plain, atol=1e-4, rtol=1e-4)
        assert "forward" not in vars(model.lm_head)
        with packed(model, 0) as used:
            assert used == 0


# ---------------------------------------------------------------------------- ends


def test_stop_tokens_and_stop_texts(engine):
    whole = engine.submit(Request([7, 9, 11], NEW)).result()
    assert whole.finish_reason == "length"
    assert len(whole.tokens) == NEW
    at = next(i for i in range(2, NEW) if whole.tokens[i] not in whole.tokens[:i])
    answer = engine.submit(Request([7, 9, 11], NEW, stop=frozenset({whole.tokens[at]}))).result()
    assert answer.tokens == whole.tokens[: at + 1]
    assert answer.finish_reason == "stop"
    assert answer.stop == whole.tokens[at]
    assert answer.answer == whole.tokens[:at]
    text = TOKENIZER.decode(whole.tokens[:at])
    assert answer.text == text


class Letters:
    """A tokenizer of bytes."""

    def decode(self, tokens, skip_special_tokens=True):
        return bytes(t for t in tokens if t < 256).decode(errors="replace")


def told(text, stops, ends=True):
    texts = Texts(Letters(), stops)
    shown = []
    for byte in text.encode():
        shown.append(texts.add(byte))
        if texts.stopped is not None:
            break
    return shown + ([texts.end()] if ends else []), texts.stopped


def test_what_may_be_a_stop_text_is_held_back():
    assert told("ab##c", ["##!"]) == (["a", "b", "", "", "##c", ""], None)
    assert told("ab##!", ["##!"])[0] == ["a", "b", "", "", "", ""]
    assert told("ab##!", ["##!"])[1] == "##!"
    assert told("ab##", ["##!"]) == (["a", "b", "", "", "##"], None)
    assert told("xaab", ["aab"]) == (["x", "", "", "", ""], "aab")
    assert told("aaab", ["aab"]) == (["", "", "a", "", ""], "aab")
    assert told("one two", ["two", "ne"])[1] == "ne"


def test_no_character_is_cut():
    shown, _ = told("aé€😀b", [])
    assert shown == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]
    broken = Texts(Letters())
    assert "".join([broken.add(b) for b in b"a\xf0\x9fb"] + [broken.end()]) == "a\ufffdb"


@examples(max_examples=60, deadline=None)
@given(
    st.text(alphabet="ab#é€😀 ", max_size=30),
    st.lists(st.text(alphabet="ab#é ", min_size=1, max_size=4), max_size=3),
)
def test_texts_in_parts_are_the_text_before_its_first_stop(text, stops):
    shown, stopped = [], None
    texts = Texts(Letters(), stops)
    for byte in text.encode():
        shown.append(texts.add(byte))
        if (stopped := texts.stopped) is not None:
            break
    shown.append(texts.end())
    ends = {stop: text.find(stop) + len(stop) for stop in stops if stop in text}
    if not ends:
        assert ("".join(shown), stopped) == (text, None)
    else:
        first = min(ends.values())  # with the token that completes it
        starts = [end - len(stop) for stop, end in ends.items() if end == first]
        assert "".join(shown) == text[: min(starts)]


def test_real_text_in_parts(engine):
    text = "naïve 😀 text\n" * 9
    texts = Texts(TOKENIZER)
    parts = [texts.add(token) for token in TOKENIZER(text)["input_ids"]] + [texts.end()]
    assert "".join(parts) == text
    assert len(texts.tokens) < 20


@examples(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "▁", "▁a", "▁b", "<0xC3><0xA9>", "<0xF0><0x9F><0x98><0x80>"]), max_size=40))
def test_tokens_that_begin_with_a_space(pieces):
    """As SentencePiece has them: a text's first space is dropped, and what has no token of its own comes in bytes."""
    text = "".join(pieces)
    tokens = [SPACED.token_to_id(t) for t in re.findall("<0x..>|▁?[ab]|▁", text)]

    class Fast:
        def decode(self, tokens, skip_special_tokens=True):
            return SPACED.decode(tokens)

    texts = Texts(Fast())
    assert "".join([texts.add(token) for token in tokens] + [texts.end()]) == SPACED.decode(tokens)


def spaced():
    from tokenizers import Tokenizer, decoders, models

    words = ["a", "b", "▁", "▁a", "▁b", "<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("▁", "a"), ("▁", "b")]))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return made


SPACED = spaced()


# ---------------------------------------------------------------------------- what is drawn


def test_draws_are_those_of_generate():
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(0)) * 3
    uniforms = torch.rand(6, generator=torch.Generator().manual_seed(1))
    for temperature, top_p, top_k in ((1, 1, 0), (0.5, 0.9, 0), (2.5, 0.999, 0), (1, 0.5, 40), (1, 1, 7), (1, 1e-9, 0)):
        expected = drawn(distribution(logits, temperature, top_p, top_k), uniforms)
        assert torch.equal(_sampled(logits, temperature, top_p, top_k, uniforms), expected)


def test_masks_and_logprobs_of_rows():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0], [0.0, float("nan"), 0.0, 0.0]])
    only = torch.tensor([True, True, False, False])
    found = draw(logits, [Wish(0, 1, 0, 0, only, 2), Wish(1, 1, 0, 0.999, ~only), Wish(0, 1, 0, 0)])
    # softmax of (0, 1, 2, 3) is (.0321, .0871, .2369, .6439): logs -3.44, -2.44, -1.44, -.44
    assert found[0].token == 1
    assert found[0].logprob == pytest.approx(-2.4402, abs=1e-4)
    assert [t for t, _ in found[0].top] == [3, 2]
    assert found[0].top[0][1] == pytest.approx(-0.4402, abs=1e-4)
    assert found[1].token == 3
    assert found[1].logprob is None
    assert found[2].error == "the model's scores are not finite"
    assert draw(logits[:1], [Wish(0, 1, 0, 0, only & ~only)])[0].error == "no token is allowed"


def test_logprobs_are_the_models(engine):
    answer = engine.submit(Request(PROMPTS[1], 5, logprobs=3, temperature=2.0, seed=1)).result()
    with torch.no_grad():
        text = torch.tensor([PROMPTS[1] + answer.tokens])
        logprobs = sharp(make_model())(text).logits.log_softmax(-1)[0, len(PROMPTS[1]) - 1 : -1]
    expected = logprobs.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=1e-4)
    for row, top in zip(logprobs, answer.top):
        assert [token for token, _ in top] == row.topk(3).indices.tolist()


def test_masks_are_asked_for_once_a_token_in_order(engine):
    seen = []

    def allowed(answer):
        seen.append(answer)
        return torch.arange(300) % 3 == len(answer) % 3  # the vocabulary has 320

    answer = engine.submit(Request([7, 9], 6, allowed=allowed, temperature=1.0, seed=0)).result()
    assert [token % 3 for token in answer.tokens] == [0, 1, 2, 0, 1, 2]
    assert max(answer.tokens) < 300
    assert seen == [answer.tokens[:n] for n in range(6)]


# ---------------------------------------------------------------------------- what goes wrong


def test_what_fails_fails_alone(llama):
    def broken(answer):
        if len(answer) == 2:
            raise KeyError("a grammar's mistake")

    with Engine(llama, TOKENIZER, Limits(slots=4)) as engine:
        good = engine.submit(Request([7, 9, 11], NEW))
        bad = engine.submit(Request([7, 9, 12], NEW, allowed=broken)).result()
        wide = engine.submit(Request([7, 9, 12], NEW, allowed=lambda answer: torch.ones(999))).result()
        assert (bad.finish_reason, bad.error, len(bad.tokens)) == ("error", "KeyError: \"a grammar's mistake\"", 2)
        assert wide.error == "ValueError: a mask of shape [999] for 320 tokens"
        expected = good.result().tokens
        # A pass that fails because of one row: the others are run again without it.
        run = engine._runner.run

        def fails(pieces):
            if any(piece.row.tokens[0] == 13 for piece in pieces):
                raise MemoryError("no room for thirteen")
            return run(pieces)

        engine._runner.run = fails
        streams = [engine.submit(Request([first, 9, 11], NEW)) for first in (7, 13, 7)]
        answers = [stream.result() for stream in streams]
        assert [a.finish_reason for a in answers] == ["length", "error", "length"]
        assert answers[1].error == "MemoryError: no room for thirteen"
        assert answers[0].tokens == answers[2].tokens == expected
        stats = engine.stats()
        assert stats["failed_steps"] >= 1
        assert stats["ended_error"] == 3
        assert stats["cache_tokens"] == 0


@pytest.mark.filterwarnings("ignore")
def test_one_by_one_a_failure_spoils_no_cache():
    """A state-space mixer's cache cannot be written again: the rows of a failed step begin anew."""
    expected = [theirs(sharp(mamba()), p) for p in PROMPTS[:3]]
    with Engine(Network(sharp(mamba())), TOKENIZER, Limits(slots=3)) as engine:
        one, calls = engine._runner._one, []

        def fails(piece):
            calls.append(piece)
            if len(calls) == 8:
                raise RuntimeError("once")
            return one(piece)

        engine._runner._one = fails
        streams = [engine.submit(Request(p, NEW)) for p in PROMPTS[:3]]
        assert [stream.result().tokens for stream in streams] == expected
        assert engine.stats()["failed_steps"] == 1


def test_cancelled_late_and_stopped(llama):
    with Engine(llama, TOKENIZER, Limits(slots=1, waiting=2)) as engine:
        gate = threading.Event()
        engine.between(gate.wait)
        running = engine.submit(Request([7, 9], 400))
        waiting = engine.submit(Request([7, 10], 400, deadline=time.monotonic() - 1))
        with pytest.raises(Busy, match="2 requests are waiting") as refused:
            engine.submit(Request([7], 4))
        assert refused.value.status == 429
        with pytest.raises(Refused, match="there is a request"):
            engine.submit(Request([7], 4, id=running.request.id))
        gate.set()
        assert waiting.result().finish_reason == "deadline"
        first = next(iter(running))
        running.cancel()
        rest = list(running)
        assert first.token is not None
        assert rest[-1].finish_reason == "cancelled"
        assert len(rest) < 399
        assert engine.submit(Request([7, 9], 3)).result().finish_reason == "length"
        engine.cancel("nobody")
        long = engine.submit(Request([7, 9], 400))
        next(iter(long))
        engine.stop()
        assert list(long)[-1].finish_reason == "cancelled"
        with pytest.raises(Stopping):
            engine.submit(Request([7], 4))
        with pytest.raises(Stopping):
            engine.between(int)
    engine = Engine(llama, TOKENIZER).start()
    stream = engine.submit(Request([7, 9], 60))
    engine.stop(drain=60)
    assert stream.result().finish_reason == "length", "drained"


def test_users_are_served_in_turn(llama):
    order = []
    with Engine(llama, TOKENIZER, Limits(slots=1)) as engine:
        gate = threading.Event()
        engine.between(gate.wait)
        for n, user in enumerate(["loud"] * 4 + ["quiet"] * 2):
            note = lambda answer, n=n: order.append(n) if not answer else None  # noqa: E731
            stream = engine.submit(Request([7, 9], 2, user=user, allowed=note))
        gate.set()
        engine.stop(drain=60)
    assert stream.done
    assert order == [0, 4, 1, 5, 2, 3]


def test_long_prompts_do_not_hold_answers_up(llama):
    with Engine(llama, TOKENIZER, Limits(slots=3, chunk=8)) as engine:
        answer = engine.submit(Request([7, 9], 60))
        next(iter(answer))
        long = engine.submit(Request([i % 300 for i in range(300)], 2))
        short = engine.submit(Request([4, 5, 6], 2))
        assert short.result()
        assert answer.result()
        assert long.result().finish_reason == "length"
        assert short.ended < long.first


def test_asyncio_reads_streams(engine):
    async def ask(n):
        stream = engine.submit(Request([7, n], 6))
        return [event.token async for event in stream], await engine.submit(Request([7, n], 6)).aresult()

    async def both():
        return await asyncio.gather(*(ask(n) for n in range(8)))

    for tokens, answer in asyncio.run(both()):
        assert tokens == answer.tokens
        assert len(tokens) == 6
    waiting = engine.submit(Request([7, 1], 6))

    async def leaves():
        async for _ in waiting:
            break

    asyncio.run(leaves())
    assert list(waiting)[-1].finish_reason == "length", "a loop that ended is no harm"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokens": []}, "the prompt is empty"),
        ({"tokens": [320]}, "outside of the model's vocabulary of 320"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"seed": 1 << 70}, "seed="),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"stop_texts": ("",)}, "empty stop text"),
        ({"max_new_tokens": 600}, "the limit is"),
    ],
)
def test_what_cannot_be_answered_is_refused(engine, change, told):
    with pytest.raises(Refused, match=told) as refused:
        engine.submit(Request(**{"tokens": [1, 2]} | change))
    assert refused.value.status == 400


def test_between_finds_the_network_as_it_was(engine):
    from luthier.models import trials

    model = engine.network.model
    seen = engine.between(lambda: model(torch.tensor([[7, 9, 11]])).logits[0, -1].argmax().item()).result()
    assert seen == engine.submit(Request([7, 9, 11], 1)).result().tokens[0]
    with pytest.raises(ZeroDivisionError):
        engine.between(lambda: 1 / 0).result()
    packed = network()
    assert trials.prepare(packed, "auto") is None
    before = packed.model.config._attn_implementation
    with Engine(packed, TOKENIZER) as other:
        assert other.between(lambda: packed.model.config._attn_implementation).result() == before
        assert packed.model.config._attn_implementation != before
    assert packed.model.config._attn_implementation == before


def test_no_slot_and_no_memory_is_lost_over_thousands(llama):
    with Engine(llama, TOKENIZER, Limits(slots=16, cache_tokens=500, waiting=4000)) as engine:
        streams = [engine.submit(Request([n % 7, n % 300, 3], 1 + n % 3)) for n in range(2000)]
        for n, stream in enumerate(streams):
            if n % 10 == 0:
                stream.cancel()
        reasons = {stream.result().finish_reason for stream in streams}
        assert reasons <= {"length", "cancelled"}
        stats = engine.stats()
        assert stats["running"] == stats["waiting"] == stats["cache_tokens"] == 0
        assert not engine._live
        assert not engine._cancelled
        assert not engine._inbox
        assert len(engine._queue) == 0
        assert stats["ended_length"] + stats["ended_cancelled"] == stats["submitted"] == 2000
        pool = engine._runner.cache.pool
        assert pool.free + engine._runner.idle == 500
        assert len(engine._runner.cache.idle) <= 64


@examples(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "give", "resize", "close"]), st.integers(1, 30), st.integers(0, 9))))
def test_stretches_never_overlap(steps):
    """Against a plain list of who owns which place."""
    pool, held = Pool(64), []
    content: dict[int, object] = {}
    for what, size, which in steps:
        region = held[which % len(held)] if held else None
        if what == "take" and (made := pool.take(size)) is not None:
            held.append(made)
            content |= dict.fromkeys(range(made.start, made.end), made)
        elif what == "give" and region is not None:
            pool.give(region)
            held.remove(region)
        elif what == "resize" and region is not None:
            pool.resize(region, size)
        elif what == "close":
            pool.close_up(region)
            assert len(pool._free) <= 1
            assert (region is None or region.end == 64 - pool.free)
        owners = [place for r in held for place in range(r.start, r.end)]
        assert len(owners) == len(set(owners)) == 64 - pool.free
        assert all(0 <= place < 64 for place in owners)
        free = [place for start, end in pool._free for place in range(start, end)]
        assert sorted(owners + free) == list(range(64))
