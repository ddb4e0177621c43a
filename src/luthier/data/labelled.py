"""Labelled rows: texts, pairs of texts or conversations with what is said of the whole, and words with their tags.

A text is coded as the tokenizer does it by itself, with its special tokens; of a pair it says which text a token is of.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import labels
from .conversations import BadRow, Conversation, Tokens, list_of, said, shown, text_of
from .conversations import messages as whole

if TYPE_CHECKING:
    from .masks import Rendered, Renderer

CUT = "cut"


# ---------------------------------------------------------------------------- formats


def texts(*keys: str, label: str = "label", second: str | None = None) -> Callable[[Mapping], Conversation]:
    """A format whose row has texts under `keys`, and perhaps a second one, and its label."""

    def convert(values: Mapping) -> Conversation:
        wanted = [*keys, second] if second is not None and values.get(second) is not None else list(keys)
        turns = [said("user", text_of(values[key], key))[0] for key in wanted]
        return Conversation(turns, plain=True, label=values[label])

    return convert


def conversation(values: Mapping) -> Conversation:
    """`messages`, read as the chat template writes them, and a `label`."""
    made = whole(values)
    return Conversation(made.messages, made.tools, label=values["label"])


def tagged(key: str) -> Callable[[Mapping], Conversation]:
    """A format whose row has `tokens`, which are words, and a tag for each under `key`."""

    def convert(values: Mapping) -> Conversation:
        words = [text_of(word, "a word of tokens") for word in list_of(values["tokens"], "tokens", "words")]
        found = list_of(values[key], key, "tags")
        if len(words) != len(found):
            raise BadRow("label", f"{key} has {len(found)} tags, and tokens {len(words)} words")
        return Conversation([said("user", " ".join(words))[0]], plain=True, label=found, columns={"words": words})

    return convert


# ---------------------------------------------------------------------------- tokens


def rendered(renderer: Renderer, conversation: Conversation) -> Rendered:
    """All tokens of the row, of which none is predicted, and what it is labelled with."""
    found = _labelled(conversation.label, renderer)
    return replace(unlabelled(renderer, conversation), labels=found)


def unlabelled(renderer: Renderer, conversation: Conversation) -> Rendered:
    """All tokens of a row."""
    renderer.check_texts(conversation)
    contents = [message["content"] for message in conversation.messages]
    written = [bool(text.strip()) for text in contents]
    if not any(written) or (conversation.plain and not all(written)):
        raise BadRow("empty_text", "the text is empty")
    if conversation.plain:
        ids, types, cut = _coded(renderer, contents)
    else:
        if not renderer.tokenizer.chat_template:
            raise BadRow("template", "the tokenizer has no chat template to write messages with: give text instead")
        text = renderer.apply(conversation, conversation.messages)
        ids, types, cut = _coded(renderer, [text], add_special_tokens=False)
    return _made(renderer, ids, cut, types=types)


def _labelled(label: Any, renderer: Renderer) -> tuple[float, ...]:
    try:
        return labels.numbers(label, renderer.labels, renderer.problem or labels.ONE)
    except labels.WrongLabel as error:
        raise BadRow("label", str(error)) from None


def _made(renderer: Renderer, ids: Sequence[int], cut: int, **more: Any) -> Rendered:
    """Without tokens at its end that texts are filled up with: transformers would not count them either."""
    from .masks import Rendered

    end = len(ids)
    while end and ids[end - 1] == renderer.tokenizer.pad_token_id:
        end -= 1
    if not end:
        raise BadRow("empty_text", "a text of no token")
    if more.get("types") is not None:
        more["types"] = more["types"][:end]
    return Rendered("", [], tokens=Tokens(list(ids[:end]), [0.0] * end), whole=True, cut=cut, **more)


def _coded(
    renderer: Renderer, contents: Sequence[str], **given: Any
) -> tuple[list[int], list[int] | None, int]:  # fmt: skip
    """Tokens, of which text each is where that differs, and how many were cut off."""
    coded = renderer.tokenizer(*contents, verbose=False, **given)
    ids, cut = coded["input_ids"], 0
    if len(ids) > renderer.max_length and renderer.long_text == CUT:
        cut = len(ids) - renderer.max_length
        coded = renderer.tokenizer(*contents, truncation=True, max_length=renderer.max_length, verbose=False, **given)
        ids = coded["input_ids"]
    types = coded.get("token_type_ids")
    return ids, types if types and any(types) else None, cut


def rendered_tags(renderer: Renderer, conversation: Conversation) -> Rendered:
    """All tokens of a row of words; the first of each word has its tag, the others and special ones have none."""
    words = conversation.columns["words"]
    try:
        found = labels.tags(conversation.label, renderer.labels)
    except labels.WrongLabel as error:
        raise BadRow("label", str(error)) from None
    made, firsts = untagged(renderer, words)
    of_tokens = [labels.NOTHING if word is None else found[word] for word in firsts]
    if not any(label != labels.NOTHING for label in of_tokens):
        raise BadRow("label", "the tags say nothing of any word")
    return replace(made, token_labels=of_tokens)


def untagged(renderer: Renderer, words: Sequence[str]) -> tuple[Rendered, list[int | None]]:
    """All tokens of a row of words, and of each token the word that it is the first of, if it is."""
    if empty := [i for i, word in enumerate(words) if not word.strip()]:
        raise BadRow("empty_text", f"word {empty[0]} is empty")
    if not words:
        raise BadRow("empty_text", "no word")
    text = " ".join(words)
    renderer.check_texts(Conversation([said("user", text)[0]]))
    given: dict[str, Any] = {"return_offsets_mapping": True, "verbose": False}
    coded, cut = renderer.tokenizer(text, **given), 0
    if len(coded["input_ids"]) > renderer.max_length and renderer.long_text == CUT:
        cut = len(coded["input_ids"]) - renderer.max_length
        coded = renderer.tokenizer(text, truncation=True, max_length=renderer.max_length, **given)
    firsts: list[int | None] = []
    seen: set[int | None] = set()
    for word in words_of(text, words, coded["offset_mapping"]):
        firsts.append(None if word in seen else word)
        seen.add(word)
    missing = [i for i in range(len(words)) if i not in seen]
    if missing and not cut:
        raise BadRow("word", f"word {missing[0]} ({shown(words[missing[0]])}) has no token of its own")
    made = _made(renderer, coded["input_ids"], cut)
    assert made.tokens is not None
    return made, firsts[: len(made.tokens.ids)]


def words_of(text: str, words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """The word that each token begins in, of words that stand one space apart; None of special tokens."""
    starts, at = [], 0
    for word in words:
        starts.append(at)
        at += len(word) + 1
    out: list[int | None] = []
    for start, stop in offsets:
        while start < stop and text[start].isspace():
            start += 1  # some tokenizers count the space before a word as its token's
        out.append(bisect.bisect_right(starts, start) - 1 if start < stop else None)
    return out
