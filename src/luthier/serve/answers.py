"""What is answered, as OpenAI's API has it: the schemas of the server's own description."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class Fault(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    error: Fault


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int | None = None
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class LogProb(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogProb(LogProb):
    top_logprobs: list[LogProb]


class ChatLogProbs(BaseModel):
    content: list[TokenLogProb] | None
    refusal: None = None


class Called(BaseModel):
    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: Literal["function"]
    function: Called


class Said(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[Call] | None = None


class ChatChoice(BaseModel):
    index: int
    message: Said
    logprobs: ChatLogProbs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class TextLogProbs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogProbs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    does: list[str]
    """Of chat, completions, embeddings, classify, score."""
    base: str | None
    """The model that it was made from, where that is served, too."""
    max_length: int | None


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Judged(BaseModel):
    object: Literal["list"]
    data: list[dict[str, Any]]
    model: str


class Health(BaseModel):
    status: Literal["ok"]
