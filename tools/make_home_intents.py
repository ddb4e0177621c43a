"""Samples the demo's data set, home commands and their slots as JSON, from Home Assistant's sentence templates.

    pip install home-assistant-intents==2026.10.27 hassil==3.12.1
    python tools/make_home_intents.py              # writes src/luthier/demo/home_intents.jsonl

The templates come from home-assistant-intents, hassil parses them, and this script picks among their alternatives.
The same packages and seed give the same bytes. A completion is a function of its sentence, and every slot's value
stands in the sentence as written. Rows come in rounds, each with one row of every intent in a random order, so that
any stretch of the file is balanced.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hassil import expression as nodes
from hassil.parse_expression import parse_sentence
from home_assistant_intents import get_intents

OUTPUT = Path(__file__).resolve().parents[1] / "src/luthier/demo/home_intents.jsonl"
VERSIONS = {"home-assistant-intents": "2026.10.27", "hassil": "3.12.1"}
SEED = 2026
ROWS_PER_INTENT = 200
MOST_SLOTS = 2
ATTEMPTS = 50  # at a natural, new sentence of one template, so that no template is rare for being often odd

# Every intent and the slots that each of its sentences fills. Without a name, "turn on the lamp in the kitchen" would
# also be a command to all the kitchen's lights.
INTENTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("HassTurnOn", "HassTurnOff"), ("area", "name")),
    **dict.fromkeys(("HassLightSet", "HassClimateSetTemperature", "HassClimateGetTemperature"), ("area",)),
    **dict.fromkeys(("HassSetVolume", "HassMediaPause", "HassMediaNext", "HassFanSetSpeed"), ("area",)),
    "HassStartTimer": (),
}

AREAS = (
    "attic", "basement", "bathroom", "bedroom", "den", "dining room", "garage", "guest room", "gym", "hallway",
    "kitchen", "laundry room", "library", "living room", "nursery", "office", "pantry", "playroom", "study", "sunroom",
)  # fmt: skip
# The devices of a block of templates, by a domain that the block asks for; blocks for other domains are left out.
NAMES: dict[str, Sequence[str]] = {
    "switch": (
        "air conditioner", "air purifier", "ceiling fan", "ceiling light", "dehumidifier", "fan", "floor lamp",
        "heater", "humidifier", "lamp", "light", "lights", "night light", "radio", "reading light", "speaker",
        "spotlight", "stereo", "string lights", "tv",
    ),
    "cover": ("blinds", "curtains", "shades", "shutters"),
    "lock": ("cabinet", "door", "safe", "window"),
}  # fmt: skip
# Templates with any other list are left out.
LISTS: dict[str, Sequence[str | int]] = {
    "area": AREAS,
    "brightness": range(5, 101, 5),
    "color": ("blue", "green", "orange", "pink", "purple", "red", "turquoise", "white", "yellow"),
    "fan_speed": range(5, 101, 5),
    "temperature": (*range(15, 31), *range(60, 81)),
    "timer_hours": range(1, 13),
    "timer_minutes": range(1, 60),
    "timer_name": (
        "bread", "cake", "chicken", "coffee", "cookies", "eggs", "homework", "laundry", "meeting", "nap", "pasta",
        "pizza", "rice", "soup", "tea", "workout",
    ),
    "timer_seconds": range(5, 60, 5),
    "volume": range(5, 101, 5),
}  # fmt: skip

# The package's rules accept anything a person might say; these keep to what most would.
RULES = {
    "all": "(all|all [of] (the|my)|every)",
    "close": "(close|shut|lower)",
    "how_is": "(how is|how's)",
    "in": "in",
    "numeric_value_set": "(set|change|turn (up|down)|increase|decrease)",
    "open": "(open|raise)",
    "the": "(the|the|the|my)",
    "turn": "(turn|switch)",
    "what_is": "(what's|what is|tell me)",
}
# Likewise for the templates: what reads badly when left out is always there, and what reads badly is not.
TEMPLATE_EDITS = (
    *((f"[{word}]", word) for word in ("<turn>", "<set>", "<numeric_value_set>", "<in>", "in", "of")),
    ("[to] on", "on"),
    ("[to] off", "off"),
    ("[to] {brightness", "to {brightness"),
    ("[to] {fan_speed", "to {fan_speed"),
    ("{area} [<the>] {name}", "{area} {name}"),
    ("{area} [current] <temp>", "{area} <temp>"),
    ("fan[s] (in|on)", "fan[s] in"),
    ("[track|item]", "[track]"),
    ("show[s]", "show"),
    ("player[s]", "player"),
    ("([ ]%)", "%"),
    ("([ ]°)", "°"),
    ("degree[s]", "degrees"),
)
ARTICLES = {"<the>", "the", "a"}
ODD = tuple(
    re.compile(pattern)
    for pattern in (
        r"\bevery (lights|lamps|lighting)\b|\ball (of )?((the|my) )?(light|lamp)\b",
        r"^make .*\bto\b",
        r"^(set|change) (?!.*(\bto\b|\btimer\b))",
        r"\bcolor\b(?!.*\bto\b)",
        r"\bmy\b.*\bmy\b",
        r"\bof fan\b|\bfans speed\b|\bturn (the )?(speed|color)\b",
        r"\d brightness\b|\b(up|down|increase|decrease) .*\d.* brightness\b",
        r"\b(down|decrease)\b.*\b100\b|\b(up|increase)\b.*\b5\b",
        r"^in .* skip$",
        # Numbers: "1 hour", "2 hours", "a 2 hour timer", "a 2-hour timer", "an 8 minute timer".
        r"\b1 (hours|minutes|seconds)\b",
        r"\b(?!1\b)\d+ (hour|minute|second)\b(?! timer)",
        r"\d (hours|minutes|seconds) timer",
        r"\d-(hour|minute|second)(?! timer)",
        r"\ba (8|11|18)\b|\ban (?!(8|11|18)\b)",
        r"\bhours?\b.*\bseconds?\b",
        r"\b(set|start|create) (the|my) \d|\bcreate (the|my)\b",
        r"\d[ -](hour|minute)s? (and )?\d.* timer",
    )
)


@dataclass(frozen=True)
class Template:
    expression: nodes.Expression
    lists: dict[str, Sequence[str | int]]


class Sampler:
    """Picks one sentence of a template at random, with the slots that it names."""

    def __init__(self, rules: dict[str, nodes.Expression], rng: random.Random) -> None:
        self.rules = rules
        self.rng = rng

    def sample(self, template: Template) -> tuple[str, dict[str, str | int]]:
        slots: dict[str, str | int] = {}
        text = self._expand(template.expression, template.lists, slots)
        return " ".join(text.split()), slots

    def _expand(
        self, node: nodes.Expression, lists: dict[str, Sequence[str | int]], slots: dict[str, str | int]
    ) -> str:
        if isinstance(node, nodes.TextChunk):
            return node.original_text
        if isinstance(node, nodes.RuleReference):
            return self._expand(self.rules[node.rule_name], lists, slots)
        if isinstance(node, nodes.ListReference):
            value = slots[node.slot_name] = self.rng.choice(lists[node.list_name])
            return str(value)
        if isinstance(node, nodes.Alternative):
            items = node.items
            if node.is_optional:
                items = [item for item in items if not (isinstance(item, nodes.TextChunk) and item.is_empty)]
                if self.rng.random() >= (0.9 if _first_word(items[0]) in ARTICLES else 0.5):
                    return ""
            return self._expand(self.rng.choice(items), lists, slots)
        if isinstance(node, nodes.Permutation):
            return " ".join(self._expand(item, lists, slots) for item in self.rng.sample(node.items, len(node.items)))
        if isinstance(node, nodes.Sequence):
            return "".join(self._expand(item, lists, slots) for item in node.items)
        raise TypeError(f"no rule to expand {type(node).__name__}")


def _first_word(node: nodes.Expression) -> str:
    while isinstance(node, (nodes.Sequence, nodes.Alternative, nodes.Permutation)):
        node = node.items[0]
    if isinstance(node, nodes.RuleReference):
        return f"<{node.rule_name}>"
    return node.original_text.strip() if isinstance(node, nodes.TextChunk) else ""


def templates_of(blocks: list[dict[str, Any]], needed: Sequence[str]) -> list[Template]:
    """The templates of one intent that fill the needed slots, and with no list but those here."""
    templates = []
    for block in blocks:
        domains = block.get("requires_context", {}).get("domain", ())
        names = next((NAMES[domain] for domain in NAMES if domain in domains), None)
        lists = LISTS if names is None else {**LISTS, "name": names}
        for text in block["sentences"]:
            for old, new in TEMPLATE_EDITS:
                text = text.replace(old, new)
            sentence = parse_sentence(text)
            used = set(sentence.list_names())
            if set(needed) <= used <= set(lists) and len(used) <= MOST_SLOTS:
                templates.append(Template(sentence.expression, lists))
    return templates


def is_natural(name: str, sentence: str) -> bool:
    if name == "HassLightSet" and re.search(r"\d", sentence) and not re.search(r"light|lamp|brightness", sentence):
        return False  # "turn down the kitchen to 20" may be the volume or the temperature
    if name == "HassSetVolume" and "volume" not in sentence:
        return False
    return not any(pattern.search(sentence) for pattern in ODD)


def make_rows(seed: int = SEED) -> list[dict[str, str]]:
    rng = random.Random(seed)
    package = get_intents("en")
    assert package is not None
    rules = {
        name: parse_sentence(RULES.get(name, text)).expression for name, text in package["expansion_rules"].items()
    }
    sampler = Sampler(rules, rng)
    completions: dict[str, str] = {}
    columns: list[list[str]] = []
    for name, needed in INTENTS.items():
        templates = templates_of(package["intents"][name]["data"], needed)
        column: list[str] = []
        while len(column) < ROWS_PER_INTENT:
            template = rng.choice(templates)
            for _ in range(ATTEMPTS):
                sentence, slots = sampler.sample(template)
                if is_natural(name, sentence) and sentence not in column:
                    break
            else:
                continue
            completion = json.dumps({"intent": name.removeprefix("Hass"), **dict(sorted(slots.items()))})
            if completions.setdefault(sentence, completion) != completion:
                raise SystemExit(f"two meanings of {sentence!r}: {completions[sentence]} and {completion}")
            column.append(sentence)
        rng.shuffle(column)
        columns.append(column)
    rounds = [rng.sample(sentences, len(sentences)) for sentences in zip(*columns, strict=True)]
    return [{"prompt": sentence, "completion": completions[sentence]} for sentences in rounds for sentence in sentences]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default=OUTPUT)
    output: Path = parser.parse_args().output
    for package, wanted in VERSIONS.items():
        if version(package) != wanted:
            raise SystemExit(f"{package} is {version(package)}; the data set needs {wanted}")
    rows = make_rows()
    output.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"{output}: {len(rows)} rows, {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
