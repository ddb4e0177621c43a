"""The card of an export: what it is, from which data and settings, what was measured, how it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from . import __version__
from .config import Config
from .models.names import ready_made
from .precision import NF4, Reduced
from .trainable import adapter_files
from .trainable.adapter import Adapting

PIPELINES = {"tokens": "text-generation", "text": "text-classification", "each": "token-classification"}
CLASSES = {
    "tokens": "AutoModelForCausalLM", "text": "AutoModelForSequenceClassification",
    "each": "AutoModelForTokenClassification",
}  # fmt: skip


def of_luthier_alone(config: Config) -> bool:
    """Whether no other tool knows what a run trained, or what lies beneath it."""
    beneath = [adapter_files.read(entry.path).settings for entry in config.model.beneath]
    kind = config.trainable.peft_type if isinstance(config.trainable, Adapting) else ""
    return kind.startswith("LUTHIER_") or not all(settings.mergeable for settings in beneath)


def peft_reads(config: Config) -> bool:
    """Whether PEFT can run it: a prefix it gives to models by `past_key_values`, which classifiers of transformers have
    no more from 5.24 on."""
    return config.trainable.kind != "prefix" or config.objective.ends_in == "tokens"


def card(config: Config, run: Path, kind: str, base: str | None, compared: dict) -> str:
    """README.md: what it is, from which data and settings, and what was measured."""
    report = json.loads((run / "report.json").read_text()) if (run / "report.json").exists() else {}
    base_name = config.model.name if not config.model.name.endswith(".gguf") else Path(config.model.name).name
    random = config.model.starts_at_random  # then it has no base model
    title = f"{run.name} ({config.method})" if random else f"{base_name}, fine-tuned ({config.method})"
    named = [] if random else [f"base_model: {base_name}"]
    purpose = f"pipeline_tag: {PIPELINES[config.objective.ends_in]}"
    front = ["---", *named, "library_name: " + _library(config, kind), purpose, "tags:", "- luthier",
             f"- {config.method}", "---"]  # fmt: skip
    lines = [
        *front, "", f"# {title}", "",
        f"Made with Luthier {__version__} from `{config.data.train}`.", *_stacked(config, kind), "", "## Figures", "",
    ]  # fmt: skip
    if "held_out_loss" in report:
        lines += [
            f"- held-out loss: base {report['held_out_loss']['base']:.4f}, tuned {report['held_out_loss']['tuned']:.4f}"
        ]
    for key in ("accuracy", "f1_macro", "entity_f1", "mcc", "pearson"):
        figure = report.get("figures", {}).get(key, {})
        if None not in (figure.get("base"), figure.get("tuned"), figure.get("tuned_interval")):
            low, high = figure["tuned_interval"]
            lines.append(
                f"- {key.replace('_', ' ')} on {report['held_out_rows']} held-out rows: base {figure['base']:.3f}, "
                f"tuned {figure['tuned']:.3f} (95% interval {low:.3f} to {high:.3f})"
            )
    if "answers" in report:
        base_figures, tuned = report["answers"]["base"], report["answers"]["tuned"]
        low, high = tuned["exact_match_interval"]
        lines += [
            f"- exact match on {tuned['rows']} held-out rows: base {base_figures['exact_match']:.3f}, tuned "
            f"{tuned['exact_match']:.3f} (95% interval {low:.3f} to {high:.3f})"
        ]
    lines += [
        f"- steps {report.get('steps', 'unknown')}, tokens {report.get('tokens', 'unknown')}",
        f"- loaded again in a fresh process: {compared['compared']} "
        f"differ by at most {compared['largest_difference']:.2e} from the trained model's",
        "", "## Loading", "", "```python", *_loading(config, kind, base), "```", "", *_numbers(config, kind),
        "## Configuration", "", "```yaml",
        config.dump().rstrip(), "```", "",
    ]  # fmt: skip
    return "\n".join([*lines])


def plain_card(name: str, compared: dict) -> str:
    """README.md of a model that was exported and is no run."""
    shown = name.rstrip("/").rsplit("/", 1)[-1]
    return "\n".join([
        "---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", f"# {shown}", "",
        f"Written by Luthier {__version__} from `{shown}`. Loaded again in a fresh process: {compared['compared']} "
        f"differ by at most {compared['largest_difference']:.2e}.", "",
        "```python", *_whole("tokens"), "```", "",
    ])  # fmt: skip


def _whole(ends_in: str) -> list[str]:
    """Python that loads a folder with a whole model."""
    here, auto = '"path/of/this/folder"', CLASSES[ends_in]
    imports = f"from transformers import {auto}, AutoTokenizer"
    return [imports, "", f"model = {auto}.from_pretrained({here})", _tokenizer(here)]


def _library(config: Config, kind: str) -> str:
    if kind != "adapter":
        return "transformers"
    return "luthier" if of_luthier_alone(config) else "peft"


def _stacked(config: Config, kind: str) -> list[str]:
    """On which saved adapters it was trained."""
    told = [f"`{e.name}` ({e.path}" + (f", share {e.share:g})" if e.share != 1 else ")") for e in config.model.beneath]
    if not told:
        return []
    where = "They are merged, too." if kind == "merged" else "Load them first: alone it answers otherwise than trained."
    return ["", f"It was trained on top of these adapters, which were frozen: {', '.join(told)}. {where}"]


def _numbers(config: Config, kind: str) -> list[str]:
    """What is to be known of a model that was trained over weights in fewer bits, or that PEFT may not run."""
    if kind == "adapter" and not peft_reads(config):
        return ["PEFT runs a prefix before a classifier with transformers before 5.24 only; Luthier with any.", ""]
    precision = config.precision
    if not isinstance(precision, Reduced):
        return []
    if kind == "merged":
        return [f"Its weights are those in {precision.kind} that it was trained over, with the adapter in them.", ""]
    return [
        f"The adapter was trained over weights in {precision.kind}, and was compared over the same. Over weights in 16 "
        "or 32 bits it answers a little differently.", "",
    ]  # fmt: skip


def _loading(config: Config, kind: str, base: str | None) -> list[str]:
    """Python that loads the folder."""
    here = '"path/of/this/folder"'
    auto = CLASSES[config.objective.ends_in]
    imports, given, then = [f"from transformers import {auto}, AutoTokenizer"], "", []
    if kind != "adapter":
        return _whole(config.objective.ends_in)
    if config.objective.ends_in != "tokens":
        given = f", num_labels={len(config.objective.scores)}"
    precision = config.precision
    if config.model.new_tokens:
        then = ["model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings))"]
    if config.model.beneath or of_luthier_alone(config):
        imports.append("from luthier import adapters")
        for entry in config.model.beneath:
            share = "" if entry.share == 1 else f", share={entry.share:g}"
            then.append(f'adapters.load(model, "{entry.path}"{share})')
        then.append(f"adapters.load(model, {here})")
    else:
        imports.append("from peft import PeftModel")
        then.append(f"model = PeftModel.from_pretrained(model, {here})")
        if isinstance(precision, NF4) and precision.block_size == 64 and not ready_made(config.model):
            imports[0] += ", BitsAndBytesConfig"
            imports += [
                "", "four_bits = BitsAndBytesConfig(",
                '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16",',
                f"    bnb_4bit_use_double_quant={precision.double_quant},", ")",
            ]  # fmt: skip
            given += ", quantization_config=four_bits"
    return [*imports, "", _tokenizer(here), f'model = {auto}.from_pretrained("{base}"{given})', *then]


def _tokenizer(here: str) -> str:
    return f"tokenizer = AutoTokenizer.from_pretrained({here})"
