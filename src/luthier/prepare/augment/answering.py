"""Who answers what ways ask: a server, or a model or run of ours; whatever was answered is kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ...errors import ConfigError
from ...files import write_atomically
from ...settings import Settings
from ..chat_client import Answer, ChatClient, Question, wrong_address


class Sampling(Settings):
    """How answers are drawn."""

    temperature: float = Field(0.7, ge=0.0, le=10.0)
    """0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Of the tokens, the likeliest that hold this share."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest answer; one that is cut there is not used."""

    def sampling(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_p": self.top_p, "max_new_tokens": self.max_new_tokens}


class Server(Sampling):
    """A model behind an OpenAI-compatible address: vLLM, llama.cpp, Ollama, LM Studio, OpenAI and others."""

    kind: Literal["openai"] = "openai"
    base_url: str
    """Such as http://localhost:8000/v1."""
    name: str = Field(min_length=1)
    """Of the model there."""
    api_key_env: str = Field("OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """The environment variable that holds the key; it is sent if it is set, and written nowhere."""
    parallel: int = Field(8, ge=1, le=256)
    """Requests at a time."""
    timeout: float = Field(120.0, gt=0.0, allow_inf_nan=False)
    """Seconds for each."""
    retries: int = Field(6, ge=0)
    """How often one is sent again that failed in a way that may pass."""
    body: dict[str, Any] = {}
    """More keys of each request; null leaves out one of ours, such as `seed`, that the server does not know."""

    @field_validator("base_url")
    @classmethod
    def _address(cls, url: str) -> str:
        if problem := wrong_address(url):
            raise ValueError(problem)
        return url.rstrip("/")

    def problem(self) -> str | None:
        return None

    def identity(self) -> Any:
        """What its answers depend on beside the question."""
        return ["openai", self.base_url, self.name, self.body]


class Own(Sampling):
    """A run of Luthier, or a model in a folder or on the hub, on this machine."""

    kind: Literal["luthier"] = "luthier"
    name: str = Field(min_length=1)
    """The run's folder, or the model's name or folder."""
    batch_size: int = Field(32, ge=1)
    """Prompts answered at once."""

    def problem(self) -> str | None:
        from ...config import read_run
        from ...opened import is_run, problem

        if not is_run(self.name):
            return problem(self.name)
        config = read_run(Path(self.name).expanduser())
        if config.objective.ends_in == "tokens":
            return None
        return f"{self.name} is a run of method={config.method}, which gives scores, no answers"

    def identity(self) -> Any:
        return ["luthier", self.name, self.batch_size, *_files(Path(self.name).expanduser())]


Answering = Annotated[Server | Own, Field(discriminator="kind")]
Keep = Callable[[int, Answer], None]


def _files(folder: Path) -> list:
    """Sizes and times of a model's files, by which another one at the same place is told."""
    if folder.is_file():
        return [[folder.stat().st_size, folder.stat().st_mtime_ns]]
    if not folder.is_dir():  # on the hub
        return []
    kinds = (".safetensors", ".gguf", ".json", ".yaml")
    found = sorted(path for path in folder.rglob("*") if path.suffix in kinds and path.is_file())
    return [[str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns] for p in found]


# ---------------------------------------------------------------------------- answers that are kept


class Store:
    """A folder of values of JSON by what they were made from; several processes may write to it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def place(self, key: object) -> Path:
        told = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / told[:2] / f"{told[2:]}.json"

    def get(self, key: object) -> Any:
        """None where nothing is kept, or it is damaged."""
        try:
            return json.loads(self.place(key).read_text(encoding="utf-8"))["value"]
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def put(self, key: object, value: Any) -> None:
        place = self.place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, json.dumps({"key": key, "value": value}))

    def kept(self, kind: str, key: object, make: Callable[[], Any]) -> Any:
        if (found := self.get([kind, key])) is None:
            found = make()
            self.put([kind, key], found)
        return found


class Answerer:
    """Answers of one model: kept ones, else asked."""

    def __init__(self, settings: Server | Own, store: Store):
        self.settings, self.store = settings, store
        self.identity = settings.identity()

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        different = list(dict.fromkeys(questions))
        found = dict(zip(different, self._answers(different)))
        return [found[question] for question in questions]

    def _answers(self, questions: Sequence[Question]) -> list[Answer]:
        keys = [["answer", self.identity, question.told()] for question in questions]
        made = [self.store.get(key) for key in keys]
        missing = [place for place, found in enumerate(made) if found is None]
        if not missing:
            return [Answer(*found) for found in made]
        # Who shares a batch of ours can change the last bit, so the same ones are asked again after a kill.
        asked = missing if isinstance(self.settings, Server) else list(range(len(questions)))

        def keep(place: int, answer: Answer) -> None:
            if made[asked[place]] is None:
                made[asked[place]] = list(answer)
                self.store.put(keys[asked[place]], list(answer))

        model(self.settings)([questions[place] for place in asked], keep)
        return [Answer(*found) for found in made]


# ---------------------------------------------------------------------------- models


def model(settings: Server | Own) -> Callable[[Sequence[Question], Keep], Any]:
    if isinstance(settings, Server):
        return ChatClient(
            settings.base_url, settings.name, settings.api_key_env, settings.parallel, settings.timeout,
            settings.retries, settings.body,
        ).answers  # fmt: skip
    return _opened(settings.name, settings.batch_size)


@lru_cache(maxsize=2)
def _opened(name: str, batch_size: int) -> Callable[[Sequence[Question], Keep], None]:
    """Loaded once in a process."""
    import torch

    from ... import generate
    from ...opened import opened

    found = opened(name)
    if not found.tokenizer.chat_template:
        raise ConfigError(f"model.name={name!r} has no chat template: give a model for conversations")
    chat = generate.Chat(found.network, found.renderer)

    def answers(questions: Sequence[Question], keep: Keep) -> None:
        for place, members in _alike(questions):
            first = members[0]
            prompts = [chat.prompt([{"role": role, "content": text} for role, text in q.messages]) for q in members]
            drawn = torch.stack([
                torch.rand(first.max_new_tokens, generator=torch.Generator().manual_seed(q.seed)) for q in members
            ])  # fmt: skip
            made = generate.complete(
                chat.network, prompts, chat.renderer.stop_tokens(), first.max_new_tokens, batch_size=batch_size,
                temperature=first.temperature, top_p=first.top_p, uniforms=drawn,
            )  # fmt: skip
            for at, one in zip(place, made):
                keep(at, Answer(chat.text(one.answer), not one.ended))

    return answers


def _alike(questions: Sequence[Question]) -> list[tuple[list[int], list[Question]]]:
    """Those that are drawn alike, together: (their places, they themselves)."""
    groups: dict[tuple, list[int]] = {}
    for place, q in enumerate(questions):
        groups.setdefault((q.temperature, q.top_p, q.max_new_tokens), []).append(place)
    return [(places, [questions[place] for place in places]) for places in groups.values()]
