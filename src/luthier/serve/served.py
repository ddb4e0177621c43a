"""What is served: the models behind the names in requests, each with its engine, its adapter and what it can do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import adapters, opened, surgery
from ..data.masks import Renderer
from ..errors import AdapterError, ConfigError, ModelError
from ..trainable import saved
from ..trainable.adapter import Adapting
from .engine import Engine, Limits
from .grammar import Machines, Vocabulary
from .pooled import Encoder, NetworkEncoder
from .requests import Busy
from .settings import Serving
from .tools import Style, style_of

Say = Callable[[str], None]


@dataclass(eq=False)
class Entry:
    """A name that requests can ask for."""

    name: str
    does: tuple[str, ...]
    engine: Engine | None = None
    adapter: str | None = None
    source: Answering | Scoring | None = None
    base: str | None = None
    judge: Any = None  # classifier or rater
    encoder: Any = None  # of embeddings, where the network gives no answers
    created: int = field(default_factory=lambda: int(time.time()))

    def told(self) -> dict[str, Any]:
        length = self.engine.length if self.engine is not None else None
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "luthier", "does": list(self.does),
            "base": self.base, "max_length": length,
        }  # fmt: skip


class Answering:
    """A network that answers, with what is needed to ask it and to read what it says."""

    def __init__(self, name: str, renderer: Renderer, engine: Engine, stops: Collection[int]):
        self.name, self.renderer, self.engine = name, renderer, engine
        self.stops = frozenset(stops)
        self.style: Style | None = style_of(renderer.tokenizer)
        self.machines = Machines(lambda: Vocabulary.of(renderer.tokenizer, engine.vocabulary))
        self._texts: dict[int, tuple[str, list[int]]] = {}

    @property
    def tokenizer(self) -> Any:
        return self.renderer.tokenizer

    @cached_property
    def _bytes(self) -> list[bytes | None]:
        from .grammar import Unsupported
        from .grammar.vocabulary import token_bytes

        try:
            return token_bytes(self.tokenizer)
        except Unsupported:
            return []

    def token(self, number: int) -> tuple[str, list[int]]:
        """A token as text, and its bytes."""
        found = self._texts.get(number)
        if found is None:
            known = self._bytes[number] if number < len(self._bytes) else None
            if known is None:
                text = self.tokenizer.decode([number])
                found = text, list(text.encode("utf-8", "replace"))
            else:
                found = known.decode("utf-8", "replace"), list(known)
            self._texts[number] = found
        return found


class Scoring:
    """A network that gives no answers: one thread asks it, one request after another."""

    def __init__(self, waiting: int):
        self.waiting = waiting
        self._pool = ThreadPoolExecutor(1, "luthier-scores")
        self._lock = threading.Lock()
        self.at_hand = 0

    def between(self, function: Callable[[], Any]) -> Future:
        with self._lock:
            if self.at_hand > self.waiting:
                raise Busy(f"{self.at_hand} requests are waiting already; try again later")
            self.at_hand += 1
        future = self._pool.submit(function)
        future.add_done_callback(self._done)
        return future

    def _done(self, future: Future) -> None:
        with self._lock:
            self.at_hand -= 1

    def stop(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Served:
    """All models of a server, by name."""

    def __init__(self, settings: Serving, tell: Say = lambda text: None):
        self.settings, self.tell = settings, tell
        self.entries: dict[str, Entry] = {}
        self.engines: dict[str, Engine] = {}
        self.scoring: list[Scoring] = []

    def get(self, name: str) -> Entry | None:
        """By its name alone: nothing is looked up on a disk."""
        return self.entries.get(name)

    def start(self) -> Served:
        for engine in self.engines.values():
            engine.start()
        return self

    def stop(self, drain: float = 0.0) -> None:
        threads = [threading.Thread(target=engine.stop, args=(drain,)) for engine in self.engines.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for scoring in self.scoring:
            scoring.stop()

    def stats(self) -> dict[str, dict[str, float]]:
        return {name: engine.stats() for name, engine in self.engines.items()}

    # ------------------------------------------------------------------ what is opened
    def answering(self, name: str, made: opened.Opened, variants: dict[str, frozenset[str]]) -> Answering:
        settings = self.settings
        limits = Limits(
            slots=settings.slots, cache_tokens=settings.cache_tokens, waiting=settings.waiting,
            length=settings.max_length,
        )  # fmt: skip
        engine = Engine(made.network, made.tokenizer, limits, variants, self.tell)
        self.engines[name] = engine
        return Answering(name, made.renderer, engine, _stops(made))

    def add(self, entry: Entry) -> None:
        if entry.name in self.entries:
            raise ConfigError(f"two models have the name {entry.name!r}: name one of them otherwise")
        self.entries[entry.name] = entry


def served(source: str, settings: Serving, tell: Say = lambda text: None) -> Served:
    """Open a run, a folder, a hub name or a GGUF file with all that is to be served of it; engines are not started."""
    made = Served(settings, tell)
    name = settings.name or _name(source)
    ends = _ends_in(source)
    if ends == "tokens":
        _serve_answers(made, source, name)
        return made
    if settings.adapters or settings.base:
        raise ConfigError("--adapter and --base are for models that answer, and this one gives scores or embeddings")
    scoring = Scoring(settings.waiting)
    made.scoring.append(scoring)
    if ends == "embeddings":
        made.add(Entry(name, ("embeddings",), source=scoring, encoder=Encoder(source, settings)))
        return made
    does, judge = _judge(source, tell)
    encoder = NetworkEncoder(judge.network, judge.renderer.tokenizer, settings)
    made.add(Entry(name, (does, "embeddings"), source=scoring, judge=judge, encoder=encoder))
    return made


def _name(source: str) -> str:
    path = Path(source).expanduser()
    return path.resolve().name.removesuffix(".gguf") if path.exists() else source


def _ends_in(source: str) -> str:
    """tokens, scores, or embeddings."""
    if opened.is_run(source):
        config = opened.read_run(Path(source).expanduser())
        return "tokens" if config.objective.ends_in == "tokens" else "scores"
    if text := opened.problem(source):
        raise ModelError(text)
    found = Path(source).expanduser() / "config.json"
    if source.endswith(".gguf"):
        return "tokens"
    if found.is_file():
        kinds = json.loads(found.read_text()).get("architectures") or []
    else:
        from transformers import AutoConfig

        kinds = AutoConfig.from_pretrained(source, trust_remote_code=False).architectures or []
    kind = kinds[0] if kinds else "ForCausalLM"
    if kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "tokens"
    if kind.endswith(("ForSequenceClassification", "ForTokenClassification")):
        raise ModelError(
            f"{source} is a {kind}: serve the run that trained it, which knows how texts are written for it"
        )
    return "embeddings"


def _serve_answers(made: Served, source: str, name: str) -> None:
    settings = made.settings
    main = opened.opened(source, made.tell)
    at_start = frozenset(module.name for module in surgery.switched(main.model) if module.enabled)
    beneath = frozenset(entry.name or "" for entry in main.made.config.model.beneath) if main.made else frozenset()
    variants = {name: at_start}
    base_name = None
    moved = main.made is not None and not _in_adapters(main)
    if main.made is not None and not moved:
        base_name = f"{name}-base"
        variants[base_name] = beneath
    elif settings.adapters and moved:
        raise ConfigError(f"--adapter: {source} is a run that moved the weights of its base, which adapters belong to")
    for adapter, folder in settings.adapters.items():
        if adapter in variants:
            raise ConfigError(f"--adapter {adapter}={folder}: there is a model of that name already")
        own = f"served-{len(variants)}"
        adapters.load(main.model, _adapter_folder(folder), own)
        variants[adapter] = beneath | {own}
    for module in surgery.switched(main.model):
        module.enabled = module.name in at_start
    answering = made.answering(name, main, variants)
    does = ("chat", "completions", "embeddings")
    for one in variants:
        base = None if one == base_name else base_name if base_name else (name if one != name else None)
        made.add(Entry(one, does, answering.engine, one, answering, base))
    if settings.base:
        if base_name is not None:
            return  # it is there already, with the adapters off
        if main.made is None:
            raise ConfigError(f"--base: {source} is no run, so there is nothing that it was trained from")
        theirs = main.made.config.model
        if not theirs.name or theirs.starts_at_random:
            raise ConfigError(f"--base: the run {source} began at random weights")
        other = opened.opened(theirs.name, made.tell)
        base_name = f"{name}-base"
        base = opened.Opened(theirs.name, other.network, main.renderer)
        apart = made.answering(base_name, base, {base_name: frozenset()})
        made.add(Entry(base_name, does, apart.engine, base_name, apart))
        made.entries[name].base = base_name


def _in_adapters(main: opened.Opened) -> bool:
    """Whether all that a run moved can be switched off."""
    made = main.made
    assert made is not None
    if made.sources is not None and saved.TRAINED in made.sources.files:
        return False  # it went on with a saved adapter, which is its base
    added = {id(p) for p in surgery.added(made.network.model)}
    return isinstance(made.config.trainable, Adapting) and all(
        id(p) in added for name, p in made.parameters().items() if not name.startswith("objective.")
    )


def _adapter_folder(folder: str) -> str:
    path = Path(folder).expanduser()
    if opened.is_run(path):
        raise AdapterError(
            f"{folder} is a run: `luthier export {folder} OUT --as adapter` writes its adapter, which is served"
        )
    return str(path)


def _stops(made: opened.Opened) -> set[int]:
    stops = made.renderer.stop_tokens()
    told = getattr(made.model, "generation_config", None)
    more = getattr(told, "eos_token_id", None)
    return stops | set(more if isinstance(more, list) else [] if more is None else [more])


def _judge(source: str, tell: Say) -> tuple[str, Any]:
    """Of a run that gives texts labels, or conversations scores."""
    from ..classify import Classifier
    from ..rating import Rater

    run = opened.opened(source, tell)
    assert run.made is not None
    config = run.made.config
    if config.objective.rows == "whole_pairs":
        return "score", Rater(run.network, run.renderer, config.data.columns, config.batch.micro_tokens)
    if config.objective.rows in ("labelled", "tagged"):
        chat = config.data.format == "labelled_messages"
        return "classify", Classifier(run.network, run.renderer, chat, config.batch.micro_tokens)
    raise ModelError(f"{source} is a run of method={config.method}, which can not be served")



