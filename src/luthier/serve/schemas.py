"""What requests hold, as OpenAI's API has it; a field that is not known is an error, and none is taken in silence.

https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_TEXTS = 2048
MOST_CHOICES = 64
LONGEST_NAME = 256


def _characters(text: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("holds half of a UTF-16 pair, which is no character")
    return text


Text = Annotated[str, AfterValidator(_characters)]
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME), AfterValidator(_characters)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Texts = (
    Text
    | Annotated[list[Text], Field(max_length=MOST_TEXTS)]
    | Annotated[list[Token], Field(min_length=1)]
    | Annotated[list[list[Token]], Field(max_length=MOST_TEXTS)]
)
Stop = Annotated[list[Annotated[Text, Field(min_length=1, max_length=1024)]], Field(max_length=16)]
StopText = Annotated[Text, Field(min_length=1, max_length=1024)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


# ---------------------------------------------------------------------------- chat


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class FunctionCall(_Strict):
    name: Name
    arguments: Text
    """JSON of an object."""


class ToolCall(_Strict):
    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)
    tool_call_id: Text | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    reasoning_content: Text | None = None
    """What was thought before an answer, for templates that show it."""


Messages = Annotated[list[Message], Field(min_length=1)]


class Function(_Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object."""
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(_Strict):
    name: Name


class NamedTool(_Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = None


class FormatText(_Strict):
    type: Literal["text"]


class FormatObject(_Strict):
    type: Literal["json_object"]


class FormatSchema(_Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class _Sampled(_Strict):
    """What requests for answers have in common."""

    model: Name
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(0, ge=0, le=1 << 20)
    """Not OpenAI's: of how many likeliest tokens one is drawn; 0 is all."""
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    """What is drawn follows from it: the same request has the same answer."""
    n: int | None = Field(1, ge=1, le=MOST_CHOICES)
    stop: StopText | Stop | None = None
    max_tokens: int | None = Field(None, ge=1)
    user: Text | None = None
    """Those who wait are served in turn by user."""
    metadata: dict[str, Any] | None = None
    frequency_penalty: float | None = Field(0, ge=0, le=0)
    presence_penalty: float | None = Field(0, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)


class ChatRequest(_Sampled):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: Annotated[FormatText | FormatObject | FormatSchema, Field(discriminator="type")] | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(_Sampled):
    """`POST /v1/completions`."""

    prompt: Texts
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = False
    suffix: None = None
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES)


# ---------------------------------------------------------------------------- numbers of texts


class EmbeddingRequest(_Strict):
    """`POST /v1/embeddings`."""

    model: Name
    input: Texts
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, ge=1)
    """The first so many numbers, scaled to length 1 again."""
    user: Text | None = None


class ClassifyRequest(_Strict):
    """`POST /v1/classify`: the labels of texts."""

    model: Name
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
    """The two texts of a pair have a tab between them."""


class ScoreRequest(_Strict):
    """`POST /v1/score`: a reward model's scores of whole conversations."""

    model: Name
    input: Annotated[list[Text | Messages], Field(min_length=1, max_length=MOST_TEXTS)]
    """Each a prompt and its answer with a tab between, or messages."""
