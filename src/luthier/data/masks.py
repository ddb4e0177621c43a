"""Conversations to tokens and what is learnt of them: the model's own template, rendered once, verified per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..document import Document
from ..errors import DataError, ModelError
from .formats import BadRow, Conversation, check_roles

PROBE = "luthier-probe-answer"  # stands for an answer while the template is being examined


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation and the spans of it that are learnt, in characters."""

    text: str
    spans: list[tuple[int, int]]


class Renderer:
    """Renders and masks conversations for one tokenizer; `end_of_turn` is what closes an assistant turn."""

    def __init__(self, tokenizer: Any, train_on: str, max_length: int):
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets, which masks are made from; "
                "convert it to a `tokenizers` one (tokenizer.json)"
            )
        self.tokenizer, self.train_on, self.max_length = tokenizer, train_on, max_length
        self.special = sorted({str(t) for t in tokenizer.all_special_tokens}, key=len, reverse=True)
        self.special += [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.special = [t for t in dict.fromkeys(self.special) if t]
        template = tokenizer.chat_template
        self.marked = isinstance(template, str) and "generation %}" in template.replace(
            "generation-%}", "generation %}"
        )
        self.end_of_turn: Any = self._end_of_turn() if template else tokenizer.eos_token

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
        texts, indices = render_jinja_template(
            conversations=[conversation.messages], tools=tools, chat_template=self.tokenizer.chat_template,
            return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map,
        )  # fmt: skip
        return texts[0], [(int(start), int(stop)) for start, stop in indices[0]]

    # ------------------------------------------------------------------ spans
    def render(self, conversation: Conversation) -> Rendered:
        """The whole conversation with the spans that are learnt, or BadRow where they cannot be told for certain."""
        check_roles(conversation)
        for message in conversation.messages:
            if any(token in message["content"] for token in self.special):
                raise BadRow("special_token", f"a {message['role']} turn contains a special token of the model as text")
        if conversation.plain or not self.tokenizer.chat_template:
            return self._plain(conversation)
        if self.end_of_turn is None:
            raise BadRow("template", "the chat template ends an answer with no special token, so none would be learnt")
        answers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        wanted = answers if self.train_on == "all" else answers[-1:]
        if self.marked:
            text, spans = self._marked_spans(conversation)
            if len(spans) != len(answers):
                raise BadRow("template", f"the template marks {len(spans)} generated spans in {len(answers)} answers")
            starts = {answer: span[0] for answer, span in zip(answers, spans)}
        else:
            text = self.apply(conversation, conversation.messages)
            starts = {i: self._start(conversation, text, i) for i in wanted}
        return Rendered(text, [self._span(text, starts[i], conversation.messages[i]) for i in wanted])

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
        return start, end + len(self.end_of_turn)

    def _plain(self, conversation: Conversation) -> Rendered:
        """Without a template: the texts one after another, closed by the end-of-text token."""
        end = (conversation.plain and self.tokenizer.eos_token) or self.end_of_turn  # a text is no turn of a chat
        if not end:
            raise BadRow("template", "the tokenizer has neither a chat template nor an end-of-text token")
        text, spans = self.tokenizer.bos_token if self._adds_bos() else "", []
        for message in conversation.messages:
            start = len(text)
            text += message["content"]
            if message["role"] == "assistant":
                text += end
                spans.append((start, len(text)))
        return Rendered(text, spans if self.train_on == "all" else spans[-1:])

    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("x")["input_ids"][:1] == [bos]

    # ------------------------------------------------------------------ tokens
    def documents(self, rows: Sequence[tuple[int, Rendered]]) -> list[Document | BadRow]:
        """The tokens and weights of many rows at once."""
        if not rows:
            return []
        coded = self.tokenizer(
            [r.text for _, r in rows], add_special_tokens=False, return_offsets_mapping=True,
            return_attention_mask=False, verbose=False,
        )  # fmt: skip
        out: list[Document | BadRow] = []
        for (number, rendered), tokens, offsets in zip(rows, coded["input_ids"], coded["offset_mapping"]):
            try:
                out.append(self._document(number, rendered, tokens, offsets))
            except BadRow as fault:
                out.append(fault)
        return out

    def _document(self, number: int, rendered: Rendered, tokens: list[int], offsets: list) -> Document:
        starts = np.fromiter((o[0] for o in offsets), np.int64, len(offsets))
        stops = np.fromiter((o[1] for o in offsets), np.int64, len(offsets))
        weights = np.zeros(len(tokens), np.float32)
        for start, stop in rendered.spans:
            if np.any((starts < start) & (stops > start)):
                raise BadRow(
                    "template", "a token spans the border of prompt and answer, so the two cannot be told apart"
                )
            inside = np.flatnonzero((stops > start) & (starts < stop))
            if not len(inside):
                raise BadRow("no_trained_token", "an answer of no token")
            weights[inside[0] : inside[-1] + 1] = 1.0
        weights[:1] = 0.0
        used = np.flatnonzero(weights)
        if not len(used):
            raise BadRow("no_trained_token", "no token of the row is learnt")
        length = int(used[-1]) + 1  # what follows the last learnt token teaches nothing
        if length > self.max_length:
            raise BadRow("truncated", f"the answer ends at token {length}, after data.max_length={self.max_length}")
        return Document(np.asarray(tokens[:length], np.int32), weights[:length], number)

    def prompt(self, conversation: Conversation) -> tuple[list[int], str]:
        """What stands before the last answer, as tokens, and the text of that answer."""
        answers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        last = answers[-1]
        before = conversation.messages[:last]
        return self.prompt_tokens(conversation, before), conversation.messages[last]["content"].strip()

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


def require_renderable(tokenizer: Any) -> None:
    if tokenizer.eos_token is None and not tokenizer.chat_template:
        raise DataError("the tokenizer has neither a chat template nor an end-of-text token: give model.chat_template")
