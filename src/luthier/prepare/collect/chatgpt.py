"""ChatGPT's conversations.json: the branch of each conversation that was last shown, as messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from .base import File, How, Ready, opened
from .stream import Stream
from .talk import merged


def read(file: File, how: How) -> Iterator[Ready]:
    with opened(file.path) as raw:
        stream = Stream(raw)
        if stream.peek() == "{":
            yield from _conversation(stream.value(), 0, file)
        else:
            for number in stream.items():
                yield from _conversation(stream.value(), number, file)
        stream.end()


def _conversation(value: Any, number: int, file: File) -> Iterator[Ready]:
    if not isinstance(value, Mapping) or not isinstance(value.get("mapping"), Mapping):
        file.problems["an entry is no conversation of ChatGPT"] += 1
        return
    turns = list(_turns(branch(value), file))
    if not any(role == "assistant" for role, _ in turns) or not any(role == "user" for role, _ in turns):
        file.left["a conversation without a question and an answer"] += 1
        return
    more = {"title": value.get("title"), "date": _time(value.get("create_time"))}
    at = {"message": str(value.get("conversation_id") or value.get("id") or number)}
    yield Ready({"messages": merged(turns), **{k: v for k, v in more.items() if isinstance(v, str) and v}}, at)


def branch(value: Mapping) -> list[Mapping]:
    """Messages from the root to the current node; without one, to the leaf that was written last."""
    nodes = value["mapping"]
    at = value.get("current_node")
    if at not in nodes:
        leaves = [name for name, node in nodes.items() if isinstance(node, Mapping) and not node.get("children")]
        at = max(leaves, key=lambda name: _written(nodes[name]), default=None)
    made: list[Mapping] = []
    seen = set()
    while isinstance(at, str) and at not in seen and isinstance(nodes.get(at), Mapping):
        seen.add(at)
        if isinstance(nodes[at].get("message"), Mapping):
            made.append(nodes[at]["message"])
        at = nodes[at].get("parent")
    return made[::-1]


def _written(node: Mapping) -> float:
    message = node.get("message")
    time = message.get("create_time") if isinstance(message, Mapping) else None
    return float(time) if isinstance(time, int | float) else 0.0


def _turns(messages: list[Mapping], file: File) -> Iterator[tuple[str, str]]:
    for message in messages:
        author, content, about = (_object(message.get(key)) for key in ("author", "content", "metadata"))
        role = author.get("role")
        if about.get("is_visually_hidden_from_conversation"):
            continue
        if role == "tool" or (role == "assistant" and message.get("recipient") not in (None, "all")):
            file.left["a call or an answer of a tool"] += 1
        elif content.get("content_type") not in ("text", "multimodal_text"):
            if role in ("user", "assistant"):
                file.left[f"a message of the kind {content.get('content_type')}"] += 1
        elif role in ("system", "user", "assistant"):
            parts = content.get("parts")
            said = [part for part in parts if isinstance(part, str)] if isinstance(parts, list) else []
            if isinstance(parts, list) and len(said) < len(parts):
                file.left["a picture or a file in a message"] += len(parts) - len(said)
            if text := "\n".join(said).strip():
                yield role, text


def _object(value: Any) -> Mapping:
    return value if isinstance(value, Mapping) else {}


def _time(value: Any) -> str | None:
    try:
        return datetime.fromtimestamp(value, UTC).isoformat()
    except (TypeError, ValueError, OverflowError, OSError):
        return None
