"""A small student trained alone on a few labelled rows, and distilled from a larger teacher: what of the gap is closed.

    python benchmarks/distill.py OUT                     # one seed, all sides
    python benchmarks/distill.py OUT --seeds 3 --steps 600
    python benchmarks/distill.py OUT --set objective.divergence=jsd --set objective.top_k=32

The task is the demo's: spoken commands for a home become JSON intents (2,000 rows made from Home Assistant's sentences,
200 of them held out). All networks start at random. The teacher, four layers wide 128, learns 1,700 rows. The student,
two layers wide 64, may see the answers of 100 other rows only:

- alone: the next token of these 100;
- distilled, same rows: the same rows and steps, with what the teacher says of each token beside the token;
- distilled, more prompts: as many steps over these rows and 1,700 prompts without answers, which the teacher answers;
- answers, more prompts: the same rows and answers without what the teacher says of each token (arXiv:1606.07947).

Each side takes the same number of steps of the same number of rows at the same rate, is measured six times on the way,
and each of its figures is its best one: the loss of a student alone soon rises, while its answers still get better.
Recovered is (side - alone) / (teacher - alone), in exact match and in held-out loss.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from luthier import configure, train
from luthier.config import read_run
from luthier.monitor import Console, records
from luthier.settings import merged, parse_override

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT, LABELLED = 200, 100
WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
NARROW = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
SIDES = ("alone", "distilled, same rows", "distilled, more prompts", "answers, more prompts")


def write_rows(folder: Path) -> None:
    """The demo's rows, in their order, which is random: held out, labelled, and the teacher's."""
    rows = (ROOT / "src" / "luthier" / "demo" / "home_intents.jsonl").read_text().splitlines(True)
    known = HELD_OUT + LABELLED
    parts = {"held_out": rows[:HELD_OUT], "few": rows[HELD_OUT:known], "many": rows[known:]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(part))


def settings(folder: Path, name: str, steps: int, seed: int) -> dict:
    return {
        "model": {"chat_template": "chatml"}, "seed": seed,
        "data": {"validation": str(folder / "held_out.jsonl"), "max_length": 256, "seed": seed},
        "batch": {"examples": 16, "micro_tokens": 2048}, "optim": {"learning_rate": 4e-3, "weight_decay": 0.1},
        "schedule": {"kind": "cosine", "warmup": 0.05, "min_ratio": 0.1}, "max_steps": steps,
        "evaluation": {"every": max(1, steps // 6), "generate": HELD_OUT, "generate_every": name != "teacher",
                       "max_new_tokens": 64, "batch_size": 100},
        "checkpoint": {"keep": 1}, "monitor": {"report_to": [], "log_every": 20},
        "output_dir": str(folder / name),
    }  # fmt: skip


def llama(shape: dict) -> dict:
    return {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
            "max_position_embeddings": 512} | shape  # fmt: skip


def teacher(folder: Path, steps: int) -> dict:
    """Trained once, with a tokenizer of its own rows."""
    values = merged(settings(folder, "teacher", steps, 0), {
        "model": {"config": llama(WIDE), "tokenizer": "train", "vocab_size": 1024},
        "data": {"train": str(folder / "many.jsonl")}, "optim": {"learning_rate": 3e-3},
    })  # fmt: skip
    return run(values, "full", "teacher", 0)


def student(folder: Path, side: str, steps: int, seed: int, given: list[str]) -> dict:
    place = f"{side.replace(', ', '-').replace(' ', '-')}-{seed}"
    rows = [str(folder / "few.jsonl")] + ([str(folder / "answered.jsonl")] if "more prompts" in side else [])
    values = merged(settings(folder, place, steps, seed), {
        "model": {"config": llama(NARROW), "tokenizer": str(folder / "teacher" / "tokenizer")}, "data": {"train": rows},
    })  # fmt: skip
    if "distilled" not in side:
        return run(values, "full", side, seed)
    values = merged(values, {"objective": {"teacher": str(folder / "teacher"), "alpha": 0.1}})
    for text in given:
        values = merged(values, parse_override(text))
    return run(values, "distill", side, seed)


def run(values: dict, method: str, side: str, seed: int) -> dict:
    began = time.monotonic()
    result = train(configure(values, method=method), Console(quiet=True))
    measured = [r for r in records(result.folder / "metrics.jsonl") if r["kind"] == "evaluation" and r["step"]]
    of_loss = min(measured, key=lambda r: r["loss"])
    of_answers = max((r for r in measured if "exact_match" in r), key=lambda r: r["exact_match"])
    return {
        "side": side, "seed": seed, "loss": of_loss["loss"], "loss_interval": of_loss["loss_interval"],
        "exact": of_answers["exact_match"], "exact_interval": of_answers["exact_match_interval"],
        "steps": [of_loss["step"], of_answers["step"]], "weights": result.report["trained_parameters"],
        "seconds": time.monotonic() - began,
    }  # fmt: skip


def answer(folder: Path) -> dict:
    """The teacher's answers to the prompts of rows whose own answers are not looked at."""
    from luthier.assemble import restore
    from luthier.data.dataset import open_rows
    from luthier.evaluate import answers

    began = time.monotonic()
    made, _ = restore(folder / "teacher")
    data = read_run(folder / "teacher").data
    wanted = data.model_copy(update={"train": str(folder / "many.jsonl")})
    rows, _ = open_rows(wanted, made.renderer, None, lambda text: None, print)
    found = answers(made, rows, len(rows), 64, 100)
    kept = [a for a in found if not a.truncated and a.answer]
    lines = [json.dumps({"prompt": a.prompt, "completion": a.answer}) + "\n" for a in kept]
    (folder / "answered.jsonl").write_text("".join(lines))
    return {"side": "answers", "rows": len(kept), "seconds": time.monotonic() - began}


def table(rows: list[dict]) -> str:
    lines = [
        "| | weights | exact match (95%) | of the gap | held-out loss (95%) | of the gap | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    mean = {}
    for side in (*SIDES, "teacher"):
        of_side = [r for r in rows if r["side"] == side]
        mean[side] = {key: statistics.mean(r[key] for r in of_side) for key in ("loss", "exact", "seconds", "weights")}
        for key in ("loss_interval", "exact_interval"):
            mean[side][key] = [statistics.mean(r[key][i] for r in of_side) for i in (0, 1)]
    for side, m in mean.items():
        share = {}
        for key in ("exact", "loss"):
            gap = mean["teacher"][key] - mean["alone"][key]
            share[key] = f"{(m[key] - mean['alone'][key]) / gap:.0%}" if gap else "-"
        (low, high), (least, most) = m["exact_interval"], m["loss_interval"]
        lines.append(
            f"| {side} | {m['weights']:,.0f} | {m['exact']:.3f} ({low:.3f} to {high:.3f}) | {share['exact']} | "
            f"{m['loss']:.4f} ({least:.4f} to {most:.4f}) | {share['loss']} | {m['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000, help="of each student")
    parser.add_argument("--teacher-steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="of the distilled sides")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, given = json.loads(options.one)
        made = {"teacher": teacher, "answer": answer, "student": student}[name](options.out, **given)
        print("RESULT " + json.dumps(made))
        return

    def made(name: str, **given) -> dict:
        """In a process of its own."""
        command = [sys.executable, __file__, str(options.out), "--one", json.dumps([name, given])]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(ran.stderr[-3000:])
        found = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("RESULT "))[7:])
        print(json.dumps(found), file=sys.stderr, flush=True)
        return found

    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(options.out)
    rows = [made("teacher", steps=options.teacher_steps)]
    made("answer")
    for seed in range(options.seeds):
        rows += [made("student", side=side, steps=options.steps, seed=seed, given=options.set) for side in SIDES]
    (options.out / "results.json").write_text(json.dumps(rows, indent=1))
    print(table(rows))
    assert all(math.isfinite(row["loss"]) for row in rows)


if __name__ == "__main__":
    main()
