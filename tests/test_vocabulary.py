"""Vocabularies: a trained tokenizer is lossless, repeatable, blind to held-out rows; new tokens start at the mean."""

import copy
import hashlib
import json
import random
import shutil

import pytest
import torch
from conftest import make_model, make_tokenizer, save_model, write_rows
from safetensors.torch import load_file

from luthier import checkpoint, configure, train
from luthier.assemble import assemble, restore, tokenizer_and_renderer
from luthier.data import Data, dataset, holdout
from luthier.errors import CheckpointError, DataError, ModelError
from luthier.models import Model, vocabulary
from luthier.monitor import Console

QUIET = Console(quiet=True)
TEXTS = [f"the {a} of the {b} was {n} and not {n * 7}\n" for n in range(40) for a, b in (("sea", "sun"), ("ab", "ba"))]


def random_text(rng: random.Random) -> str:
    """Any scalar values of Unicode, with runs of spaces and digits between them."""
    def character() -> str:
        kind = rng.random()
        if kind < 0.3:
            return rng.choice(" \t\n\r0123456789ab")
        code = rng.randrange(0x110000 if kind < 0.7 else 0x3000)
        return chr(code) if not 0xD800 <= code < 0xE000 else "x"
    return "".join(character() for _ in range(rng.randrange(1, 60)))


def test_every_text_is_written_and_read_back():
    tokenizer = vocabulary.train(TEXTS, 300, ["<|endoftext|>", "<|pad|>"])
    rng = random.Random(1)
    for text in [*(random_text(rng) for _ in range(500)), *map(chr, range(256)), "é", "🙂 ", " <|pad|> "]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert max(ids) < len(tokenizer)


def test_it_has_what_was_asked_for():
    tokenizer = vocabulary.train(TEXTS, 275, ["<|endoftext|>", "<|pad|>"])
    assert len(tokenizer) == 275
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    ids = tokenizer("the sea 77")["input_ids"]
    assert ids[0] == 0  # a text begins with the token that its first one is predicted from
    assert tokenizer.convert_ids_to_tokens(ids[-2:]) == ["7", "7"]  # digits alone
    assert len(ids) < 1 + len("the sea 77")  # merges were learnt


def test_merges_are_those_that_a_hand_finds():
    """aaab x 5 and aab x 2: pairs `aa` 2*5 + 1*2 = 12 against `ab` 7, so `aa` is first; then `aa a` 5, `ab` 5 + ... .

    After `aa`: words are aa a b (5 times) and aa b (2 times): pairs `aa a` 5, `a b` 5, `aa b` 2. The tie is broken by
    the lower pair of ids, `a b` (a and b are single bytes, before `aa`).
    """
    tokenizer = vocabulary.train(["aaab"] * 5 + ["aab"] * 2, 260, ["<|endoftext|>", "<|pad|>"])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert [tuple(m) for m in merges] == [("a", "a"), ("a", "b")]


def test_the_same_texts_make_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        vocabulary.train(iter(TEXTS), 320, ["<|endoftext|>", "<|pad|>"]).save_pretrained(tmp_path / name)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()


# ---------------------------------------------------------------------------- held-out rows


def settings_of(tmp_path, rows, name="run", **extra):
    base = {
        "model": {"size": "tiny", "vocab_size": 290},
        "data": {"train": str(write_rows(tmp_path / f"{name}.jsonl", rows)), "validation": 8, "max_length": 128},
        "batch": {"examples": 4, "micro_tokens": 128}, "monitor": {"report_to": []}, "max_steps": 4,
        "output_dir": str(tmp_path / name),
    }  # fmt: skip
    return configure(base, extra, method="pretrain")


@pytest.mark.parametrize("validation", [8, 0.2])
def test_held_out_rows_do_not_change_the_tokenizer(tmp_path, validation):
    """Their text is replaced by other text, one by one and all together: the tokenizer's bytes stay the same."""
    rows = [{"text": text} for text in TEXTS]
    held_out = holdout.drawn(len(rows), validation, 0)
    others = [{"text": "zebra quagga zebra quagga"} if i in held_out else row for i, row in enumerate(rows)]
    made = []
    for name, content in (("one", rows), ("two", others)):
        config = settings_of(tmp_path, content, name, data={"validation": validation})
        _, renderer = tokenizer_and_renderer(config)
        made.append((tmp_path / name / "tokenizer" / "tokenizer.json").read_bytes())
        training, validated = dataset.open_rows(config.data, renderer, None, print, print)
        assert {d.row for d in validated.documents} == held_out
        assert {d.row for d in training.documents} == set(range(len(rows))) - held_out
    assert made[0] == made[1]
    assert b"zebra" not in made[1]
    other = next(i for i in range(len(rows)) if i not in held_out)  # while a training row does change it
    changed = [{"text": "zebra quagga " * 9} if i == other else row for i, row in enumerate(rows)]
    tokenizer_and_renderer(settings_of(tmp_path, changed, "three", data={"validation": validation}))
    assert (tmp_path / "three" / "tokenizer" / "tokenizer.json").read_bytes() != made[0]


def test_the_split_does_not_depend_on_which_rows_are_bad(tmp_path):
    """Bad rows are left out of either side; every other row stays on its side."""
    rows = [{"text": text} for text in TEXTS]
    held_out = holdout.drawn(len(rows), 8, 0)
    bad = {min(held_out), next(i for i in range(len(rows)) if i not in held_out)}
    rows = [{"text": " "} if i in bad else row for i, row in enumerate(rows)]
    config = settings_of(tmp_path, rows, data={"on_bad_row": "skip"})
    _, renderer = tokenizer_and_renderer(config)
    training, validation = dataset.open_rows(config.data, renderer, None, print, print)
    assert {d.row for d in validation.documents} == held_out - bad
    assert {d.row for d in training.documents} == set(range(len(rows))) - held_out - bad


def test_texts_of_conversations_files_and_limits(tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(6)])
    data = Data(train=str(rows), validation=str(rows), limit=2)
    assert list(holdout.training_texts(data)) == ["p0", "c0", "p1", "c1"]
    with pytest.raises(DataError, match="leaves rows on both sides"):
        list(holdout.training_texts(Data(train=str(rows), validation=6)))


# ---------------------------------------------------------------------------- kept


def keep(folder, texts=TEXTS, resumed=False, **extra):
    said = []
    vocabulary.keep(folder, Model(size="tiny", vocab_size=280, **extra), lambda: iter(texts), resumed, said.append)
    return said


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_it_is_made_once_and_found_again(tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    assert "280 tokens" in keep(folder)[0]
    before = digests(folder)
    real = vocabulary.train
    monkeypatch.setattr(vocabulary, "train", None)
    assert keep(folder) == []
    assert keep(folder, texts=["never read"], resumed=True) == []
    monkeypatch.setattr(vocabulary, "train", real)
    assert digests(folder) == before
    assert keep(folder, texts=[*TEXTS, "one more"])  # another corpus before anything was trained: made anew
    assert digests(folder) != before


def test_what_a_resumed_run_cannot_use_is_refused(tmp_path):
    folder = tmp_path / "tokenizer"
    with pytest.raises(CheckpointError, match="restore that folder"):
        keep(folder, resumed=True)
    keep(folder)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json; restore"):
        keep(folder, resumed=True)
    assert keep(folder)  # without checkpoints, it is mended
    with pytest.raises(CheckpointError):
        keep(folder, resumed=True, chat_template="chatml")
    assert not list(tmp_path.glob(".tokenizer.*"))


def test_no_text_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="hold no text"):
        keep(tmp_path / "tokenizer", texts=[])


def test_chat_turns_are_tokens_where_the_template_has_them(tmp_path):
    rows = [{"prompt": f"what is {i}", "completion": f"{i} is {i}"} for i in range(40)]
    config = settings_of(tmp_path, rows, model={"chat_template": "chatml"}, data={"format": "auto"})
    tokenizer, renderer = tokenizer_and_renderer(config)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert renderer.stop_tokens() == {0, end}
    training, _ = dataset.open_rows(config.data, renderer, None, print, print)
    assert all(d.tokens[-1] == end for d in training.documents)


# ---------------------------------------------------------------------------- new tokens

NEW = ["<tool>", "</tool>"]


def test_new_rows_are_the_mean_of_the_old_and_nothing_else_changes():
    for family, extra in (("llama", {"tie_word_embeddings": True}), ("llama", {}), ("phi", {}), ("gpt2", {})):
        model, tokenizer = make_model(family, **extra), make_tokenizer()
        before = copy.deepcopy(model)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # 259: no padding is left
        vocabulary.add(tokenizer, Model(name="x", new_tokens=NEW))
        vocabulary.fit(model, tokenizer, NEW)
        old, head = before.get_input_embeddings().weight[:259], before.get_output_embeddings()
        rows = model.get_input_embeddings().weight
        assert len(rows) == 261 == model.config.vocab_size
        assert torch.equal(rows[:259], old)
        torch.testing.assert_close(rows[259:], old.mean(0).expand(2, -1))
        ours = model.get_output_embeddings()
        torch.testing.assert_close(ours.weight[259:], head.weight[:259].mean(0).expand(2, -1))
        assert (ours.weight is rows) == (head.weight is before.get_input_embeddings().weight)
        if head.bias is not None:
            torch.testing.assert_close(ours.bias[259:], head.bias[:259].mean().expand(2))
            assert torch.equal(ours.bias[:259], head.bias[:259])
        tokens = torch.arange(10)[None] + 65
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits[..., :259], before(tokens).logits[..., :259])


def test_a_padded_vocabulary_is_used_before_it_is_made_longer():
    model, tokenizer = make_model(), make_tokenizer()  # 320 rows for 259 tokens
    before = model.get_input_embeddings().weight.clone()
    vocabulary.add(tokenizer, Model(name="x", new_tokens=NEW))
    vocabulary.fit(model, tokenizer, NEW)
    after = model.get_input_embeddings().weight
    assert after.shape == before.shape
    assert torch.equal(after[:259], before[:259])
    assert torch.equal(after[261:], before[261:])
    torch.testing.assert_close(after[259:261], before[:259].mean(0).expand(2, -1))


@pytest.mark.parametrize("token", ["<|im_end|>", "a"])
def test_a_token_that_is_there_already_is_an_error(token):
    with pytest.raises(ModelError, match="of the tokenizer already"):
        vocabulary.add(make_tokenizer(), Model(name="x", new_tokens=[token]))


def test_special_and_plain():
    for special in (True, False):
        tokenizer = make_tokenizer()
        vocabulary.add(tokenizer, Model(name="x", new_tokens=NEW, new_tokens_special=special))
        ids = tokenizer("a<tool>b", add_special_tokens=False)["input_ids"]
        assert len(ids) == 3
        assert tokenizer.decode(ids, skip_special_tokens=True) == ("ab" if special else "a<tool>b")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model = make_model()
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(100)])
    with pytest.raises(ModelError, match="39 tokens without an embedding"):
        vocabulary.fit(model, tokenizer, [])
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<image{i}>" for i in range(70)]})
    vocabulary.fit(model, tokenizer, [])  # markers of images, as Gemma has one beyond its embeddings
    tokenizer.pad_token = "<image69>"
    with pytest.raises(ModelError, match=r"as model\.tokenizer"):
        vocabulary.fit(model, tokenizer, [])


def tools_settings(settings, tmp_path, **model):
    """Rows whose answers hold a plain new token, on a model whose embeddings are full."""
    folder = tmp_path / "full-vocabulary"
    if not folder.exists():
        save_model(folder)
        small = make_model(tie_word_embeddings=model.pop("tied", True))
        small.resize_token_embeddings(259, mean_resizing=False)
        small.save_pretrained(folder)
    rows = [{"prompt": f"call {i}", "completion": f"<tool>{i}</tool>"} for i in range(30)]
    data = {"train": str(write_rows(tmp_path / "tools.jsonl", rows))}
    return settings | {"data": settings["data"] | data, "model": {
        "name": str(folder), "new_tokens": NEW, "new_tokens_special": False} | model}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_with_new_tokens_learns_exports_and_resumes(settings, tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = tools_settings(settings, tmp_path, tied=tied) | {"max_steps": 12, "checkpoint": {"every": 4}}
    result = train(configure(settings, method="full"), QUIET)
    assert result.report["held_out_loss"]["tuned"] < result.report["held_out_loss"]["base"]
    if tied:
        result.export(tmp_path / "out", "full")  # with the comparison in a fresh process
    else:
        made, _ = restore(tmp_path / "run")
        made.network.model.save_pretrained(tmp_path / "out")
        made.tokenizer.save_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 261 == len(model.get_input_embeddings().weight)
    assert model.config.tie_word_embeddings is tied
    assert tokenizer("<tool>", add_special_tokens=False)["input_ids"] == [259]
    rows = model.get_output_embeddings().weight
    assert not torch.equal(rows[259], rows[260])  # they have parted from the mean
    last = checkpoint.listed(tmp_path / "run" / "checkpoints")[-1]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / last.name)
    (tmp_path / "again" / "report.json").unlink()
    train(configure(settings, {"output_dir": str(tmp_path / "again")}, method="full"), QUIET)
    one, two = (load_file(tmp_path / n / "checkpoints" / last.name / "weights.safetensors") for n in ("run", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_frozen_embeddings_are_refused(settings, tmp_path):
    settings = tools_settings(settings, tmp_path, tied=False)
    partial = {"trainable": {"kind": "partial", "embeddings": True}}
    with pytest.raises(ModelError, match=r"the head would not move: .* trainable\.head=true"):
        assemble(configure(settings, partial, method="partial"))
    partial["trainable"]["head"] = True
    made = assemble(configure(settings, partial, method="partial"))
    assert made.network.packed
    assert "lm_head.weight" in made.parameters()
