"""A tokenizer of transformers as llama.cpp keeps it: byte-level BPE, SentencePiece's BPE, or Unigram.

Kinds of tokens and keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ExportError
from ...models.gguf import LLAMA3_SPLIT

NEVER = "ÿ ÿ"  # a merge that no text has, as its bytes 255 are none of UTF-8: llama.cpp wants a list that is not empty
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPITAL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # how texts are cut before merges -> llama.cpp's name of it
    LLAMA3_SPLIT: "llama-bpe",
    LLAMA3_SPLIT.replace("{1,3}", ""): "qwen2",
    rf"{_CASED}|{_CAPITAL}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}": "tekken",
    rf"{_CASED}{_SHORT}?|{_CAPITAL}{_SHORT}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}": "gpt-4o",
}


@dataclass
class Vocabulary:
    """What a file says of its tokens, one for each row of the embeddings."""

    model: str
    """llama.cpp's name of the algorithm: gpt2 (byte-level BPE), llama (SentencePiece), t5 (Unigram)."""
    tokens: list[str]
    kinds: list[int]
    pre: str = "default"
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    flags: dict[str, bool] = field(default_factory=dict)
    charsmap: bytes = b""
    prefix: str = "none"
    """Where texts are given a space: `each` part between special tokens, the `first`, or none."""

    @property
    def remarks(self) -> list[str]:
        if self.prefix != "first":
            return []
        if self.flags["add_space_prefix"]:
            return ["llama.cpp puts a space after each special token, and transformers only before a text"]
        return ["llama.cpp puts no space before a text that does not begin with a special token; conversations do"]


def vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Of embeddings with so many rows; ExportError for what llama.cpp has no algorithm for."""
    if not getattr(tokenizer, "is_fast", False):
        raise _refused(f"{type(tokenizer).__name__} is none of `tokenizers` (tokenizer.json)")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise _refused(
            f"it has tokens up to number {highest}, and the model {rows} rows of embeddings, so that some have none"
        )
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
    if kind == "BPE" and "ByteLevel" in json.dumps(state["decoder"]):
        made = Vocabulary("gpt2", *_tokens(tokenizer, rows, state), pre=_split(state))
        made.merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]] or [NEVER]
    elif kind == "BPE" and model.get("byte_fallback"):
        made = Vocabulary("llama", *_tokens(tokenizer, rows, state))
        made.scores = _scores_of_merges(made.tokens, model["merges"])
    elif kind == "Unigram":
        made = Vocabulary("t5", *_tokens(tokenizer, rows, state))
        given = dict(enumerate(score for _, score in model["vocab"]))
        made.scores = [given.get(i, 0.0) for i in range(rows)]
        made.charsmap = _charsmap(state)
        made.flags["remove_extra_whitespaces"] = bool(made.charsmap)
    else:
        raise _refused(f"its model is {kind}" + (" without bytes for unknown characters" if kind == "BPE" else ""))
    made.prefix = _prefix(state)
    spaced = made.prefix == "each" or (made.prefix == "first" and not tokenizer.chat_template)
    made.flags |= {"add_space_prefix": spaced} | _ends(tokenizer)
    return made


def _refused(why: str) -> ExportError:
    return ExportError(f"as=gguf: llama.cpp cannot hold this tokenizer: {why}; use as=full")


def _tokens(tokenizer: Any, rows: int, state: Mapping) -> tuple[list[str], list[int]]:
    """Of each row of the embeddings its text and kind; rows that have no token are told as unused."""
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for text, i in tokenizer.get_vocab().items():
        tokens[i], kinds[i] = text, NORMAL
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kinds[i] = BYTE
    for i, added in tokenizer.added_tokens_decoder.items():
        tokens[i], kinds[i] = added.content, CONTROL if added.special else USER_DEFINED
    if tokenizer.unk_token_id is not None and "ByteLevel" not in json.dumps(state["decoder"]):
        kinds[tokenizer.unk_token_id] = UNKNOWN
    return tokens, kinds


def _steps(part: Mapping | None, inner: str) -> list[Mapping]:
    if part is None:
        return []
    return [step for one in part[inner] for step in _steps(one, inner)] if part["type"] == "Sequence" else [part]


def _split(state: Mapping) -> str:
    """llama.cpp's name of how a byte-level tokenizer cuts texts."""
    steps = _steps(state["pre_tokenizer"], "pretokenizers")
    for step in steps:
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            raise _refused("it puts a space before each text")
    kinds = [step["type"] + ("" if step.get("use_regex", True) else "-") for step in steps]
    if kinds == ["ByteLevel-"] and not state["model"]["merges"]:
        return "gpt-2"  # bytes alone: wherever a text is cut
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel-"] and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
        found = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if found is not None:
            return found
    told = [step.get("pattern", {}).get("Regex", step["type"]) for step in steps]
    raise _refused(f"it cuts texts in a way that llama.cpp does not know ({', '.join(told) or 'not at all'})")


def _scores_of_merges(tokens: list[str], merges: list) -> list[float]:
    """SentencePiece merges what has the highest score first; of a list of merges that is the earliest."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        first.setdefault(left + right, rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _charsmap(state: Mapping) -> bytes:
    for step in _steps(state["normalizer"], "normalizers"):
        if step["type"] == "Precompiled":
            return base64.b64decode(step["precompiled_charsmap"])
    return b""


def _prefix(state: Mapping) -> str:
    """Where texts are given a space: llama.cpp knows `each` and `none` alone."""
    for step in _steps(state["normalizer"], "normalizers"):
        if step["type"] == "Prepend":
            return "each"
    for step in _steps(state["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            return {"never": "none", "first": "first"}.get(step.get("prepend_scheme", ""), "each")
    return "none"


def _ends(tokenizer: Any) -> dict[str, bool]:
    """Whether a text is given a token at its start, and at its end."""
    ids, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    at = next((k for k in range(len(ids)) if ids[k : k + len(plain)] == plain), 0)
    before, after = ids[:at], ids[at + len(plain) :]
    known = [[], [tokenizer.bos_token_id]], [[], [tokenizer.eos_token_id]]
    if before not in known[0] or after not in known[1]:
        raise _refused(f"it puts the tokens {before} before a text and {after} behind it")
    return {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def describe(writer: Any, made: Vocabulary, tokenizer: Any, stops: set[int]) -> None:
    """The tokenizer's part of a file, and its chat template."""
    writer.add_tokenizer_model(made.model)
    writer.add_tokenizer_pre(made.pre)
    writer.add_token_list(made.tokens)
    writer.add_token_types(made.kinds)
    if made.merges:
        writer.add_token_merges(made.merges)
    if made.scores:
        writer.add_token_scores(made.scores)
    if made.charsmap:
        writer.add_precompiled_charsmap(made.charsmap)
    for name, value in made.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id,
             "pad": tokenizer.pad_token_id}  # fmt: skip
    for name, i in named.items():
        if i is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    for i in sorted(stops - {tokenizer.eos_token_id})[:1]:
        writer.add_eot_token_id(i)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)
