"""New rows for many given ones at once: ways go forward together, so that their questions are asked together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..chat_client import Answer, Question
from .answering import Answerer, Store
from .preferences import Preferences
from .recipe import Augmentation
from .way import Draw, Given, Refused, Steps, Tools, Way


class New(NamedTuple):
    """A new row, or why there is none."""

    way: str
    copy: int
    values: dict | None
    reason: str = ""


class Making:
    """The ways of a recipe, ready to work in a process."""

    def __init__(self, recipe: Augmentation, answers: Path):
        self.seed = recipe.seed
        self.ways: list[Way] = [way.prepared() for way in recipe.ways.values() if way.kind != "self_instruct"]
        store = Store(answers)
        self.asked = {name: Answerer(one, store) for name, one in recipe.models().items()}
        self.tools = tools_of(recipe, store)

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """By whom each is meant for."""
        made: list[Answer | None] = [None] * len(questions)
        for name, answerer in self.asked.items():
            places = [place for place, question in enumerate(questions) if question.to == name]
            for place, answer in zip(places, answerer([questions[place] for place in places]) if places else ()):
                made[place] = answer
        return [answer for answer in made if answer is not None]

    def new(self, rows: Sequence[Given]) -> list[list[New]]:
        """The new rows of each."""
        made: list[list[New]] = [[] for _ in rows]
        going: list[tuple[int, int, Steps]] = []  # (place of the row, place among its new ones, what is done)
        for place, given in enumerate(rows):
            known = given.sha256
            for way, copy in self._wanted(known):
                draw = Draw(self.seed, way.kind, copy, known)
                new = New(way.kind, copy, None)
                if way.asks:
                    going.append((place, len(made[place]), way.made(given, draw, self.tools)))
                else:
                    try:
                        new = new._replace(values=way.changed(given, draw))
                    except Refused as why:
                        new = new._replace(reason=str(why))
                made[place].append(new)
        self._go(going, made)
        return made

    def _wanted(self, known: str) -> Iterator[tuple[Way, int]]:
        for way in self.ways:
            if way.share == 1.0 or Draw(self.seed, way.kind, "share", known).number() < way.share:
                yield from ((way, copy) for copy in range(way.copies))

    def _go(self, going: Sequence[tuple[int, int, Steps]], made: list[list[New]]) -> None:
        """All that ask, step by step together, until each has its row or none."""
        answers: dict[int, Any] = dict.fromkeys(range(len(going)))
        while answers:
            asked: list[tuple[int, list[Question]]] = []
            for at, said in answers.items():
                place, which, steps = going[at]
                try:
                    asked.append((at, steps.send(said)))
                except StopIteration as end:
                    made[place][which] = made[place][which]._replace(values=end.value)
                except Refused as why:
                    made[place][which] = made[place][which]._replace(reason=str(why))
            given = iter(self.ask([question for _, questions in asked for question in questions]))
            answers = {at: list(islice(given, len(questions))) for at, questions in asked}


def tools_of(recipe: Augmentation, store: Store) -> Tools:
    way = recipe.ways.get("preferences")
    rewards = way.rewards if isinstance(way, Preferences) else []
    told = [one.model_dump(mode="json") for one in rewards]
    sampling = {} if recipe.model is None else recipe.model.sampling()
    return Tools(sampling, store.kept, lambda: _scoring(tuple(rewards)), told)


def _scoring(rewards: Sequence[Any]) -> Any:
    """Built once in a process: a reward model is loaded then."""
    key = repr(rewards)
    if key not in _SCORING:
        from ...rewards import scoring
        from ...rewards.reward import Given as Beside

        _SCORING.clear()
        _SCORING[key] = scoring.build(rewards, Beside(load_model=_load_model))
    return _SCORING[key]


_SCORING: dict[str, Any] = {}


def _load_model(settings: Any) -> Any:
    from ...parallel import Parallel
    from ...parallel.ranks import Ranks
    from ...reward_models import loader

    return loader(Ranks(Parallel()))(settings)  # type: ignore[call-arg]
