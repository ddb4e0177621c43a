"""An Ollama Modelfile: where the weights are, the chat template in Ollama's language, and where answers end.

https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...opened import Opened

U, A, S = "⟪user⟫", "⟪assistant⟫", "⟪system⟫"


@dataclass(frozen=True)
class Turns:
    """A chat template as texts around what is said."""

    around: dict[str, tuple[str, str]]
    """Before and after each role's text."""
    answer: str
    """Before the answer that is asked for."""
    unasked: str
    """At the start of a conversation that has no system's turn."""

    def render(self, messages: list[dict[str, str]]) -> str:
        """As Ollama does from `template`."""
        head = "" if messages[0]["role"] == "system" else self.unasked
        said = "".join(self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in messages)
        return head + said + self.answer

    def template(self) -> str:
        """In Go's language of templates."""
        roles = "{{ else }}".join(
            f'{{{{ if eq .Role "{role}" }}}}{_quoted(before)}{{{{ .Content }}}}{_quoted(after)}'
            for role, (before, after) in self.around.items()
        )
        ends = "{{ end }}" * len(self.around)
        first = '{{ if ne (index .Messages 0).Role "system" }}' + _quoted(self.unasked) + "{{ end }}"
        first = first if self.unasked else ""
        return f"{first}{{{{ range .Messages }}}}{roles}{ends}{{{{ end }}}}{_quoted(self.answer)}"


def _quoted(text: str) -> str:
    """Braces that are text, not language."""
    return text.replace("{{", '{{ "{{" }}')


def turns(tokenizer: Any) -> Turns | None:
    """Found by rendering conversations with marks in them; None for a template that is more than texts around texts."""
    if not tokenizer.chat_template:
        return None
    try:
        found = _found(tokenizer)
        cases = [
            [("user", "a b")], [("system", "s"), ("user", "q")], [("user", "q"), ("assistant", "r"), ("user", "t")],
            [("system", "s"), ("user", "q"), ("assistant", "r\n1"), ("user", "t"), ("assistant", "v"), ("user", "w")],
        ]  # fmt: skip
        for case in cases:
            messages = [{"role": role, "content": text} for role, text in case]
            if case[0][0] not in found.around:
                continue
            if found.render(messages) != _rendered(tokenizer, messages, True):
                return None
    except Exception:  # whatever a template says to conversations that it does not take
        return None
    return found


def _rendered(tokenizer: Any, messages: list[dict[str, str]], asked: bool) -> str:
    """Without the token at its start, which llama.cpp adds itself."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)
    bos = tokenizer.bos_token
    adds = bos and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds else text


def _found(tokenizer: Any) -> Turns:
    def said(*parts: tuple[str, str], asked: bool = False) -> str:
        return _rendered(tokenizer, [{"role": role, "content": text} for role, text in parts], asked)

    user, system, answer = ("user", U), ("system", S), ("assistant", A)
    one = said(user)
    three = said(user, answer, user)
    head, after_user = one.split(U)
    try:
        before_system, between = said(system, user).split(S)
        between = between.split(U)[0]  # what closes the system's turn, and opens the user's
    except Exception:  # as a template says to a system's turn that knows none
        before_system, between = None, head
    middle, before_second = three.split(U)[1].split(A)  # around an answer: with the end of one turn, the start of next
    before_user = _common_end(between, before_second, head).removeprefix(after_user)  # all turns end alike, mostly
    opened = middle.removeprefix(after_user)
    knows = {} if before_system is None else {"system": (before_system, between.removesuffix(before_user))}
    return Turns(
        {
            **knows,
            "user": (before_user, after_user),
            "assistant": (opened, before_second.removesuffix(before_user)),
        },
        said(user, asked=True).removeprefix(one),
        head.removesuffix(before_user),
    )


def _common_end(*texts: str) -> str:
    shortest = min(texts, key=len)
    return next(shortest[i:] for i in range(len(shortest) + 1) if all(t.endswith(shortest[i:]) for t in texts))


def text(found: Opened, weights: str, adapter: str | None = None) -> str:
    """The file."""
    lines = [f"FROM {weights}"]
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    told = turns(found.tokenizer)
    if told is not None:
        lines.append(f'TEMPLATE """{told.template()}"""')
    elif found.tokenizer.chat_template:
        lines.append("# The chat template is more than texts around texts: Ollama takes the file's own if it knows it.")
    else:
        lines.append("# The model has no chat template: prompts go to it as they are.")
    for token in sorted(found.renderer.stop_tokens()):
        lines.append(f'PARAMETER stop "{found.tokenizer.convert_ids_to_tokens(token)}"')
    return "\n".join(lines) + "\n"
