"""The engine: whoever shares a step, each answer is the one that transformers gives to its prompt alone."""

import asyncio
import threading
import time

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
from luthier.serve.requests import Busy, Refused, Request, Stopping, Unknown
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
def engine(llama):
    with Engine(llama, TOKENIZER, Limits(slots=4, chunk=6, cache_tokens=600)) as made:
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
@pytest.mark.parametrize("make, apart", [(gemma2, False), (mamba, True)])
def test_other_families_are_exact_too(make, apart):
    """Soft caps run together, a state-space mixer alone."""
    model = sharp(make())
    expected = [theirs(model, prompt) for prompt in PROMPTS]
    with Engine(Network(sharp(make())), TOKENIZER, Limits(slots=3, chunk=6)) as engine:
        assert (engine.apart is not None) == apart, engine.apart
        streams = [engine.submit(Request(prompt, NEW)) for prompt in PROMPTS]
        assert [stream.result().tokens for stream in streams] == expected


def alone(llama, request):
    with Engine(llama, TOKENIZER, Limits(slots=1, kept=0)) as made:
        return made.submit(request).result()


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


def test_a_seed_draws_what_generate_draws(llama, engine):
    for settings in ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.5, "top_k": 7}):
        expected = generate(llama_again(), [PROMPTS[1]], set(), NEW, seed=11, **settings)[0]
        assert engine.submit(Request(PROMPTS[1], NEW, seed=11, **settings)).result().tokens == expected


def llama_again():
    return network()


@examples(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(1, 40), st.integers(1, 12), st.sampled_from([0.0, 0.0, 1.0]),
            st.sampled_from(["whole", "whole", "cancel", "late"]),
        ),
        min_size=1, max_size=8,
    ),
    st.sampled_from([Limits(slots=2, chunk=5, cache_tokens=80), Limits(slots=5, chunk=16, cache_tokens=140, kept=3)]),
)  # fmt: skip
def test_random_arrivals_are_answered_as_alone(wanted, limits):
    """Prompts with equal beginnings, cut off and put back in a small cache, cancelled in between."""
    net = network()
    requests = [
        Request([(i * 31 + 7) % 300 for i in range(n)] + [start], new, temperature=temperature, seed=start)
        for start, n, new, temperature, _ in wanted
    ]
    with Engine(net, TOKENIZER, limits) as engine:
        streams = []
        for request, (*_, way) in zip(requests, wanted):
            if way == "late" and streams:
                next(iter(streams[-1]), None) if not streams[-1].done else None
                streams[-1] = engine.submit(streams[-1].request.__class__(**vars(streams[-1].request) | {"id": request.id + "x"}))
            streams.append(engine.submit(request))
            if way == "cancel":
                streams[-1].cancel()
        answers = [stream.result() for stream in streams]
        stats = engine.stats()
        assert stats["running"] == stats["waiting"] == stats["cache_tokens"] == 0
        for request, answer in zip(requests, answers):
            again = engine.submit(Request(request.tokens, request.max_new_tokens, request.temperature, seed=request.seed))
            whole = again.result()
            assert answer.tokens == whole.tokens[: len(answer.tokens)]
            assert answer.finish_reason == "cancelled" or answer == whole
    with Engine(network(), TOKENIZER, Limits(slots=1, kept=0)) as one:
        for request, answer in zip(requests, answers):
            whole = one.submit(Request(request.tokens, request.max_new_tokens, request.temperature, seed=request.seed))
            assert answer.tokens == whole.result().tokens[: len(answer.tokens)]
