"""Preferences on real models and honest rows: held-out accuracy before and after, side by side with TRL if asked.

    python benchmarks/preference.py                      # DPO of SmolLM2 on the demo's commands, 60 steps of 8 pairs
    python benchmarks/preference.py --method kto --trl   # the same rows, order and steps through TRL's trainer, too
    python benchmarks/preference.py --task ruff          # Python that ruff would change, against what it asks for
    python benchmarks/preference.py --rows pairs.jsonl   # write the rows only, as examples/dpo.yaml reads them

Task `intents`: a command of `luthier demo` and its JSON, against the same JSON with another of the ten intents, drawn
by a seed. Task `ruff`: what a rule of `ruff rule --all` is about, its example put right against the example. Held-out
rows are drawn by their number. `logps` accuracy: the better answer is the likelier one, which can be asked of the base,
too; `rewards` accuracy: it has gained more than the worse one, for which the base has 0.5. Memory is the process's
peak.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

METHODS = ("dpo", "simpo", "orpo", "cpo", "kto")
RATES = {"dpo": 5e-4, "kto": 5e-4, "simpo": 2e-4, "orpo": 1e-3, "cpo": 2e-4}
INTENTS = Path(__file__).resolve().parents[1] / "src/luthier/demo/home_intents.jsonl"
RANK, ALPHA, EXAMPLES = 8, 16, 8


# ---------------------------------------------------------------------------- rows


def intents(seed: int) -> list[dict]:
    """Commands with their JSON, and with the JSON of another intent."""
    rows = [json.loads(line) for line in INTENTS.read_text(encoding="utf-8").splitlines()]
    rng, known = random.Random(seed), sorted({json.loads(row["completion"])["intent"] for row in rows})
    made = []
    for row in rows:
        right = json.loads(row["completion"])
        wrong = right | {"intent": rng.choice([intent for intent in known if intent != right["intent"]])}
        made.append({"prompt": row["prompt"], "chosen": json.dumps(right), "rejected": json.dumps(wrong)})
    rng.shuffle(made)
    return made


def ruff(seed: int) -> list[dict]:
    """Of each rule that has them: its summary, the code to use instead, the code that it finds."""
    ran = subprocess.run(["ruff", "rule", "--all", "--output-format", "json"], capture_output=True, check=True)
    made = []
    for rule in json.loads(ran.stdout):
        found = re.search(r"## Example\n+```(?:python|py)\n(.*?)```\n+Use instead:\n+```(?:python|py)\n(.*?)```",
                          rule["explanation"], re.S)  # fmt: skip
        if found and found[1].strip() != found[2].strip():
            asked = f"Write Python as this rule wants it: {rule['summary']}."
            made.append({"prompt": asked, "chosen": found[2].strip(), "rejected": found[1].strip()})
    random.Random(seed).shuffle(made)
    return made


def rows_of(task: str, method: str, seed: int) -> list[dict]:
    pairs = {"intents": intents, "ruff": ruff}[task](seed)
    if method != "kto":
        return pairs
    rng = random.Random(seed)  # of each pair one answer, as in life
    liked = [rng.random() < 0.5 for _ in pairs]
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
        for row, good in zip(pairs, liked)
    ]


# ---------------------------------------------------------------------------- contestants, a process each


def config_of(job: dict) -> Any:
    from luthier import configure

    return configure(
        {
            "model": job["model"], "data": {"train": job["data"], "validation": job["held_out"], "max_length": 512},
            "trainable": {"kind": "lora", "r": RANK, "lora_alpha": ALPHA},
            "optim": {"learning_rate": job["rate"]}, "schedule": {"kind": "linear", "warmup": 0},
            "batch": {"examples": EXAMPLES, "micro_tokens": 2048}, "max_steps": job["steps"],
            "monitor": {"report_to": []}, "output_dir": job["folder"], "checkpoint": {"best": False, "keep": 1},
        },
        {"objective": job["objective"]}, method=job["method"],
    )  # fmt: skip


def prepare(job: dict) -> None:
    """The model as a folder that both load, and the rows in the order in which luthier learns them."""
    import torch

    from luthier.cli import demo
    from luthier.models.gguf import read_model, read_tokenizer
    from luthier.models.names import CHATML
    from luthier.monitor import Console
    from luthier.train import Trainer

    tokenizer = read_tokenizer(Path(demo.model_path()))
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(job["model"])
    read_model(Path(demo.model_path()), torch.float32).save_pretrained(job["model"])
    if not job["trl"]:
        return
    trainer = Trainer(config_of(job | {"folder": job["folder"] + "-plan"}), Console(quiet=True))
    assert trainer.validation is not None
    order = {
        "train": [trainer.training.documents[d].row for step in trainer.steps for row in step for d in row],
        "held_out": [document.row for document in trainer.validation.documents],
    }
    Path(job["order"]).write_text(json.dumps(order))


def of_luthier(job: dict) -> dict:
    from luthier import train
    from luthier.monitor import Console, memory_gb, records

    began = time.monotonic()
    result = train(config_of(job), Console())
    taken = [r for r in records(result.folder / "metrics.jsonl") if r["kind"] == "train"]
    return {
        "figures": result.report["figures"], "seconds": sum(r["seconds"] for r in taken), "memory": memory_gb(),
        "all": time.monotonic() - began, "losses": [r["loss"] for r in taken],
    }  # fmt: skip


def of_trl(job: dict) -> dict:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    from luthier.monitor import memory_gb

    Config, Trainer = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer)}[job["method"]]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32")
    rows = [json.loads(line) for line in Path(job["data"]).read_text(encoding="utf-8").splitlines()]
    order = json.loads(Path(job["order"]).read_text())

    def asked(row: dict) -> dict:
        turns = [{"role": "user", "content": row["prompt"]}]
        return row | {"prompt": tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)}

    train, held_out = (Dataset.from_list([asked(rows[i]) for i in order[name]]) for name in ("train", "held_out"))
    arguments = Config(
        output_dir=job["folder"], per_device_train_batch_size=EXAMPLES, per_device_eval_batch_size=EXAMPLES,
        max_steps=job["steps"], learning_rate=job["rate"], lr_scheduler_type="linear", warmup_steps=0, max_length=512,
        beta=job["objective"].get("beta", 0.1), logging_steps=1, save_strategy="no", report_to=[], bf16=False,
        use_cpu=True, gradient_checkpointing=False, train_sampling_strategy="sequential", max_grad_norm=1.0,
        disable_tqdm=True, weight_decay=0.0,
    )  # fmt: skip
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Trainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer,
        peft_config=adapter,
    )  # fmt: skip
    began = time.monotonic()
    trainer.train()
    seconds, memory = time.monotonic() - began, memory_gb()
    found = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    return {"figures": found, "seconds": seconds, "memory": memory, "losses": losses}


CONTESTANTS = {"prepare": prepare, "luthier": of_luthier, "trl": of_trl}


def started(name: str, job: dict) -> Any:
    ran = subprocess.run([sys.executable, __file__, "--one", name, json.dumps(job)], stdout=subprocess.PIPE, text=True)
    found = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if ran.returncode or not found:
        raise SystemExit(f"{name} failed")
    return json.loads(found[-1].removeprefix("RESULT "))


# ---------------------------------------------------------------------------- the table


def row_of(job: dict, found: dict) -> str:
    def both(name: str, digits: int = 3) -> str:
        figure = found["figures"].get(name)
        if figure is None:
            return "-"
        low, high = figure["tuned_interval"]
        return f"{figure['base']:.{digits}f} -> {figure['tuned']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    return (
        "| method | task | steps | logps accuracy | per token | rewards accuracy | margin | loss | time | memory |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        f"| {job['method']} | {job['task']} | {job['steps']} x {EXAMPLES} | {both('logps/accuracies')} | "
        f"{both('logps/accuracies_norm')} | {both('rewards/accuracies')} | {both('rewards/margins', 2)} | "
        f"{both('loss')} | {found['seconds']:.0f} s ({found['all']:.0f} s in all) | {found['memory']:.2f} GB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="dpo")
    parser.add_argument("--task", choices=("intents", "ruff"), default="intents")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--beta", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trl", action="store_true", help="TRL's trainer on the same rows in the same order")
    parser.add_argument("--rows", metavar="FILE", help="write the rows there and end")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--keep", metavar="FOLDER", help="keep the runs there")
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(CONTESTANTS[options.one[0]](json.loads(options.one[1]))))
        return
    rows = "".join(json.dumps(row) + "\n" for row in rows_of(options.task, options.method, options.seed))
    if options.rows:
        Path(options.rows).write_text(rows, encoding="utf-8")
        return
    if options.trl and options.method not in ("dpo", "kto"):
        parser.error("--trl is for dpo and kto")
    with nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory() as root:
        Path(root).mkdir(parents=True, exist_ok=True)
        job = {
            "method": options.method, "task": options.task, "steps": options.steps, "held_out": options.held_out,
            "rate": options.rate or RATES[options.method], "data": f"{root}/rows.jsonl", "model": f"{root}/model",
            "order": f"{root}/order.json", "folder": f"{root}/run", "trl": options.trl,
            "objective": {"beta": options.beta} if options.beta else {},
        }  # fmt: skip
        Path(job["data"]).write_text(rows, encoding="utf-8")
        started("prepare", job)
        ours = started("luthier", job)
        print(row_of(job, ours), flush=True)
        if options.trl:
            theirs = started("trl", job | {"folder": f"{root}/trl"})
            figures = theirs["figures"]
            right = f"rewards accuracy {figures['rewards/accuracies']:.3f}, " if options.method == "dpo" else ""
            print(
                f"\nTRL: loss {figures['loss']:.4f}, {right}"
                f"margin {figures['rewards/margins']:.2f}, {theirs['seconds']:.0f} s, {theirs['memory']:.2f} GB\n"
                f"luthier / TRL: time {ours['seconds'] / theirs['seconds']:.2f}, "
                f"memory {ours['memory'] / theirs['memory']:.2f}\n"
                f"training loss, mean of the last five steps: {statistics.mean(ours['losses'][-5:]):.4f} and "
                f"{statistics.mean(theirs['losses'][-5:]):.4f}"
            )


if __name__ == "__main__":
    main()
