"""Planted wrong labels in three real sets: what luthier finds, and cleanlab by the same and by usual predictions.

    pip install --no-deps cleanlab==2.9.0 termcolor tqdm     # and scikit-learn
    pip download --no-binary :all: --no-deps vaderSentiment==3.3.2
    python benchmarks/label_noise.py vaderSentiment-3.3.2.tar.gz
    python benchmarks/label_noise.py --noise 0.05 --seed 2 --only intents

Of each set a share of labels is changed: `--plant even` to another class, drawn evenly, `--plant next` of every second
class only, always to the same other one. Sets: the demo's commands (10 intents),
Debian's packages by name and description (`apt-cache dumpavail`; of six sections, of eight programming languages, and
of all), and film reviews. What is found beyond the planted rows counts against precision, also where the label was
wrong before.

`cleanlab, our predictions` has luthier's held-out probabilities. `cleanlab, scikit-learn` is the usual recipe: TF-IDF
of words and pairs, LogisticRegression(C=1), cross_val_predict with five folds. cleanlab's filter_by is its default.
Settings of luthier (threshold, prior of the noise model) were chosen with seeds 1 and 3, first on `languages`.
Each runs in a process of its own with one thread, one after the other; seconds are those of its processor, and memory
is its peak, with what it imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SECTIONS = ("perl", "python", "fonts", "localization", "rust", "golang")
OTHERS = ("haskell", "java", "javascript", "php", "ruby", "gnu-r", "ocaml", "lisp")
SIZE = 8000
FILTER = "prune_by_noise_rate"


def intents(_: Path | None) -> list[dict]:
    import luthier

    file = Path(luthier.__file__).parent / "demo/home_intents.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{"text": row["prompt"], "label": json.loads(row["completion"])["intent"]} for row in rows]


def packages(_: Path | None, sections: tuple[str, ...] = SECTIONS) -> list[dict]:
    told = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    rows = []
    for block in told.split("\n\n"):
        found = [re.search(rf"^{key}: (.*)$", block, re.M) for key in ("Package", "Section", "Description(?:-en)?")]
        if all(found):
            name, section, described = (match.group(1) for match in found if match)
            label = section.split("/")[-1]
            if not sections or label in sections:
                rows.append({"text": f"{name}: {described}", "label": label})
    return rows


def films(source: Path | None) -> list[dict]:
    if source is None:
        return []
    sys.path.insert(0, str(Path(__file__).parent))
    return [dict(row) for row in importlib.import_module("classify").rows_of(source)]


def languages(_: Path | None) -> list[dict]:
    return packages(None, OTHERS)


def sections(_: Path | None) -> list[dict]:
    return packages(None, ())


SETS = {"intents": intents, "packages": packages, "languages": languages, "sections": sections, "films": films}


def planted(rows: list[dict], noise: float, seed: int, plant: str = "even") -> list[int]:
    """Change labels in place; which rows they are."""
    rng, names = random.Random(seed), sorted({row["label"] for row in rows})
    near = dict(zip(names, [*names[1:], names[0]]))
    able = [i for i, row in enumerate(rows) if plant == "even" or row["label"] in names[::2]]
    chosen = sorted(rng.sample(able, min(len(able), round(noise * len(rows)))))
    for i in chosen:
        own = rows[i]["label"]
        rows[i]["label"] = near[own] if plant == "next" else rng.choice([name for name in names if name != own])
    return chosen


# ---------------------------------------------------------------------------- contestants: (rows found, seconds)


def cpu() -> float:
    """Seconds of processors that this process and its children have used, whatever else the machine does."""
    return sum(os.times()[:4])


def by_luthier(file: Path, keep: Path) -> tuple[list[int], float]:
    """The whole audit by this check, with reading and writing."""
    from luthier.prepare.audit import audit
    from luthier.prepare.checks.label_noise import LabelNoise
    from luthier.prepare.recipe import recipe

    decide = LabelNoise._wrong
    last: dict[str, Any] = {}

    def seen(self, given, probabilities):  # the predictions, for the contestant that is given the same
        last.update(labels=given, probabilities=probabilities)
        return decide(self, given, probabilities)

    LabelNoise._wrong = seen
    began = cpu()
    with tempfile.TemporaryDirectory() as folder:
        audit(str(file), Path(folder), recipe({"checks": {"label_noise": {}}}), workers=1)
        found = [json.loads(line)["row"] for line in (Path(folder) / "findings.jsonl").read_text().splitlines()]
    seconds = cpu() - began
    import numpy as np

    np.savez(keep, **last)
    return found, seconds


def by_cleanlab(file: Path, keep: Path) -> tuple[list[int], float]:
    import numpy as np
    from cleanlab.filter import find_label_issues

    with np.load(keep) as given:
        labels, probabilities = given["labels"], given["probabilities"]
    began = cpu()
    found = np.flatnonzero(find_label_issues(labels, probabilities, filter_by=FILTER, n_jobs=1))
    return found.tolist(), cpu() - began


def by_usual(file: Path, keep: Path) -> tuple[list[int], float]:
    import numpy as np
    from cleanlab.filter import find_label_issues
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline

    began = cpu()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    names = sorted({row["label"] for row in rows})
    labels = np.array([names.index(row["label"]) for row in rows])
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    probabilities = cross_val_predict(model, [row["text"] for row in rows], labels, cv=5, method="predict_proba")
    found = np.flatnonzero(find_label_issues(labels, probabilities, filter_by=FILTER, n_jobs=1))
    return found.tolist(), cpu() - began


CONTESTANTS = {
    "luthier": by_luthier,
    "cleanlab, our predictions": by_cleanlab,
    "cleanlab, scikit-learn": by_usual,
}


def contest(name: str, file: Path, keep: Path) -> None:
    """In a process of its own: what was found, as JSON on the last line."""
    found, seconds = CONTESTANTS[name](file, keep)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print("\n" + json.dumps({"found": found, "seconds": seconds, "gigabytes": peak / 1e9}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="vaderSentiment-3.3.2.tar.gz; without it, no films")
    parser.add_argument("--noise", type=float, default=0.08)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--plant", choices=("even", "next"), default="even")
    parser.add_argument("--only", choices=SETS)
    parser.add_argument("--contestant", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        name, file, keep = options.contestant
        contest(name, Path(file), Path(keep))
        return
    print("| set | rows | planted | by | found | recall | precision | CPU s | peak GB |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for which in [options.only] if options.only else SETS:
        rows = SETS[which](options.source)
        random.Random(0).shuffle(rows)
        rows = rows[:SIZE]
        if not rows:
            continue
        bad = set(planted(rows, options.noise, options.seed, options.plant))
        with tempfile.TemporaryDirectory() as folder:
            file, keep = Path(folder) / "rows.jsonl", Path(folder) / "given.npz"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            for name in CONTESTANTS:
                command = [sys.executable, __file__, "--contestant", name, str(file), str(keep)]
                ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                if ran.returncode:
                    sys.exit(ran.stderr[-3000:])
                told = json.loads(ran.stdout.splitlines()[-1])
                found = set(told["found"])
                right = len(found & bad)
                print(
                    f"| {which} | {len(rows):,} | {len(bad):,} | {name} | {len(found):,} | {right / len(bad):.3f} | "
                    f"{right / max(1, len(found)):.3f} | {told['seconds']:.1f} | {told['gigabytes']:.2f} |", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
