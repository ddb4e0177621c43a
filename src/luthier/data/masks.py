"""Conversations to tokens and what is learnt of them: the model's own template, rendered once, verified per row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..document import Document
from ..errors import DataError, ModelError
from .conversations import BadRow, Conversation, Tokens, check_roles, texts_in

PROBE = "luthier-probe-answer"  # stands for an answer while the template is being examined
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # where messages keep what was thought before an answer
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation and the spans of it that are learnt, in characters, each with its weight."""

    text: str
    spans: list[tuple[int, int, float]]
    plain: bool = False  # may be cut into several documents
    tokens: Tokens | None = None  # a row that needs no text
    rest: tuple[Rendered, ...] = ()  # further members of the same row
    labels: tuple[float, ...] = ()  # what is said of the whole row
    whole: bool = False  # no token is predicted, and all are run: up to the end of the last span, if there is one
    token_labels: Sequence[int] | None = None  # of `tokens`
    types: Sequence[int] | None = None  # of `tokens`: which of two texts each is of
    cut: int = 0  # tokens that were left out


class Renderer:
    """Renders and masks conversations for one tokenizer; `end_of_turn` is what closes an assistant turn.

    `kind` says what rows are: text to predict, preference pairs, prompts, ... as the objective wants them.
    """

    def __init__(
        self, tokenizer: Any, train_on: str, max_length: int, long_text: str = "split", kind: str = "text",
        labels: Sequence[str] = (), problem: str | None = None,
    ):  # fmt: skip
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets, which masks are made from; "
                "convert it to a `tokenizers` one (tokenizer.json)"
            )
        self.tokenizer, self.train_on = tokenizer, train_on
        self.max_length, self.long_text, self.kind = max_length, long_text, kind
        self.labels, self.problem = tuple(labels), problem  # of rows that have some
        self.special = sorted({str(t) for t in tokenizer.all_special_tokens}, key=len, reverse=True)
        self.special += [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.special = [t for t in dict.fromkeys(self.special) if t]
        self._special = re.compile("|".join(map(re.escape, self.special)) or r"(?!)")
        template = tokenizer.chat_template
        self.marked = isinstance(template, str) and "generation %}" in template.replace(
            "generation-%}", "generation %}"
        )
        self.end_of_turn: Any = self._end_of_turn() if template else tokenizer.eos_token

    def of_text(self) -> Renderer:
        """The same for rows of which the next token is predicted."""
        return Renderer(self.tokenizer, self.train_on, self.max_length, self.long_text)

    # ------------------------------------------------------------------ the template
    def apply(self, conversation: Conversation, messages: Sequence[dict], generation: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=conversation.tools, tokenize=False, add_generation_prompt=generation
            )
        except Exception as error:  # whatever a template raises is about the row
            raise BadRow("template", f"the chat template refuses the row: {error}") from None

    def _end_of_turn(self) -> str | None:
        """The special token that the template writes right after an answer."""
        probe = Conversation([{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}])
        try:
            text = self.apply(probe, probe.messages)
        except BadRow as error:
            raise ModelError(f"chat_template: cannot render a question and an answer: {error.detail}") from None
        if PROBE not in text:
            raise ModelError("chat_template: the template leaves the assistant's answer out")
        tail = text[text.rindex(PROBE) + len(PROBE) :]
        found = [(tail.index(token), token) for token in self.special if token in tail]
        return min(found)[1] if found else None

    def _marked_spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        tools: Any = conversation.tools
        try:
            texts, indices = render_jinja_template(
                conversations=[conversation.messages], tools=tools, chat_template=self.tokenizer.chat_template,
                return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        except Exception as error:
            raise BadRow("template", f"the chat template refuses the row: {error}") from None
        return texts[0], [(int(start), int(stop)) for start, stop in indices[0]]

    # ------------------------------------------------------------------ spans
    def render(self, conversation: Conversation) -> Rendered:
        """The whole conversation with the spans that are learnt, or BadRow where they cannot be told for certain."""
        if conversation.tokens is not None:
            if self.train_on != "all":
                raise DataError(
                    f"data.train_on={self.train_on}: rows of tokens say themselves what is learnt (labels, loss_mask)"
                )
            tokens = Tokens(*conversation.tokens)
            return replace(self.ready(tokens), plain=all(tokens.weights[1:]))
        check_roles(conversation)
        self.check_texts(conversation)
        answers = _answers(conversation)
        weights = conversation.weights or [1.0] * len(conversation.messages)
        wanted = [i for i in (answers if self.train_on == "all" else answers[-1:]) if weights[i]]
        if not wanted:
            raise BadRow("no_trained_token", f"the weight of every assistant turn (train_on={self.train_on}) is 0")
        if conversation.plain or not self.tokenizer.chat_template:
            return self._plain(conversation, wanted, weights)
        if self.end_of_turn is None:
            raise BadRow("template", "the chat template ends an answer with no special token, so none would be learnt")
        if self.marked:
            text, marks = self._marked_spans(conversation)
            if len(marks) != len(answers):
                raise BadRow("template", f"the template marks {len(marks)} generated spans in {len(answers)} answers")
            starts = {answer: mark[0] for answer, mark in zip(answers, marks)}
        else:
            text = self.apply(conversation, conversation.messages)
            starts = {i: self._start(conversation, text, i) for i in wanted}
        self._check_written(conversation, text)
        spans = [(*self._span(text, starts[i], conversation.messages[i]), weights[i]) for i in wanted]
        return Rendered(text, spans)

    def check_texts(self, conversation: Conversation) -> None:
        """No text of the row may read as one of the model's special tokens, and all must be text that can be coded."""
        parts: list[tuple[str, object]] = [(f"turn {i} ({m['role']})", m) for i, m in enumerate(conversation.messages)]
        parts.append(("tools", conversation.tools))
        for where, part in parts:
            for text in texts_in(part):
                if found := self._special.search(text):
                    raise BadRow("special_token", f"{where} contains the model's special token {found[0]!r} as text")
                if found := SURROGATE.search(text):
                    raise BadRow("format", f"{where} contains {found[0]!r}, half of a UTF-16 pair and no character")

    def _check_written(self, conversation: Conversation, text: str) -> None:
        """What a template leaves out without a word would be missing from what is learnt, or from what it answers."""
        for message in conversation.messages:
            if message["role"] in ("system", "developer", "user") and message["content"].strip() not in text:
                raise BadRow("template", f"the chat template leaves the content of a {message['role']} turn out")
        for tool in conversation.tools or ():
            name = tool.get("function", tool)["name"]
            if name not in text:
                raise BadRow("template", f"the chat template leaves the tool {name!r} out")

    def _start(self, conversation: Conversation, text: str, answer: int) -> int:
        """Where the answer begins: right after the prompt that will stand before it when the model is asked."""
        prompt = self.apply(conversation, conversation.messages[:answer], generation=True)
        if not text.startswith(prompt):
            raise BadRow(
                "template",
                "the chat template writes earlier turns differently once later ones follow, so what was asked is not "
                "what would be learnt; use data.train_on=last",
            )
        return len(prompt)

    def _span(self, text: str, start: int, message: dict) -> tuple[int, int]:
        content = message["content"].strip()
        begin = text.find(content, start)
        end = -1 if begin < 0 else text.find(self.end_of_turn, begin + len(content))
        if end < 0:
            raise BadRow("template", "the answer and the end of its turn are not found in what the template wrote")
        between = text[start:begin]
        if self.end_of_turn in between:
            raise BadRow("template", "the end of another turn stands where the answer should begin")
        stop = end + len(self.end_of_turn)
        written = text[start:stop]
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in written:
                raise BadRow("template", f"the chat template leaves the call of {call['function']['name']!r} out")
        for key in THOUGHTS:
            if isinstance(message.get(key), str) and message[key].strip() not in written:
                raise BadRow("template", f"the chat template leaves the {key} of an answer out; remove it from the row")
        return start, stop

    def _plain(self, conversation: Conversation, wanted: Sequence[int], weights: Sequence[float]) -> Rendered:
        """Without a template: the texts one after another, closed by the end-of-text token."""
        end = self.tokenizer.eos_token or self.end_of_turn
        if not end:
            raise BadRow("template", "the tokenizer has neither a chat template nor an end-of-text token")
        if conversation.tools or any("tool_calls" in m for m in conversation.messages):
            raise BadRow("template", "tools need a chat template, and the tokenizer has none")
        text, spans = self.tokenizer.bos_token if self._adds_bos() else "", []
        for i, message in enumerate(conversation.messages):
            start = len(text)
            text += message["content"]
            if message["role"] == "assistant":
                text += end
            if i in wanted:
                spans.append((start, len(text), weights[i]))
        return Rendered(text, spans, conversation.plain)

    def ready(self, tokens: Tokens, whole: bool = False) -> Rendered:
        """A row that is tokens already, as far as its ids are ones of this tokenizer."""
        outside = next((i for i in tokens.ids if not 0 <= i < self._vocabulary), None)
        if outside is not None:
            shown = outside if abs(outside) < 1 << 64 else "an integer of more than 64 bits"
            raise BadRow("format", f"input_ids holds {shown}, and the tokenizer's ids are 0 to {self._vocabulary - 1}")
        return Rendered("", [], tokens=tokens, whole=whole)

    @cached_property
    def _vocabulary(self) -> int:
        return max(len(self.tokenizer), 1 + max(self.tokenizer.get_vocab().values()))

    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("x")["input_ids"][:1] == [bos]

    # ------------------------------------------------------------------ tokens
    def documents(self, rows: Sequence[tuple[int, Rendered]]) -> list[list[Document] | BadRow]:
        """The tokens and weights of many rows at once; a long plain text becomes several documents."""
        texts = [r.text for _, row in rows for r in (row, *row.rest) if r.tokens is None]
        coded: Any = {"input_ids": [], "offset_mapping": []}
        if texts:
            coded = self.tokenizer(
                texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
            )
        pairs = zip(coded["input_ids"], coded["offset_mapping"])
        out: list[list[Document] | BadRow] = []
        for number, row in rows:
            members = [(r, *(next(pairs) if r.tokens is None else (r.tokens.ids, []))) for r in (row, *row.rest)]
            try:
                made = [self._document(number, *member) for member in members]
                out.append(made[0] if not row.rest else [_joined([document for (document,) in made])])
            except BadRow as fault:
                out.append(fault)
        return out

    def _document(self, number: int, rendered: Rendered, ids: list[int], offsets: list) -> list[Document]:
        ready = rendered.tokens
        weights = self._weights(rendered, offsets) if ready is None else np.asarray(ready.weights, np.float32)
        labels = rendered.token_labels
        if rendered.whole and not any(weights):
            self._check_length(len(ids))
            tokens = np.asarray(ids, np.int32)
            of_tokens = None if labels is None else np.asarray(labels, np.int32)
            types = None if rendered.types is None else np.asarray(rendered.types, np.int32)
            zeros = np.zeros_like(weights)
            return [Document(tokens, zeros, number, (0,), rendered.labels, of_tokens, types, rendered.cut)]
        made = self._cut(number, rendered.plain, ids, weights)
        if rendered.whole:
            return [d._replace(weights=np.zeros_like(d.weights), labels=rendered.labels) for d in made]
        return [d._replace(labels=rendered.labels) for d in made] if rendered.labels else made

    def _check_length(self, length: int) -> None:
        if not length:
            raise BadRow("no_trained_token", "a row of no token")
        if length > self.max_length:
            raise BadRow("truncated", f"a row of {length} tokens, with data.max_length={self.max_length}")

    def _weights(self, rendered: Rendered, offsets: list) -> np.ndarray:
        """[L] float32, from the characters that each token stands for."""
        starts = np.fromiter((o[0] for o in offsets), np.int64, len(offsets))
        stops = np.fromiter((o[1] for o in offsets), np.int64, len(offsets))
        weights = np.zeros(len(offsets), np.float32)
        for start, stop, weight in rendered.spans:
            if np.any((starts < start) & (stops > start)):
                raise BadRow(
                    "template", "a token spans the border of prompt and answer, so the two cannot be told apart"
                )
            inside = np.flatnonzero((stops > start) & (starts < stop))
            if not len(inside):
                raise BadRow("no_trained_token", "an answer of no token")
            weights[inside[0] : inside[-1] + 1] = weight
        return weights

    def _cut(self, number: int, plain: bool, ids: list[int], weights: np.ndarray) -> list[Document]:
        """One document that ends with its last learnt token; of a long plain text, chunks.

        A chunk begins with the last token of the one before, as what its first prediction is made from, so that the
        targets of all chunks are the text's tokens without the first, each once.
        """
        weights[:1] = 0.0
        used = np.flatnonzero(weights)
        if not len(used):
            raise BadRow("no_trained_token", "no token of the row is learnt")
        length = int(used[-1]) + 1  # what follows the last learnt token teaches nothing
        tokens, longest = np.asarray(ids[:length], np.int32), self.max_length
        if length <= longest:
            return [Document(tokens, weights[:length], number)]
        if not plain:
            raise BadRow("truncated", f"the answer ends at token {length}, after data.max_length={longest}")
        if self.long_text == "error":
            raise BadRow("truncated", f"a text of {length} tokens, with data.max_length={longest} and long_text=error")
        out = []
        for start in range(0, length - 1, longest - 1):
            chunk = weights[start : min(start + longest, length)].copy()
            chunk[0] = 0.0
            out.append(Document(tokens[start : start + longest], chunk, number))
        return out

    def prompt(self, conversation: Conversation) -> tuple[list[int], str]:
        """What stands before the last learnt answer, as tokens, and the text of that answer."""
        if conversation.tokens is not None:
            return self._prompt_of_tokens(Tokens(*conversation.tokens))
        if conversation.plain:
            raise DataError("evaluation.generate: plain text has no prompt to answer; set evaluation.generate=0")
        weights = conversation.weights
        last = [i for i in _answers(conversation) if weights is None or weights[i]][-1]
        before = conversation.messages[:last]
        return self.prompt_tokens(conversation, before), conversation.messages[last]["content"].strip()

    def _prompt_of_tokens(self, tokens: Tokens) -> tuple[list[int], str]:
        learnt = np.flatnonzero(tokens.weights)
        stop = int(learnt[-1]) + 1
        before = np.flatnonzero(np.asarray(tokens.weights[:stop]) == 0)
        if not len(before):
            raise DataError("evaluation.generate: tokens that are all learnt have no prompt; set evaluation.generate=0")
        start = int(before[-1]) + 1
        return tokens.ids[:start], self.tokenizer.decode(tokens.ids[start:stop], skip_special_tokens=True).strip()

    def prompt_tokens(self, conversation: Conversation, before: Sequence[dict]) -> list[int]:
        """The tokens after which the model is to answer."""
        if conversation.plain or not self.tokenizer.chat_template:
            text = (self.tokenizer.bos_token if self._adds_bos() else "") + "".join(m["content"] for m in before)
        else:
            text = self.apply(conversation, before, generation=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def stop_tokens(self) -> set[int]:
        """Where generation is to stop, as it was learnt."""
        ids = {self.tokenizer.eos_token_id}
        if self.end_of_turn:
            ids.add(self.tokenizer.convert_tokens_to_ids(self.end_of_turn))
        return {i for i in ids if i is not None}


def _joined(members: Sequence[Document]) -> Document:
    """One document of several members."""
    starts = np.cumsum([0, *(len(member.tokens) for member in members[:-1])]).tolist()
    return members[0]._replace(
        tokens=np.concatenate([member.tokens for member in members]),
        weights=np.concatenate([member.weights for member in members]),
        starts=tuple(starts),
    )


def _answers(conversation: Conversation) -> list[int]:
    return [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]


def require_renderable(tokenizer: Any) -> None:
    if tokenizer.eos_token is None and not tokenizer.chat_template:
        raise DataError("the tokenizer has neither a chat template nor an end-of-text token: give model.chat_template")
