"""Every file in examples/ runs, every command in the documents parses, and pages quote files as they are."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from conftest import ROWS

from luthier import cli
from luthier.cli import search as cli_search
from luthier.config import configure
from luthier.errors import ConfigError
from luthier.methods import METHODS
from luthier.models.sizes import SIZES
from luthier.objectives import Objective
from luthier.prepare.augment.recipe import augmentation
from luthier.search.space import read as read_space

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
RECIPES = sorted((ROOT / "examples" / "data").glob("*.yaml"))
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", *PAGES]

# What an example sets, as it is for two steps of a model of two layers on a few short rows. Only keys that the example
# has are replaced; a new one that needs a smaller value gets a line here.
SMALLER: dict[str, Any] = {
    "model.name": None,  # the small model
    "model.size": "tiny",
    "model.tokenizer": None,
    "model.vocab_size": 300,
    "model.config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2},
    "data.validation": 4,
    "data.num_proc": 1,
    "data.shuffle_buffer": 12,
    "trainable.last_layers": 1,
    "trainable.unfreeze": [{"step": 1, "last_layers": 2, "norms": True}],
    "trainable.r": 4,
    "trainable.modules_to_save": ["embed_tokens", "lm_head"],
    "trainable.ensure_weight_tying": False,  # the small model's head is not tied
    "objective.teacher": None,  # the small model, too
    "objective.num_generations": 2,
    "objective.max_completion_length": 8,
    "precision.group_size": 16,
    "precision.fake_quant_after_n_steps": 1,
    "schedule.warmup": 1,
    "schedule.decay": 1,
    "schedule.num_cycles": 1,
    "averaging.steps": 1,
    "evaluation.every": 1,
    "evaluation.generate": 2,
    "evaluation.max_new_tokens": 4,
    "evaluation.tasks": [],
    "checkpoint.every": 1,
    "monitor.report_to": ["tensorboard"],
    "monitor.log_every": 1,
    "monitor.histogram_every": 1,
    "monitor.profile_steps": [1, 2],
    "parallel.device": "cpu",
}  # fmt: skip
ALWAYS = {
    "data": {"max_length": 64}, "batch": {"examples": 2, "tokens": None, "micro_tokens": 128},
    "evaluation": {"max_new_tokens": 4}, "monitor": {"report_to": []}, "max_steps": 2, "output_dir": "run",
}  # fmt: skip


# ---------------------------------------------------------------------------- examples


def read(path: Path) -> dict:
    """An example with its short forms written out."""
    found = yaml.safe_load(path.read_text())
    for section, key in (("model", "name"), ("data", "train")):
        if isinstance(found.get(section), str | list):
            found[section] = {key: found[section]}
    return found


def write_data(example: dict, folder: Path) -> None:
    """The files that an example names, small: conversations, or texts where its method or the entry says so."""
    data = example.get("data", {})
    train = data["train"] if isinstance(data["train"], list) else [data["train"]]
    text = METHODS[example.get("method", "lora")].settings.get("data", {}).get("format") or rows_of(example)
    for entry in [*train, data.get("validation"), example.get("evaluation", {}).get("forgetting")]:
        entry = entry if isinstance(entry, dict) else {"path": entry}
        kind = entry.get("format", data.get("format", text))
        for name in entry["path"] if isinstance(entry["path"], list) else [entry["path"]]:
            if isinstance(name, str) and name != "python-docs":
                write_file(folder / name.replace("**/", "").replace("*", "part"), kind)


def rows_of(example: dict) -> str | None:
    """The kind of rows that the objective of an example learns from, where it is not text."""
    kind = {**METHODS[example.get("method", "lora")].settings["objective"], **example.get("objective", {})}["kind"]
    classes = get_args(get_args(Objective)[0])
    rows = next(c.rows for c in classes if c.model_fields["kind"].default == kind)
    return None if rows == "text" else rows


OTHER_ROWS = {  # small rows of other kinds
    "pairs": lambda row: {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["prompt"]},
    "whole_pairs": lambda row: {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["prompt"]},
    "labelled": lambda row: {"text": row["prompt"], "label": row["prompt"].split()[0]},
    "tagged": lambda row: {"tokens": row["prompt"].split(), "ner_tags": ["B-WORD", "O"]},
    "unpaired": lambda row: {**row, "label": len(row["prompt"]) % 2 == 0},
    "prompts": lambda row: {"prompt": row["prompt"], "answer": row["prompt"].split()[-1], "tests": ["assert 1 == 1"],
                            "completion": row["completion"]},
}


def write_adapters(example: dict, folder: Path, model: Path) -> None:
    """The adapters that an example names: small LoRAs of the small model."""
    entries = example["model"].get("adapters", [])
    named = [entry if isinstance(entry, str) else entry["path"] for entry in entries]
    for name in [*named, example.get("trainable", {}).get("init_from")]:
        if name is None:
            continue
        from transformers import AutoModelForCausalLM

        from luthier.trainable import saved
        from luthier.trainable.lora import LoRA

        base, config = AutoModelForCausalLM.from_pretrained(model), LoRA(r=2)  # type: ignore[call-arg]
        config.apply(base)
        with torch.no_grad():
            for tensor in config.saved(base).values():
                tensor.add_(0.01)
        (folder / name).mkdir(parents=True)
        saved.write(folder / name, base, config)


def write_file(path: Path, kind: str | None) -> None:
    known = (None, "auto", "text", "messages", "prompt_completion", *OTHER_ROWS)
    assert kind in known, f"no small rows of data.format={kind} here"
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"{row['prompt']} makes {row['completion']}." for row in ROWS]
    if not path.suffix:
        path.mkdir()
        path = path / "part.jsonl"
    if path.suffix in (".txt", ".md"):
        path.write_text("\n\n".join(texts))
    elif kind == "text":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif kind in OTHER_ROWS:
        path.write_text("".join(json.dumps(OTHER_ROWS[kind](row)) + "\n" for row in ROWS))
    elif kind == "messages":
        turns = [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]
                 for r in ROWS]  # fmt: skip
        path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def smaller(example: dict, model: Path) -> dict:
    """The overrides that make an example a matter of a second."""
    made: dict = {}
    for key, value in SMALLER.items():
        *parents, last = key.split(".")
        section: Any = example
        for part in parents:
            section = section.get(part, {}) if isinstance(section, dict) else {}
        if isinstance(section, dict) and section.get(last) is not None:
            if key in ("model.name", "objective.teacher") or (key == "model.tokenizer" and section[last] != "train"):
                value = str(model)
            elif key == "data.validation" and isinstance(section[last], str):
                continue  # a file, which is small already
            made.setdefault(parents[0], {})[last] = value
    if "early_stopping" in example or example.get("schedule", {}).get("kind") == "reduce_lr_on_plateau":
        made.setdefault("evaluation", {})["every"] = 1
    return made


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_is_a_configuration(path, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(read(path), tmp_path)
    write_adapters(read(path), tmp_path, tiny_model)
    config = configure(path)
    assert config.output_dir.startswith("runs/"), "each example has a folder of its own"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_runs(path, tiny_model, tmp_path, monkeypatch):
    from luthier.monitor import Console
    from luthier.train import train

    monkeypatch.chdir(tmp_path)
    example = read(path)
    write_data(example, tmp_path)
    write_adapters(example, tmp_path, tiny_model)
    config = configure(path, ALWAYS, smaller(example, tiny_model))
    result = train(config, Console(quiet=True))
    assert result.report["steps"] == 2
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert not [r for r in records if r["kind"] == "nonfinite"]


def test_examples_have_folders_of_their_own():
    folders = [yaml.safe_load(path.read_text())["output_dir"] for path in EXAMPLES]
    assert len(set(folders)) == len(folders)


def test_a_page_names_every_example():
    text = "".join(page.read_text() for page in PAGES)
    for path in (ROOT / "examples").rglob("*"):
        if path.is_file():
            assert path.relative_to(ROOT).as_posix() in text, path.name


# Rows on which the recipes of `luthier data` act, by a word of the name of the recipe.
PREPARED = {
    "clean": [{"review": "a fine film, write to ann.lee@web.de about it", "stars": 1}],
    "augment": [{"review": "a fine film with good actors and a long end", "stars": 1}],
    "label": [{"body": "thanks, it works"}, {"body": "it is broken"}, {"body": "when does it open?"}],
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_does_what_its_first_line_says(path, tmp_path, monkeypatch, tiny_model):
    """Where the line asks a model at an address, the recipe is read; no server is there."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(path.read_text().partition("\n")[0].removeprefix("#"))
    rows = PREPARED[path.stem.partition("_")[0]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("held-out.jsonl", "held.jsonl", "gsm8k/test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"review": "what a dull evening that was for all of us", "stars": 0}\n')
    (tmp_path / "synonyms.tsv").write_text("fine\tgood\tnice\n")
    assert words[0] == "luthier"
    assert words[-1] == path.relative_to(ROOT).as_posix()
    given = [*words[1:-1], str(path), "--quiet"]
    if "Qwen/Qwen3-0.6B" in path.read_text():
        given += ["--set", f"model={tiny_model}"]
    if "http://localhost" in path.read_text() and words[2] == "augment":
        assert augmentation(path).ways
        return
    assert cli.main(given) in (0, 8)
    assert (tmp_path / given[given.index("--out") + 1] if "--out" in given else tmp_path / given[-4]).exists()


# ---------------------------------------------------------------------------- pages


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language (a regular expression), without the fences."""
    fenced = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*$", path.read_text(), re.M | re.S)
    return [text for name, text in fenced if re.fullmatch(language, name)]


def commands(path: Path) -> list[list[str]]:
    """The arguments of every `luthier` command in a fenced block, also where torchrun starts it."""
    found = []
    for block in blocks(path, r"|sh|bash|shell|console|text"):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            started = re.match(r"(?:[A-Z_]+=\S* )*(?:torchrun .*?-m |python -m )?luthier (?=\S)", line)
            if started:
                lexer = shlex.shlex(line[started.end() :], posix=True, punctuation_chars="|>&;")
                lexer.whitespace_split = True
                words = list(lexer)
                ends = [i for i, word in enumerate(words) if set(word) <= set("|>&;")]
                found.append(words[: ends[0]] if ends else words)
    return found


ALL_COMMANDS = [(page, command) for page in DOCUMENTS for command in commands(page)]


@pytest.mark.parametrize(
    ("page", "command"), ALL_COMMANDS, ids=[f"{p.stem}: {' '.join(c)}"[:70] for p, c in ALL_COMMANDS]
)
def test_a_command_in_the_documents_is_one(page, command):
    """It parses, the files of examples/ that it names exist, and what it sets are settings."""
    try:
        options = cli._parsed(command)
    except SystemExit:  # --help and --version; what does not parse is a ConfigError
        return
    for word in command:
        if word.startswith("examples/"):
            assert (ROOT / word.partition(":")[0]).is_file(), word
    given = getattr(options, "settings", [])
    if options.verb == "search":
        given, space = cli_search.parted(given)
        assert not space or read_space(space).dimensions
    settings = [str(ROOT / s) if s.startswith("examples/") else s for s in given]
    known = [s for s in settings if "=" in s or Path(s).is_file()]
    method = getattr(options, "method", None)
    try:
        configure({"data": {"train": "owner/rows"}}, *known, method=method)
    except ConfigError as error:  # data and models are not there; all else must be right
        absent = r"does not exist|there is no such folder|matches no file|^model(\.name)?: required"
        wrong = [p for p in error.problems if not re.search(absent, p)]
        assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda p: p.stem)
def test_yaml_in_the_documents_is_of_a_file(page):
    """A block is a whole file of examples/, or consecutive lines of one, and the page names that file."""
    for block in blocks(page, "yaml|yml"):
        homes = [p for p in EXAMPLES + RECIPES if block.strip("\n") in p.read_text()]
        assert homes, f"no file of examples/ has these lines:\n{block}"
        names = [p.relative_to(ROOT).as_posix() for p in homes]
        assert any(name in page.read_text() for name in names), f"name {names[0]} beside its lines"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_of_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "steps").glob("[0-9]*.md")), ids=lambda p: p.stem)
def test_pages_of_steps_have_one_shape(page):
    text = page.read_text()
    parts = ["**What.**", "**Why.**", "## Formula and source", "## Config", "## Command", "## Measured"]
    places = [text.find(part) for part in [*parts, "## What goes wrong"]]
    assert -1 not in places, [*parts, "## What goes wrong"][places.index(-1)]
    assert places == sorted(places)
    assert 40 <= text.count("\n") <= 110


# ---------------------------------------------------------------------------- numbers that stand in pages


def test_the_table_of_sizes():
    text = (ROOT / "docs" / "steps" / "2-initialisation.md").read_text()
    for name, s in SIZES.items():
        count = s.parameters(s.vocabulary)
        row = [name, s.hidden, s.layers, f"{s.heads} / {s.key_heads}", s.intermediate, f"{s.vocabulary:,}",
               f"{s.context:,}", f"{count:,}", f"{s.vocabulary * s.hidden / count:.0%}"]  # fmt: skip
        assert "| " + " | ".join(map(str, [f"`{row[0]}`", *row[1:]])) + " |" in text


def test_the_table_of_optimisers():
    """Bytes of state for each weight, counted of a matrix of 1024 x 1024."""
    from pydantic import TypeAdapter

    from luthier.optim import Optim

    text = (ROOT / "docs" / "steps" / "5-optimiser-and-schedule.md").read_text()
    weight = torch.zeros(1024, 1024)
    kinds = [cls.model_fields["kind"].default for cls in Optim.__origin__.__args__]  # type: ignore[attr-defined]
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) \|$", text, re.M))
    assert rows.keys() == set(kinds)
    for kind in kinds:
        slots = TypeAdapter(Optim).validate_python({"kind": kind}).rule(True).slots(weight)
        taken = sum(s.numel() * s.element_size() for s in slots.values()) / weight.numel()
        assert float(rows[kind]) == pytest.approx(taken, abs=0.01), kind
