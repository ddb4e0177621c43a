"""The demo's task with every named method that learns from conversations: one table, side by side, one machine.

    python benchmarks/methods.py                          # all of them, a process each
    python benchmarks/methods.py lora qlora --seeds 3     # some of them, with other first values
    python benchmarks/methods.py prefix --rates 1e-3 1e-2 3e-2   # a rate is chosen by held-out loss, not by answers

Model, rows, held-out rows and steps are those of `luthier demo` (80 steps of 8 rows; --steps for more). Each line:
exact match on 200 held-out commands, held-out loss, parameters that move, peak memory, tokens per second of training,
and the size of what is exported. Memory is the GPU's, or on a CPU the process's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from luthier import configure, train
from luthier.cli.demo import model_path, settings
from luthier.methods import METHODS
from luthier.monitor import Console, memory_gb, records
from luthier.settings import merged
from luthier.trainable.adapter import Adapting

RATES = {  # found with --rates on the same rows, by held-out loss
    "full": 1e-4, "partial": 1e-3, "qat": 3e-4, "prefix": 1e-1, "prompt": 3e-2, "p_tuning": 3e-3, "ia3": 3e-2,
} | dict.fromkeys(("lora", "dora", "qlora", "qdora", "qat-lora", "bottleneck"), 2e-3)  # fmt: skip
EXTRA: dict[str, dict] = {"partial": {"trainable": {"last_layers": 4}}}
RANK = {"trainable": {"r": 8, "lora_alpha": 16}}


def chat_methods() -> list[str]:
    return [m.name for m in METHODS.values() if not m.settings.get("data") and not m.settings.get("model")]


def one(method: str, rate: float, seed: int, steps: int, model: str, folder: Path, answers: bool) -> dict:
    given = settings(model, folder)
    del given["trainable"], given["optim"]
    low_rank = METHODS[method].kinds["trainable"] in ("lora", "dora")
    changes = {
        "optim": {"learning_rate": rate}, "seed": seed, "max_steps": steps, "monitor": {"report_to": []},
        "epochs": 1, "checkpoint": {"every": None}, "evaluation": {} if answers else {"generate": 0},
        "parallel": {"compile": False},  # so short a run does not pay for it
    }  # fmt: skip
    values = merged(merged(given, changes), RANK if low_rank else {})
    config = configure(merged(values, EXTRA.get(method, {})), method=method)
    result = train(config, Console(quiet=True))
    peak = memory_gb()
    steps_of = [r for r in records(folder / "metrics.jsonl") if r["kind"] == "train"][5:]
    speed = sum(r["tokens"] for r in steps_of) / sum(r["seconds"] for r in steps_of)
    kind = "adapter" if isinstance(config.trainable, Adapting) else "full"
    kind = "quantised" if config.precision.kind == "qat" else kind
    report, weights = result.report, 0
    if answers:
        result.export(folder / "out", kind)
        weights = sum(p.stat().st_size for p in (folder / "out").glob("*.safetensors"))
    made = {
        "method": method, "rate": rate, "seed": seed, "steps": report["steps"],
        "loss": report["held_out_loss"]["tuned"], "trained": report["trained_parameters"], "peak_gb": peak,
        "tokens_per_second": speed, "exported": kind, "megabytes": weights / 1e6,
    }  # fmt: skip
    if answers:
        made |= {"exact_match": report["answers"]["tuned"]["exact_match"],
                 "interval": report["answers"]["tuned"]["exact_match_interval"]}  # fmt: skip
    return made


def table(rows: list[dict]) -> str:
    lines = [
        "| method | exact match (95%) | held-out loss | parameters that move | peak memory | tokens/s | on disk |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        same = [row for row in rows if row["method"] == method]
        mean = {key: statistics.mean(r[key] for r in same) for key, v in same[0].items() if isinstance(v, int | float)}
        low, high = (statistics.mean(r["interval"][i] for r in same) for i in (0, 1))
        lines.append(
            f"| {method} | {mean['exact_match']:.3f} ({low:.3f} to {high:.3f}) | {mean['loss']:.4f} | "
            f"{same[0]['trained']:,} | {mean['peak_gb']:.2f} GB | {mean['tokens_per_second']:,.0f} | "
            f"{mean['megabytes']:.1f} MB, {same[0]['exported']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="*")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--answers", action="store_true", help="answer and export with --rates, too")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; then speeds mean nothing")
    parser.add_argument("--model")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.model or model_path()
    if options.one:
        with tempfile.TemporaryDirectory() as root:
            print("RESULT " + json.dumps(one(**json.loads(options.one), model=model, folder=Path(root) / "run")))
        return
    wanted = [
        {"method": method, "rate": rate, "seed": seed, "steps": options.steps,
         "answers": options.answers or not options.rates}
        for method in options.methods or chat_methods()
        for rate in options.rates or [RATES.get(method, METHODS[method].settings["optim"]["learning_rate"])]
        for seed in range(options.seeds)
    ]  # fmt: skip

    def made(run: dict) -> dict | None:
        command = [sys.executable, __file__, "--one", json.dumps(run), "--model", model]
        ran = subprocess.run(command, capture_output=True, text=True)
        found = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
        print(found[0] if found else f"{run['method']}: failed\n{ran.stderr[-1200:]}", flush=True)
        return json.loads(found[0].removeprefix("RESULT ")) if found else None

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = [row for row in pool.map(made, wanted) if row]
    if rows and (options.answers or not options.rates):
        cpu = f"CPU, {torch.get_num_threads()} threads"
        print(f"\n{torch.cuda.get_device_name() if torch.cuda.is_available() else cpu}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
