"""Answers: batched decoding with a cache equals transformers' generate on one prompt at a time."""

import pytest
import torch
from conftest import make_model, make_tokenizer

from luthier.data.masks import Renderer
from luthier.generate import Chat, choose, generate
from luthier.models import network, trials

PROMPTS = [[7, 9, 11], [40, 41, 42, 43, 44, 45, 46, 47], [5], [100, 3, 100, 3, 100], [250, 2, 77]]
NEW = 24


@pytest.fixture(params=["llama", "gemma3", "gpt2"])
def net(request):
    model = make_model(request.param)
    with torch.no_grad():
        for p in model.parameters():  # else a random model repeats one token
            p.mul_(4.0 if p.ndim > 1 else 1.0)
    made = network.Network(model)
    trials.prepare(made, "auto")
    return made


def theirs(model, prompt, stop, count=NEW):
    """Greedy decoding of one prompt by transformers, cut before the stop token."""
    model.set_attn_implementation("eager")
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
        max_new_tokens=count, eos_token_id=sorted(stop) or None, pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    cut = next((i for i, token in enumerate(out) if token in stop), len(out))
    return out[:cut]


@pytest.mark.filterwarnings("ignore")
def test_batches_answer_as_transformers_does_one_by_one(net):
    free = generate(net, PROMPTS, set(), NEW, batch_size=5)
    assert [len(a) for a in free] == [NEW] * 5
    # Stop tokens that end the prompts at different lengths: some at once, so that finished rows stay in a batch.
    stop = {free[0][3], free[1][9], free[3][0]}
    ours = {size: generate(net, PROMPTS, stop, NEW, batch_size=size) for size in (1, 2, 5)}
    expected = [theirs(make_again(net), p, stop) for p in PROMPTS]
    assert len({len(a) for a in expected}) > 1, "the test wants answers of several lengths"
    for size, found in ours.items():
        assert found == expected, f"batches of {size}"


def make_again(net):
    """The same weights in a model of transformers that Luthier has not touched."""
    again = type(net.model)(net.config)
    again.load_state_dict(net.model.state_dict())
    return again.eval()


def test_tokens_are_handed_out_as_they_come_and_never_after_the_stop(net):
    whole = generate(net, [PROMPTS[1]], set(), NEW)[0]
    stop = {whole[5]}
    seen: list[int] = []
    answer = generate(net, [PROMPTS[1]], stop, NEW, on_token=seen.append)[0]
    assert seen == answer == whole[: whole.index(whole[5])]


def test_sampling_follows_its_seed_and_top_p():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4000, 1)
    drawn = choose(logits, 1.0, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, choose(logits, 1.0, 1.0, torch.Generator().manual_seed(0)))
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(share, logits[0].softmax(-1), atol=0.03, rtol=0)
    # softmax is (.032, .087, .237, .644): 0.7 is held by the two likeliest, whatever is left is never drawn.
    assert set(choose(logits, 1.0, 0.7, None).tolist()) == {2, 3}
    assert set(choose(logits, 1.0, 1e-9, None).tolist()) == {3}
    assert choose(logits[:1], 0.0, 1.0, None).tolist() == [3]


def test_a_chat_keeps_its_turns():
    made = network.Network(make_model())
    chat = Chat(made, Renderer(make_tokenizer(), "all", 512), system="be brief")
    parts: list[str] = []
    first = chat.say("ab", parts.append, max_new_tokens=6)
    assert "".join(parts).strip() == first
    chat.say("cd", parts.append, max_new_tokens=2)
    assert [m["role"] for m in chat.history] == ["system", "user", "assistant", "user", "assistant"]
    assert len(chat.ask("ab", "cd", "ef", max_new_tokens=3)) == 3


@pytest.mark.filterwarnings("ignore")
def test_a_mixer_without_attention_answers_as_transformers_does():
    """Its mask is one of the tokens at hand: given that of the whole text, each further token was run many times."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0 if p.ndim > 1 else 1.0)
    expected = []
    for prompt in PROMPTS:
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
            max_new_tokens=9, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    made = network.Network(model)
    assert generate(made, PROMPTS, set(), 9) == expected
    assert [generate(made, [prompt], set(), 9)[0] for prompt in PROMPTS] == expected
