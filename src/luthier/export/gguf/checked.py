"""A GGUF file in llama.cpp against the model it was made from: log-probabilities, greedy text, tokens, stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unicodedata import category

from ...errors import ExportError
from ...generate import complete
from ...opened import Opened
from .. import compare, plain
from . import families, numbers
from .vocabulary import Vocabulary, vocabulary

GREEDY, PROMPT = 16, 12
MARKS = ("tekken", "gpt-4o")  # whose words end at combining marks in llama.cpp, though not in the tokenizers
NEAR = 5e-3  # of two tokens whose log-probabilities are as good as equal
TEXTS = (
    "Hello, world! It's 12:34, isn't it? We've paid $1,234.56 (about 7%).",
    "  two  spaces,\ttabs\tand\n\n\nlines \n with spaces   \n",
    "def f(x):\n    return {'a': [x**2, \"b\"], 0x1F: None}  # done\n",
    "Zażółć gęślą jaźń, Größe, naïve café, ÆØÅ, İstanbul",
    "漢字とかな、中文字符。한국어 텍스트",
    "Привет, как дела? Γειά σου, שלום, مرحبا بالعالم, नमस्ते",
    "👍🏽 🎉👩‍👩‍👧‍👦 🇩🇪 ☕️ →∑√",
    "CamelCaseIdentifier snake_case_name kebab-case https://example.org/a?b=c&d=%20#e",
)


def bound_of(dtype: str, source: Any) -> compare.Bound:
    """How far a file may be from its source, whose numbers are of the type `source`."""
    import torch

    kind = numbers.TABLE[dtype].kind
    grows = numbers.TABLE[dtype].bound
    grows = grows if source == torch.float32 else max(0.02, grows)  # it computes in 16 bits, llama.cpp in 32
    if kind not in numbers.PLAIN:
        return compare.Bound(perplexity=grows)
    return compare.Bound(*max(compare.TOLERANCE[source], compare.TOLERANCE[numbers.PLAIN[kind]]), grows)


def documents_of(found: Opened) -> list[list[int]]:
    """No longer than what llama.cpp computes as transformers does."""
    config = found.model.config
    longest = families.context(families.family(config), config)
    return [d[:longest] for d in compare.probe(found)]


def whole(
    found: Opened, path: Path, dtype: str, adapter: Path | None = None, bound: float | None = None
) -> dict[str, Any]:  # fmt: skip
    """The figures; ExportError where llama.cpp answers otherwise."""
    documents = documents_of(found)
    with plain.as_written(found.made, "gguf"):
        ours = compare.logprobs(found, documents)
        prompts = [d[: min(PROMPT, len(d) - 1)] for d in documents[:2]]
        greedy = [c.tokens for c in complete(found.network, prompts, set(), GREEDY)]
    tokens = vocabulary(found.tokenizer, found.model.get_input_embeddings().weight.shape[0])
    rows = [found.tokenizer.decode(d, skip_special_tokens=True) for d in documents[:4]]
    texts = texts_of(found.tokenizer, tokens, rows)
    allowed = bound_of(dtype, found.network.dtype)
    allowed = allowed if bound is None else replace(allowed, perplexity=bound)
    compared = compare.proof(
        ours, path, "llama_cpp", documents, allowed, prompts=prompts,
        texts=[text.theirs for text in texts], whole=[text.whole for text in texts],
        greedy=GREEDY, adapter=str(adapter) if adapter else None, stops=sorted(found.renderer.stop_tokens()),
    )  # fmt: skip
    theirs = compared.pop("found")
    remarks = [*tokens.remarks, *_same_tokens(found.tokenizer, texts, theirs, tokens.pre in MARKS)]
    _same_ends(found, theirs)
    exact = numbers.TABLE[dtype].kind == "F32"
    same = [row.tolist() for row in theirs["greedy"]] == greedy
    if exact and not same:
        _near(found, prompts, greedy, theirs["greedy"].tolist())
    return {**compared, "greedy_equal": same, "same_tokens": f"{len(texts)} texts", "remarks": remarks}


@dataclass(frozen=True)
class Text:
    """A text whose tokens are compared."""

    ours: str
    theirs: str
    """As llama.cpp is given it: where it has no way to put a space before a text, with that space."""
    whole: bool
    """With what a text is given at its start and end; conversations have it in them."""


def texts_of(tokenizer: Any, vocabulary: Vocabulary, more: Sequence[str]) -> list[Text]:
    """Languages, emoji, code and white space; the rows that are compared; conversations of these."""
    lost = vocabulary.prefix == "first" and not vocabulary.flags["add_space_prefix"]
    plain_texts = [text.lstrip() if vocabulary.prefix != "none" else text for text in (*TEXTS, *more)]
    found = [Text(text, " " + text if lost else text, True) for text in plain_texts if text]
    if not tokenizer.chat_template:
        return found
    for i in range(0, len(TEXTS) - 2, 3):
        said = zip(("user", "assistant", "user"), TEXTS[i : i + 3])
        messages = [{"role": role, "content": text} for role, text in said]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # whatever a template says to a conversation that it does not take
            continue
        found.append(Text(text, text, False))
    return found


def _same_tokens(tokenizer: Any, texts: list[Text], theirs: dict, marks: bool) -> list[str]:
    """What is to be known where they are not; ExportError where that is no known difference."""
    at, remarks = 0, []
    for told, count in zip(texts, theirs["counts"].tolist()):
        text, ids = told.ours, theirs["ids"][at : at + count].tolist()
        at += count
        wanted = tokenizer(text, add_special_tokens=told.whole).input_ids
        if ids == wanted:
            continue
        if marks and any(category(letter).startswith("M") for letter in text):
            remarks = ["llama.cpp cuts words with combining marks (as Hindi has) otherwise than this tokenizer"]
            continue
        i = next((i for i, (a, b) in enumerate(zip(ids, wanted)) if a != b), min(len(ids), len(wanted)))
        here, there = (tokenizer.convert_ids_to_tokens(row[i : i + 6]) for row in (wanted, ids))
        raise ExportError(
            f"as=gguf: llama.cpp reads a text as other tokens than its tokenizer does: {text[:60]!r} from its token "
            f"{i} on {there}, not {here}; nothing is left"
        )
    return remarks


def _same_ends(found: Opened, theirs: dict) -> None:
    stops = sorted(found.renderer.stop_tokens())
    for token, ends in zip(stops, theirs["ends"].tolist()):
        if not ends:
            raise ExportError(
                f"as=gguf: llama.cpp would not stop at {found.tokenizer.convert_ids_to_tokens(token)!r}, at which the "
                "model's answers end; nothing is left"
            )


def _near(found: Opened, prompts: list, ours: list, theirs: list) -> None:
    """Where greedy texts part, both tokens must have been as likely, to rounding."""
    for prompt, a, b in zip(prompts, ours, theirs):
        i = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if i is None:
            continue
        last = [compare.logprobs(found, [[*prompt, *row[: i + 1]]])[-1].item() for row in (a, b)]
        if abs(last[0] - last[1]) > NEAR:
            raise ExportError(
                f"as=gguf: the likeliest text is another from its token {i} on: log-probabilities {last[0]:.4f} and "
                f"{last[1]:.4f}; nothing is left"
            )
