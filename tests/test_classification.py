"""Classification and tagging: labels, rows, losses by hand and against transformers, figures against scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LLAMA, SMALL, make_tokenizer, write_rows
from test_train import QUIET, finished, in_two_parts

from luthier import classes, configure, labels, resolution, surgery, train
from luthier.assemble import assemble
from luthier.batch import Batch
from luthier.config import read_run
from luthier.data import Data, dataset, kinds
from luthier.data.conversations import BadRow
from luthier.data.formats import FORMATS, first_recognised
from luthier.data.masks import Renderer
from luthier.data.sources import Row
from luthier.document import Document
from luthier.errors import ConfigError, DataError, ModelError
from luthier.explain import explain
from luthier.models import Model, heads, load, network, trials
from luthier.objectives import classifying
from luthier.resolution import by_rows
from luthier.train import Trainer

ONE, SEVERAL, VALUE = labels.PROBLEMS
WORDS = ["the", "film", "was", "good", "bad", "long", "##er", "very", "ann", "bob", "in", "rome", "and", "went", "to"]


def make_wordpiece():
    """An encoder's tokenizer: words of a small vocabulary, [CLS] and [SEP], and which of two texts a token is of."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def shaken(model):
    """Nothing at a value that hides a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A folder with a small BERT, without a head."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    shaken(BertModel(BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=64))).save_pretrained(folder)
    make_wordpiece().save_pretrained(folder)
    return folder


TEXTS = [("the film was good", "good"), ("very bad", "bad"), ("the film was long", "long"), ("good and good", "good"),
         ("the film was very very bad", "bad"), ("longer", "long")]  # fmt: skip


@pytest.fixture
def classify(settings, encoder, tmp_path):
    """A configuration that classifies with the encoder, or another model."""

    def made(rows=None, method="classify", **extra):
        rows = rows or [{"text": text, "label": label} for text, label in TEXTS * 4]
        path = write_rows(tmp_path / "rows.jsonl", rows)
        own = {"model": str(encoder), "data": {"train": str(path)}, "trainable": {"kind": "full"}}
        return configure(settings, own, extra, method=method)

    return made


# ---------------------------------------------------------------------------- labels


def test_labels_are_told_from_rows():
    assert labels.Tally.of(["b", "a", "b"]).names == ["a", "b"]
    assert labels.Tally.of([10, 9, 2]).names == ["2", "9", "10"]
    assert labels.Tally.of(["10", "9"]).names == ["9", "10"]
    assert labels.Tally.of(["I-X", "O", "B-X"]).names == ["O", "B-X", "I-X"]
    assert labels.Tally.of([True, False]).names == ["false", "true"]
    found = [labels.Tally.of(rows).problem for rows in (["a"], [1, 2], [1.0, 2.5], [["a"], []], [1, 2.5])]
    assert found == [ONE, ONE, VALUE, SEVERAL, VALUE]
    assert labels.Tally.of(["a", "b"], VALUE).problem == VALUE, "what is said counts"


def test_labels_become_numbers():
    assert labels.numbers("b", ["a", "b"], ONE) == (1.0,)
    assert labels.numbers(1, ["a", "b"], ONE) == (1.0,), "an integer is a place"
    assert labels.numbers(2, ["1", "2"], ONE) == (1.0,), "unless the names are integers"
    assert labels.numbers(True, ["false", "true"], ONE) == (1.0,)
    assert labels.numbers(["c", 0], ["a", "b", "c"], SEVERAL) == (1.0, 0.0, 1.0)
    assert labels.numbers([], ["a", "b"], SEVERAL) == (0.0, 0.0)
    assert labels.numbers([0.0, 1.0], ["a", "b"], SEVERAL) == (0.0, 1.0)
    assert labels.numbers("-2.5", (), VALUE) == (-2.5,)
    assert labels.tags(["O", -100, 0], ["O", "B-X"]) == [0, -100, 0]


@pytest.mark.parametrize(
    ("label", "names", "problem", "told"),
    [
        ("c", ["a", "b"], ONE, "'c' is not among the 2 labels ('a', 'b')"),
        (2, ["a", "b"], ONE, "2 is out of range: there are 2 labels"),
        (-1, ["a", "b"], ONE, "-1 is out of range"),
        (7, ["1", "2"], ONE, "7 is out of range"),
        (None, ["a", "b"], ONE, "no label"),
        ("", ["a", "b"], ONE, "no label"),
        (1.5, ["a", "b"], ONE, "1.5 is no label"),
        (["a"], ["a", "b"], ONE, "multi_label_classification"),
        ("a", ["a", "b"], SEVERAL, "no list"),
        ([1.0], ["a", "b"], SEVERAL, "for each of the 2 labels"),
        ([0.5, 1.0], ["a", "b"], SEVERAL, "for each of the 2 labels"),
        (float("nan"), (), VALUE, "no finite number"),
        (True, (), VALUE, "no finite number"),
        ("many", (), VALUE, "no finite number"),
    ],
)
def test_a_wrong_label_is_named(label, names, problem, told):
    with pytest.raises(labels.WrongLabel) as error:
        labels.numbers(label, names, problem)
    assert told in str(error.value)


def test_balanced_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    given = [0] * 5 + [1] * 2 + [2] * 13
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=np.array(given))
    assert labels.balanced([5, 2, 13], ONE, 20) == pytest.approx(wanted)
    assert labels.balanced([5, 10], SEVERAL, 20) == [3.0, 1.0], "rows without it over rows with it"


def test_entities_of_bio_tags():
    """An I- without a B- of its kind before it begins one, as in the shared task of CoNLL-2003."""
    tags = ["B-PER", "I-PER", "O", "I-LOC", "I-LOC", "B-LOC", "I-PER", "B-PER", "B-PER"]
    wanted = [("PER", 0, 2), ("LOC", 3, 5), ("LOC", 5, 6), ("PER", 6, 7), ("PER", 7, 8), ("PER", 8, 9)]
    assert labels.entities(tags) == wanted
    assert labels.entities([]) == []
    assert labels.entity_kinds(["O", "B-PER", "I-PER", "B-LOC"]) == ["PER", "LOC"]
    assert labels.entity_kinds(["NOUN", "VERB"]) == []
    assert labels.entity_kinds(["0", "1"]) == []


# ---------------------------------------------------------------------------- rows


def renderer(kind="labelled", tokenizer=None, names=("bad", "good"), problem=ONE, **given):
    settings = {"max_length": 64, "long_text": "cut"} | given
    return Renderer(tokenizer or make_wordpiece(), "all", kind=kind, labels=names, problem=problem, **settings)


def documents_of(made: Renderer, form: str, *rows: dict) -> list:
    out = []
    for values in rows:
        try:
            (found,) = made.documents([(0, kinds.render(made, FORMATS[form].convert(values)))])
        except BadRow as fault:
            found = fault
        out.append(found if isinstance(found, BadRow) else found[0])
    return out


def test_texts_are_coded_as_their_tokenizer_does_it():
    tokenizer = make_wordpiece()
    one, pair = documents_of(
        renderer(), "labelled", {"text": "The film", "label": "good"},
        {"text": "good film", "text_pair": "bad film", "label": 0},
    )  # fmt: skip
    assert (one.tokens.tolist(), one.labels, one.types) == (tokenizer("The film")["input_ids"], (1.0,), None)
    coded = tokenizer("good film", "bad film")
    assert (pair.tokens.tolist(), pair.types.tolist()) == (coded["input_ids"], coded["token_type_ids"])
    assert pair.labels == (0.0,)
    batch = Batch.pack([one, pair])
    assert batch.token_fields["types"].tolist() == [0] * 4 + coded["token_type_ids"]
    assert batch.fields["labels"].tolist() == [[1.0], [0.0]]
    assert not len(batch.trained)


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"text": "a", "label": 1}, "labelled"), ({"text": "a", "labels": [1]}, "several_labels"),
        ({"sentence": "a", "label": 1}, "sentence"),
        ({"sentence1": "a", "sentence2": "b", "label": 1}, "sentence_pair"),
        ({"premise": "a", "hypothesis": "b", "label": 1}, "premise"),
        ({"question": "a", "sentence": "b", "label": 1}, "question_sentence"),
        ({"question1": "a", "question2": "b", "label": 1}, "question_pair"),
        ({"messages": [{"role": "user", "content": "a"}], "label": 1}, "labelled_messages"),
    ],
)  # fmt: skip
def test_formats_are_recognised(row, form):
    assert first_recognised(iter([Row(0, row, "rows:1")]), {}, "labelled")[0].name == form


@pytest.mark.parametrize("key", ["ner_tags", "tags", "labels"])
def test_formats_of_tags_are_recognised(key):
    form, _ = first_recognised(iter([Row(0, {"tokens": ["a"], key: [0]}, "rows:1")]), {}, "tagged")
    assert form.keys == ("tokens", key)


def test_conversations_go_through_the_template():
    made = renderer(tokenizer=make_tokenizer())
    (found,) = documents_of(
        made, "labelled_messages", {"messages": [{"role": "user", "content": "hi"}], "label": "bad"}
    )
    assert make_tokenizer().decode(found.tokens) == "<|im_start|>user\nhi<|im_end|>\n"
    (fault,) = documents_of(
        renderer(), "labelled_messages", {"messages": [{"role": "user", "content": "x"}], "label": 0}
    )
    assert (fault.kind, "no chat template" in fault.detail) == ("template", True)


def test_what_texts_are_filled_up_with_is_not_at_their_ends():
    """Where that token ends a text, transformers takes it for filling, and would look for the text's end before it."""
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}")
    made = renderer(tokenizer=tokenizer)
    (found,) = documents_of(made, "labelled_messages", {"messages": [{"role": "user", "content": "hi"}], "label": 0})
    assert tokenizer.decode(found.tokens) == "hi"


@pytest.mark.parametrize(
    ("row", "kind", "told"),
    [
        ({"text": "", "label": 0}, "empty_text", "empty"), ({"text": " \n", "label": 0}, "empty_text", "empty"),
        ({"text": "a", "text_pair": "", "label": 0}, "empty_text", "empty"),
        ({"text": "a", "label": None}, "label", "no label"), ({"text": "a", "label": "ugly"}, "label", "not among"),
        ({"text": "a", "label": 2}, "label", "out of range"), ({"text": 3, "label": 0}, "format", "not text"),
        ({"text": "a [SEP] b", "label": 0}, "special_token", "[SEP]"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(row, kind, told):
    (fault,) = documents_of(renderer(), "labelled", row)
    assert fault.kind == kind
    assert told in fault.detail
    assert kind in dataset.REMEDIES


def test_a_long_text_is_cut_and_counted_or_a_bad_row():
    row = {"text": "good " * 30, "label": 1}
    (cut,) = documents_of(renderer(max_length=10), "labelled", row)
    assert (len(cut.tokens), cut.cut) == (10, 22)
    assert cut.tokens[-1] == 3, "with the special tokens of a whole text"
    (fault,) = documents_of(renderer(max_length=10, long_text="error"), "labelled", row)
    assert (fault.kind, "32 tokens" in fault.detail) == ("truncated", True)


def test_the_first_token_of_a_word_has_its_tag():
    made = renderer("tagged", names=("O", "B-X"))
    row = {"tokens": ["Film", "longer", "in", "Rome"], "tags": ["O", "B-X", 0, -100]}
    (found,) = documents_of(made, "tags", row)
    assert make_wordpiece().convert_ids_to_tokens(found.tokens) == [
        "[CLS]",
        "film",
        "long",
        "##er",
        "in",
        "rome",
        "[SEP]",
    ]
    assert found.token_labels.tolist() == [-100, 0, 1, -100, 0, -100, -100]
    wanted = make_wordpiece()(row["tokens"], is_split_into_words=True)["input_ids"]
    assert found.tokens.tolist() == wanted, "as transformers codes words"
    (found,) = documents_of(
        renderer("tagged", make_tokenizer(), names=("O", "B-X")), "tags", {"tokens": ["ab", "é"], "tags": [0, 1]}
    )
    assert found.token_labels.tolist() == [0, -100, -100, 1, -100], (
        "bytes: a, b, a space, and two of an accented letter"
    )
    (cut,) = documents_of(renderer("tagged", names=("O", "B-X"), max_length=4), "tags", row)
    assert (cut.token_labels.tolist(), cut.cut) == ([-100, 0, 1, -100], 3)


@pytest.mark.parametrize(
    ("row", "kind", "told"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "label", "1 tags, and tokens 2 words"),
        ({"tokens": ["a"], "tags": ["B-Y"]}, "label", "not among"), ({"tokens": [], "tags": []}, "label", "nothing"),
        ({"tokens": ["a", ""], "tags": [0, 0]}, "empty_text", "word 1"),
        ({"tokens": ["a", "\u200b"], "tags": [0, 0]}, "word", "no token of its own"),
        ({"tokens": ["a"], "tags": [-100]}, "label", "nothing"), ({"tokens": "a", "tags": [0]}, "format", "not a list"),
    ],
)  # fmt: skip
def test_a_bad_row_of_tags_is_named(row, kind, told):
    tokenizer = make_wordpiece()
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer()  # drops what no one sees
    (fault,) = documents_of(renderer("tagged", tokenizer, names=("O", "B-X")), "tags", row)
    assert fault.kind == kind or (not row["tokens"] and fault.kind == "empty_text")
    assert told in fault.detail or not row["tokens"]
    assert kind in dataset.REMEDIES


def test_types_and_cuts_come_back_from_the_cache(tmp_path):
    rows = [{"text": "good", "text_pair": "bad", "label": 1}, {"text": "good " * 90, "text_pair": "x", "label": 0}]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    data = Data(train=path, cache=True, cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        made = dataset.load(data, path, renderer(max_length=16))
        first, second = made.documents
        assert first.types.tolist() == [0, 0, 0, 1, 1]
        assert (first.cut, second.cut > 0) == (0, True)
        assert "1 of 2 texts are longer than data.max_length=16" in made.cut_line()
    other = dataset.load(data, path, renderer(max_length=16, names=("good", "bad")))
    assert other.documents[0].labels == first.labels, "integers are places"
    text = dataset.load(data, path, renderer(max_length=16, names=("a", "b")))
    assert text.fingerprint() == made.fingerprint()


def test_a_single_class_is_refused(classify, encoder, tmp_path):
    for rows, told in (
        ([{"text": "good", "label": "x"}] * 9, "'x'"),
        ([{"text": "good", "label": 1.5}] * 9, "1.5"),
    ):
        with pytest.raises(DataError, match="nothing to tell apart") as error:
            Trainer(classify(rows), QUIET)
        assert told in str(error.value)
    with pytest.raises(DataError, match="nothing to tell apart"):
        Trainer(
            classify([{"tokens": ["good"], "tags": ["O"]}] * 9, "classify_tokens", objective={"labels": ["O", "B-X"]}),
            QUIET,
        )


def test_a_row_without_its_label_is_told_with_its_number(classify):
    rows = [{"text": text, "label": label} for text, label in TEXTS * 3] + [{"text": "good"}]
    with pytest.raises(DataError, match="numbers 18") as error:
        Trainer(classify(rows, data={"validation": None}), QUIET)
    assert "no 'label'" in str(error.value)


def test_labels_of_held_out_rows_are_not_looked_at(classify, tmp_path):
    """They are told from what is learnt; one that only held-out rows have is a bad row."""
    held = write_rows(tmp_path / "held.jsonl", [{"text": "film", "label": "new"}])
    config = classify(data={"validation": str(held)})
    assert by_rows(config).objective.labels == ["bad", "good", "long"]
    with pytest.raises(DataError, match="'new' is not among the 3 labels"):
        Trainer(config, QUIET)


def test_many_labels_are_questioned(classify):
    rows = [{"text": "good", "label": f"{i / 10}"} for i in range(40)]
    with pytest.raises(DataError, match="are they values"):
        by_rows(classify(rows))
    assert by_rows(classify(rows, objective={"problem_type": VALUE})).objective.scores == ("value",)


# ---------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("method", "extra", "told"),
    [
        ("classify", {"objective": {"labels": ["a", "a"]}}, "'a' is there twice"),
        ("classify", {"objective": {"labels": ["a"]}}, "single class"),
        ("classify", {"objective": {"labels": ["a", " "]}}, "a name is empty"),
        ("classify", {"objective": {"class_weights": [1.0, 2.0]}}, "in which order"),
        ("classify", {"objective": {"labels": ["a", "b"], "class_weights": [1.0]}}, "has 1 numbers"),
        ("classify", {"objective": {"labels": ["a", "b"], "class_weights": [1.0, 0.0]}}, "greater than 0"),
        ("classify", {"objective": {"label_smoothing_factor": 1.0}}, "less than 1"),
        ("classify", {"objective": {"problem_type": "regression", "labels": ["a", "b"]}}, "leave it out"),
        ("classify", {"objective": {"problem_type": "regression", "class_weights": "balanced"}}, "leave it out"),
        ("classify", {"objective": {"problem_type": "binary"}}, "single_label_classification"),
        ("classify", {"data": {"long_text": "split"}}, "data.long_text=cut"),
        ("lora", {"data": {"long_text": "cut"}}, "leave it out"),
        ("classify", {"evaluation": {"generate": 3}}, "not answers"),
        ("classify", {"data": {"streaming": True}, "max_steps": 3}, "give objective.labels"),
        ("classify_tokens", {"objective": {"labels": ["O"]}}, "single tag"),
        ("classify_tokens", {"objective": {"problem_type": "regression"}}, "unknown key"),
        ("classify", {"data": {"format": "messages"}}, "labelled_messages"),
        ("classify", {"objective": {"num_labels": 3}}, "did you mean 'objective.labels'"),
    ],
)
def test_contradictions_are_named(settings, encoder, method, extra, told):
    model = {} if method == "lora" else {"model": str(encoder)}
    with pytest.raises(ConfigError) as error:
        configure(settings, model, extra, method=method)
    assert told in str(error.value)


def test_what_rows_say_is_in_the_resolved_configuration(classify):
    config = by_rows(classify(objective={"class_weights": "balanced"}))
    assert config.objective.labels == ["bad", "good", "long"]
    assert config.objective.problem_type == ONE
    assert config.objective.class_weights == pytest.approx([1.0, 1.0, 1.0], abs=0.35)
    assert not config.objective.asks_labels, "nothing is read again"
    given = by_rows(classify(objective={"labels": ["long", "good", "bad"]}))
    assert given.objective.labels == ["long", "good", "bad"]


# ---------------------------------------------------------------------------- losses


def test_cross_entropy_by_hand():
    """Scores (ln 3, 0) give p = (3/4, 1/4). Of y = 0 with weight 2: 2 ln(4/3); of y = 1 with weight 1: ln 4. Divided by
    2 + 1. With smoothing 0.2 a row of y = 0 is 0.8 * 2 ln(4/3) + 0.1 (2 ln(4/3) + ln 4)."""
    scores = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()
    weights = torch.tensor([2.0, 1.0])
    total, count = classifying.cross_entropy(scores, torch.tensor([0, 1]), weights, 0.0)
    assert (total.item(), count.item()) == pytest.approx((2 * np.log(4 / 3) + np.log(4), 3))
    total, _ = classifying.cross_entropy(scores[:1], torch.tensor([0]), weights, 0.2)
    assert total.item() == pytest.approx(0.8 * 2 * np.log(4 / 3) + 0.1 * (2 * np.log(4 / 3) + np.log(4)))


def test_binary_cross_entropy_by_hand():
    """s(ln 3) = 3/4: of a label that is there -w ln(3/4), of one that is not -ln(1/4). Smoothing 0.2 takes 1 to 0.9."""
    scores, wanted = torch.tensor([[3.0, 3.0]]).log(), torch.tensor([[1.0, 0.0]])
    total, count = classifying.binary_cross_entropy(scores, wanted, torch.tensor([2.0, 5.0]), 0.0)
    assert (total.item(), count.item()) == pytest.approx((2 * np.log(4 / 3) + np.log(4), 2))
    total, _ = classifying.binary_cross_entropy(scores[:, :1], wanted[:, :1], None, 0.2)
    assert total.item() == pytest.approx(0.9 * np.log(4 / 3) + 0.1 * np.log(4))


def test_squared_error_by_hand():
    total, count = classifying.squared_error(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
    assert (total.item(), count.item()) == (5.0, 2.0)


def oracle(made, rows, problem, kind, weights=None, smoothing=0.0):
    """Loss and gradients of transformers' own model on padded rows, as a plain loop has them."""
    model, longest = made.network.model, max(len(d.tokens) for d in rows)
    pad = model.config.pad_token_id
    ids = torch.tensor([d.tokens.tolist() + [pad] * (longest - len(d.tokens)) for d in rows])
    mask = torch.tensor([[1] * len(d.tokens) + [0] * (longest - len(d.tokens)) for d in rows])
    given = {"input_ids": ids, "attention_mask": mask}
    if any(d.types is not None for d in rows):
        types = [(d.types.tolist() if d.types is not None else [0] * len(d.tokens)) for d in rows]
        given["token_type_ids"] = torch.tensor([t + [0] * (longest - len(t)) for t in types])
    if kind == "tagged":
        wanted = torch.tensor([d.token_labels.tolist() + [-100] * (longest - len(d.tokens)) for d in rows])
    else:
        wanted = torch.tensor([d.labels for d in rows])
    with made.network.natively():
        model.zero_grad()
        if weights is None and not smoothing:  # transformers' own loss
            if problem == ONE and kind != "tagged":
                wanted = wanted[:, 0].long()
            loss = model(**given, labels=wanted[:, 0] if problem == VALUE else wanted).loss
        else:
            logits = model(**given).logits
            w = None if weights is None else torch.tensor(weights)
            if problem == SEVERAL:
                loss = F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=w)
            else:
                flat = wanted.flatten() if kind == "tagged" else wanted[:, 0].long()
                loss = F.cross_entropy(logits.flatten(0, -2), flat, w, label_smoothing=smoothing)
        loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


SEVERAL_ROWS = [
    {"text": t, "label": sorted({label, "x"}) if i % 2 else ["x"] * (i > 3)} for i, (t, label) in enumerate(TEXTS)
]
TAG_ROWS = [{"tokens": t.split(), "tags": ["B-X" if len(w) > 3 else "O" for w in t.split()]} for t, _ in TEXTS]
ROWS = [{"text": t, "label": label} for t, label in TEXTS]
WEIGHTED = {"class_weights": "balanced", "label_smoothing_factor": 0.1}
CASES = {
    "one": (ROWS, {}),
    "pairs": ([row | {"text_pair": "the film"} for row in ROWS], {}),
    "weighted": (ROWS, WEIGHTED),
    "several": (SEVERAL_ROWS, {}),
    "several weighted": (SEVERAL_ROWS, {"class_weights": "balanced"}),
    "value": ([{"text": t, "label": len(t) / 7} for t, _ in TEXTS], {}),
    "tags": (TAG_ROWS, {}),
    "tags weighted": (TAG_ROWS, WEIGHTED),
}


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_a_plain_loop(classify, tiny_model, case, family, monkeypatch):
    """Packed here, padded there; of micro-batches of any size."""
    rows, objective = CASES[case]
    method = "classify_tokens" if "tags" in case else "classify"
    model = {"model": str(tiny_model)} if family == "llama" else {}
    data = {"validation": None}
    trainer = Trainer(classify(rows, method, objective=objective, data=data, **model), QUIET)
    made, settings = trainer.made, trainer.config.objective
    assert made.network.packed
    rows = list(trainer.training.documents)
    made.network.eval()
    loss, gradients = oracle(
        made, rows, settings.problem, settings.rows, settings.class_weights, settings.label_smoothing_factor
    )
    for limit in (10_000, 1):
        parts = [made.objective(made.network, part) for part in Batch.pack(rows).split(limit)]
        count = sum(part.count for part in parts)
        (sum(part.total for part in parts) / count).backward()
        assert sum(part.total.item() for part in parts) / float(count) == pytest.approx(loss, rel=1e-5)
        for name, p in made.network.model.named_parameters():
            if p.grad is None:
                assert name not in gradients or not gradients[name].any(), name
                continue
            torch.testing.assert_close(
                p.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )
            p.grad = None


def test_what_fills_a_row_up_is_not_learnt(classify):
    for case in ("one", "tags"):
        rows, _ = CASES[case]
        trainer = Trainer(
            classify(rows, "classify_tokens" if case == "tags" else "classify", data={"validation": None}), QUIET
        )
        trainer.made.network.eval()
        batch = Batch.pack(list(trainer.training.documents))
        losses = [trainer.made.objective(trainer.made.network, b) for b in (batch, batch.padded_to(len(batch) + 9))]
        torch.testing.assert_close(losses[0].total, losses[1].total)
        assert losses[0].count == losses[1].count


# ---------------------------------------------------------------------------- figures


def columns_of(kind: str, scores, has, names) -> dict[str, np.ndarray]:
    made = {f"classes.{kind}.score.{n}": scores[:, i] for i, n in enumerate(names)}
    return made | {f"classes.{kind}.label.{n}": has[:, i].astype(float) for i, n in enumerate(names)}


def check_averages(found, true, said, names, average_over=None):
    from sklearn.metrics import precision_recall_fscore_support

    for average in ("macro", "micro"):
        wanted = precision_recall_fscore_support(true, said, average=average, zero_division=0, labels=average_over)
        got = [found[f"{key}_{average}"].value for key in ("precision", "recall", "f1")]
        assert got == pytest.approx(wanted[:3])
    each = precision_recall_fscore_support(true, said, average=None, labels=range(len(names)), zero_division=0)
    for i, name in enumerate(names):
        got = [found[f"{key}.{name}"].value for key in ("precision", "recall", "f1")]
        assert got == pytest.approx([of_label[i] for of_label in each[:3]])


@pytest.mark.parametrize("size", [2, 4])
def test_figures_of_one_label_are_scikit_learns(size):
    from sklearn import metrics

    rng = np.random.default_rng(size)
    true, names = rng.integers(0, size, 60), [f"n{i}" for i in range(size)]
    scores = np.round(rng.dirichlet(np.ones(size), 60) + 0.3 * np.eye(size)[true], 1)  # with ties
    scores = scores / scores.sum(1, keepdims=True)
    columns = columns_of("one", scores, np.eye(size)[true], names)
    found, said = classes.figures(columns), scores.argmax(1)
    assert found["accuracy"].value == pytest.approx(metrics.accuracy_score(true, said))
    assert found["mcc"].value == pytest.approx(metrics.matthews_corrcoef(true, said))
    probabilities = scores[:, 1] if size == 2 else scores
    assert found["auroc"].value == pytest.approx(metrics.roc_auc_score(true, probabilities, multi_class="ovr"))
    check_averages(found, true, said, names)
    labels_, counts = classes.confusion(columns)
    assert labels_ == names
    assert counts.tolist() == metrics.confusion_matrix(true, said).tolist()
    for figure in found.values():
        low, high = figure.interval()
        assert low <= figure.value <= high


def test_figures_of_labels_that_are_not_there_are_scikit_learns():
    """A label that no row has, and one that is never said."""
    from sklearn import metrics

    true, said = np.array([0, 0, 1, 1, 3, 3]), np.array([0, 1, 1, 1, 0, 0])
    columns = columns_of("one", np.eye(5)[said], np.eye(5)[true], list("abcde"))
    found = classes.figures(columns)
    check_averages(found, true, said, list("abcde"))
    assert found["mcc"].value == pytest.approx(metrics.matthews_corrcoef(true, said))
    only = classes.figures(columns_of("one", np.eye(2)[[0, 0]], np.eye(2)[[0, 0]], ["a", "b"]))
    assert only["mcc"].value == 0, "as scikit-learn has it"
    assert "auroc" not in only, "there is no pair of two labels"


def test_figures_of_several_labels_are_scikit_learns():
    from sklearn import metrics

    rng = np.random.default_rng(1)
    true = rng.random((50, 3)) < 0.4
    scores = np.clip(rng.random((50, 3)) * 0.7 + 0.3 * true, 0, 1)
    found = classes.figures(columns_of("several", scores, true, ["x", "y", "z"]))
    said = scores > 0.5
    assert found["accuracy"].value == pytest.approx(metrics.accuracy_score(true, said))
    assert found["auroc"].value == pytest.approx(metrics.roc_auc_score(true, scores, average="macro"))
    check_averages(found, true.astype(int), said.astype(int), ["x", "y", "z"])


def test_figures_of_values_are_scipys():
    from scipy import stats
    from sklearn import metrics

    rng = np.random.default_rng(0)
    true = np.round(rng.normal(size=40), 1) + 1e3
    said = true * 0.5 + np.round(rng.normal(size=40), 1)
    found = classes.figures({"classes.value.score.value": said, "classes.value.label.value": true})
    assert found["mse"].value == pytest.approx(metrics.mean_squared_error(true, said))
    assert found["mae"].value == pytest.approx(metrics.mean_absolute_error(true, said))
    assert found["pearson"].value == pytest.approx(stats.pearsonr(true, said).statistic)
    assert found["spearman"].value == pytest.approx(stats.spearmanr(true, said).statistic)
    assert not found["mse"].higher_is_better
    assert found["pearson"].higher_is_better


def test_the_interval_of_an_area_is_delongs():
    """The spread of the values whose mean it is is the variance of DeLong, DeLong and Clarke-Pearson, from its
    definition by loops over pairs."""
    rng = np.random.default_rng(3)
    positive = rng.random(80) < 0.3
    scores = np.round(rng.normal(size=80) + positive, 1)
    up, down = scores[positive], scores[~positive]
    kernel = (up[:, None] > down) + 0.5 * (up[:, None] == down)
    variance = kernel.mean(1).var(ddof=1) / len(up) + kernel.mean(0).var(ddof=1) / len(down)
    values = classes.pseudo_values(scores, positive)
    assert values.mean() == pytest.approx(kernel.mean())
    assert values.var() / 80 == pytest.approx(variance, rel=0.06), "up to n - 1 against n"


def test_figures_of_tags():
    """By hand: words O B I O against O B O B: of 4 tags 2 are right. Entities: one is there, (X, 1, 3), and two are
    said, (X, 1, 2) and (X, 3, 4); none is right. In a second row the only entity is."""
    names = ["O", "B-X", "I-X"]

    class Fixed:
        def scores(self, batch):
            return F.one_hot(torch.tensor([0, 1, 0, 1, 1, 2]), 3).float()

    from luthier.objectives import TokenClassification

    tags = [np.array([0, 1, 2, 0], np.int32), np.array([1, 2], np.int32)]
    rows = [
        Document(np.arange(len(t), dtype=np.int32), np.zeros(len(t), np.float32), i, token_labels=t)
        for i, t in enumerate(tags)
    ]
    objective = TokenClassification(labels=names).build()  # type: ignore[call-arg]
    loss = objective.evaluate(Fixed(), Batch.pack(rows))
    assert loss.count.tolist() == [4, 2]
    found = {
        key: figure.value for key, figure in classes.figures({k: v.numpy() for k, v in loss.metrics.items()}).items()
    }
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert (found["entity_precision"], found["entity_recall"]) == pytest.approx((1 / 3, 1 / 2))
    assert found["entity_f1"] == pytest.approx(2 / 5)
    assert found["entity_f1.X"] == pytest.approx(2 / 5)
    check_averages(
        {k: type("F", (), {"value": v}) for k, v in found.items()}, [0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 1, 2], names
    )


# ---------------------------------------------------------------------------- networks that end in scores


def _bert(transformers):
    return transformers.BertForMaskedLM(
        transformers.BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=64)
    )


def _roberta(transformers):
    config = transformers.RobertaConfig(**SMALL, intermediate_size=48, max_position_embeddings=64, type_vocab_size=1)
    return transformers.RobertaForMaskedLM(config)


def _deberta(transformers):
    return transformers.DebertaV2ForMaskedLM(
        transformers.DebertaV2Config(
            **SMALL, intermediate_size=48, max_position_embeddings=64, relative_attention=True,
            pos_att_type=["p2c", "c2p"], type_vocab_size=0,
        )
    )  # fmt: skip


def _modernbert(transformers, pooling="cls"):
    return transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(
            **SMALL, intermediate_size=48, pad_token_id=0, global_attn_every_n_layers=2, local_attention=6,
            classifier_pooling=pooling,
        )
    )  # fmt: skip


def _albert(transformers):
    config = transformers.AlbertConfig(**SMALL, intermediate_size=48, max_position_embeddings=64, embedding_size=16)
    return transformers.AlbertForMaskedLM(config)


def _llama(transformers):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


FAMILIES = {
    "bert": (_bert, "first", True), "roberta": (_roberta, "first", True), "deberta": (_deberta, "first", False),
    "modernbert": (_modernbert, "first", True), "modernbert by means": (lambda t: _modernbert(t, "mean"), "all", True),
    "albert": (_albert, "whole", False), "llama": (_llama, "last", True),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ends_in", ["text", "each"])
def test_scores_are_those_of_the_models_own_forward_pass(family, ends_in, tmp_path):
    """Of texts of many lengths, in a packed row, or padded where a family cannot be packed."""
    import transformers

    make, takes, packed = FAMILIES[family]
    shaken(make(transformers)).save_pretrained(tmp_path)
    said: list[str] = []
    ending = heads.Ending(ends_in, ("a", "b", "c"), ONE)
    model = load.load_model(
        Model(name=str(tmp_path), init="loaded"), torch.float32, torch.device("cpu"), None, ending=ending, seed=3,
        tell_head=said.append,
    )  # fmt: skip
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    net = network.Network(model, ends_in)
    trials.find_scores(net)
    trials.prepare(net, "auto")
    net.eval()
    assert net.packed == (packed or (family == "albert" and ends_in == "each"))
    assert net.causal == (family == "llama")
    if ends_in == "text":
        assert net.takes == takes
    assert "drawn by seed=3" in said[0]
    lengths = (7, 20, 3, 9, 18)
    rng = np.random.default_rng(1)
    rows = [
        Document(rng.integers(5, 300, n).astype(np.int32), np.zeros(n, np.float32), i) for i, n in enumerate(lengths)
    ]
    with torch.no_grad():
        found = net.scores(Batch.pack(rows))
        with net.natively():
            wanted = [model(input_ids=torch.tensor(d.tokens[None].astype(np.int64))).logits for d in rows]
    torch.testing.assert_close(
        found, torch.cat([w[0] if ends_in == "each" else w for w in wanted]), rtol=1e-4, atol=1e-5
    )
    config = model.config
    assert (config.num_labels, config.id2label[2], config.label2id["b"], config.problem_type) == (3, "c", 1, ONE)


def test_a_head_that_fits_is_kept_and_another_is_drawn_by_the_seed(encoder, tmp_path):
    from transformers import BertForSequenceClassification

    first = BertForSequenceClassification.from_pretrained(encoder, num_labels=3)
    first.save_pretrained(tmp_path)

    def loaded(names, seed, folder=tmp_path):
        said: list[str] = []
        made = load.load_model(
            Model(name=str(folder), init="loaded"), torch.float32, torch.device("cpu"), None,
            ending=heads.Ending("text", names, ONE), seed=seed, tell_head=said.append,
        )  # fmt: skip
        return made.classifier.weight, said

    weight, said = loaded(("a", "b", "c"), 1)
    assert torch.equal(weight, first.classifier.weight)
    assert not said
    torch.manual_seed(5)
    weight, said = loaded(("a", "b"), 1)
    assert "2 scores" in said[0]
    torch.manual_seed(6)
    assert torch.equal(weight, loaded(("a", "b"), 1)[0])
    assert not torch.equal(weight, loaded(("a", "b"), 2)[0])
    assert 0.01 < weight.std() < 0.03, "BERT's own first values"


def test_what_the_base_lacks_is_an_error(encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in encoder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 tensors"):
        load.load_model(
            Model(name=str(tmp_path), init="loaded"), torch.float32, torch.device("cpu"),
            ending=heads.Ending("text", ("a", "b"), ONE),
        )  # fmt: skip


def test_positions_of_an_encoder_are_limited(classify):
    with pytest.raises(ModelError, match=r"data\.max_length=64"):
        assemble(by_rows(classify(data={"max_length": 65}, batch={"micro_tokens": 128})))


# ---------------------------------------------------------------------------- runs


def test_an_encoder_learns_and_says_how_well(classify):
    config = classify(
        max_steps=40, optim={"learning_rate": 5e-3}, evaluation={"every": 20, "metric_for_best_model": "f1_macro"}
    )
    result = train(config, QUIET)
    figures = result.report["figures"]
    assert figures["accuracy"]["tuned"] > max(0.8, figures["accuracy"]["base"])
    assert figures["f1_macro"]["change_interval"] is not None
    matrix = result.report["confusion_matrix"]
    assert matrix["labels"] == ["bad", "good", "long"]
    assert sum(map(sum, matrix["counts"])) == 6
    told = configure(result.folder / "config.yaml")
    assert told.objective.labels == ["bad", "good", "long"]
    found = result.classifier()("the film was good", "very bad")
    assert [one["label"] for one in found] == ["good", "bad"]
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1)


def test_an_encoder_stopped_and_resumed_ends_with_the_same_bytes(classify, tmp_path):
    extra = {"checkpoint": {"every": 2}, "objective": {"class_weights": "balanced", "label_smoothing_factor": 0.1}}
    train(classify(**extra), QUIET)
    parted = classify(**extra, output_dir=str(tmp_path / "parted"))
    in_two_parts(parted, 3)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")


def test_labels_are_known_without_the_data(classify, tmp_path):
    """A run is restored from its folder; its rows may be gone."""
    result = train(classify(max_steps=2), QUIET)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x", "label": "another"}) + "\n")
    assert set(result.classifier()("good")[0]["probabilities"]) == {"bad", "good", "long"}


def test_what_rows_decide_is_the_same_for_training_resuming_and_explaining(classify, tmp_path):
    config = classify(max_steps=2, objective={"class_weights": "balanced"}, trainable={"kind": "lora"})
    made = by_rows(config)
    assert made != config
    assert by_rows(made) is made
    assert resolution.settled(made, iter(["another"])) == made, "decided once"
    train(config, QUIET)
    assert read_run(tmp_path / "run") == made
    assert explain(config).config == made
    assert explain(config, count=False).config.objective.labels == ["0", "1"]
    Trainer(config, QUIET)  # with the settings as they were typed: its rows decide the same
    write_rows(tmp_path / "rows.jsonl", [{"text": text, "label": "a" + label} for text, label in TEXTS * 4])
    with pytest.raises(ConfigError, match=r"other settings.*abad"):
        Trainer(config, QUIET)


def test_a_cut_text_is_warned_of(classify, capsys):
    from luthier.monitor import Console

    rows = [{"text": text + " good" * 40 * (i == 3), "label": label} for i, (text, label) in enumerate(TEXTS * 2)]
    Trainer(classify(rows, data={"validation": None, "max_length": 16}), Console())
    assert "1 of 12 texts are longer than data.max_length=16 and were cut" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["several", "value"])
def test_several_labels_and_values_are_learnt(classify, kind):
    rows, _ = CASES[kind]
    rate = {"learning_rate": 5e-3}
    result = train(classify(rows * 8, max_steps=300, epochs=40, optim=rate, data={"validation": 8}), QUIET)
    figures = result.report["figures"]
    assert figures["loss"]["tuned"] < figures["loss"]["base"] / 2
    (found,) = result.classifier()("very bad")
    if kind == "value":
        assert abs(found["value"] - 8 / 7) < 0.5
        assert figures["pearson"]["tuned"] > 0.7
    else:
        assert found["labels"] == ["bad", "x"]
        assert figures["f1_micro"]["tuned"] > 0.8


def test_tags_are_learnt_and_said(classify):
    rows = [
        {"tokens": f"{a} went to {b}".split(), "tags": ["B-PER", "O", "O", "B-LOC"]}
        for a in ("Ann", "Bob")
        for b in ("Rome", "film")
    ] * 4
    config = classify(
        rows,
        "classify_tokens",
        max_steps=40,
        optim={"learning_rate": 5e-3},
        evaluation={"every": 20, "metric_for_best_model": "entity_f1"},
    )
    result = train(config, QUIET)
    assert result.report["figures"]["entity_f1"]["tuned"] == 1.0
    (found,) = result.classifier()("Bob went to Rome")
    assert [(word, tag) for word, tag, _ in found["tags"]] == [
        ("Bob", "B-PER"),
        ("went", "O"),
        ("to", "O"),
        ("Rome", "B-LOC"),
    ]
    assert [(e["kind"], e["text"]) for e in found["entities"]] == [("PER", "Bob"), ("LOC", "Rome")]


def test_heads_move_with_everything(classify, tiny_model):
    """Whatever else moves, and they are in no adapter's targets."""
    for kind, model in (("lora", None), ("partial", None), ("prompt", tiny_model), ("bottleneck", tiny_model)):
        extra = {"trainable": {"kind": kind} | ({"biases": True} if kind == "partial" else {})}
        config = by_rows(classify(**extra, **({"model": str(model)} if model else {})))
        made = assemble(config)
        places = surgery.heads(made.network.model)
        moving = {surgery.base_name(name) for name in made.parameters()}
        assert places == (["score"] if model else ["bert.pooler", "classifier"])
        for place in places:
            assert any(name.startswith(place) for name in moving), (kind, place)
        beside = [n for n, a in surgery.adapters(made.network.model) if n in places]
        assert kind == "partial" or beside == places
    config = by_rows(classify(trainable={"kind": "lora", "target_modules": ["dense"]}))
    targets = [n for n, a in surgery.adapters(assemble(config).network.model) if "pooler" in n]
    assert targets == ["bert.pooler"], "a copy of it moves in full, and none of it has an update of low rank"


def test_a_stream_tells_what_it_cuts_and_learns(classify, capsys):
    from luthier.monitor import Console

    rows = [{"text": text + " good" * 40 * (i == 3), "label": label} for i, (text, label) in enumerate(TEXTS * 4)]
    objective = {"labels": ["bad", "good", "long"], "problem_type": ONE}
    data = {"streaming": True, "validation": None, "max_length": 16}
    train(classify(rows, data=data, objective=objective, max_steps=4), Console())
    told = capsys.readouterr().err
    assert "of 24 texts are longer than data.max_length=16 and were cut" in told


def test_a_classifier_from_a_random_start(classify):
    """Its tokenizer is learnt from the texts of training rows."""
    model = {"name": "", "size": "tiny", "vocab_size": 300}
    config = classify(model=model, max_steps=2)
    made = by_rows(config)
    assert made.model.tokenizer == "train"
    result = train(config, QUIET)
    assert set(result.classifier()("good")[0]["probabilities"]) == {"bad", "good", "long"}


def test_figures_of_a_label_are_better_the_greater(settings):
    for name, better in (
        ("f1.loss", 1),
        ("recall.mse", 1),
        ("mse", -1),
        ("entity_f1", 1),
        ("accuracy", 1),
        ("loss", -1),
    ):
        evaluation = {"metric_for_best_model": name}
        assert configure(settings, {"evaluation": evaluation}, method="lora").evaluation.better == better
