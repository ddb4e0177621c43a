"""What rounding costs after fine-tuning and with training for it: SmolLM2-135M on the demo's intents.

    python benchmarks/qat.py                         # on a CPU: hours; see --rows, --held-out, --steps
    python benchmarks/qat.py --device cuda           # minutes

For each scheme, three models of one start, one set of rows in one order, one optimiser and one number of steps:

    fp      fine-tuned in full precision
    ptq     fp, rounded afterwards by the same code with the same scheme and group size
    qat     fine-tuned with fake quantisation, then converted: integers are stored, and these are what is measured

and the loss and exact match of each on the same held-out rows. `ratio` is (qat - fp) / (ptq - fp) in held-out loss:
the share of what rounding costs that is left after training for it; `lost` are the two differences. `continued` splits
the steps: qat begins from fp after `--continue-from` of its steps have been taken (fake_quant_after_n_steps), the total
being the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from luthier import evaluate
from luthier.assemble import restore
from luthier.cli.demo import model_path
from luthier.config import configure
from luthier.data import dataset as datasets
from luthier.monitor import Console
from luthier.precision import QAT, converted
from luthier.surgery import merged_state
from luthier.train import train

CASES = ["int8-dynamic-act-int4-weight:32", "int8-dynamic-act-int4-weight:-1", "int4-weight-only:32"]


def settings(options: argparse.Namespace, folder: Path, precision: dict | None) -> dict:
    rate = options.rate or (2e-3 if options.trainable == "lora" else 1e-4)
    trainable = {"r": 16, "lora_alpha": 32} if options.trainable == "lora" else {}
    return {
        "model": {"name": options.model or model_path(), "chat_template": "chatml"},
        "data": {
            "train": str(files("luthier") / "demo" / "home_intents.jsonl"), "validation": options.held_out,
            "max_length": 256, **({"limit": options.rows} if options.rows else {}),
        },
        "trainable": trainable, "optim": {"learning_rate": rate}, "schedule": {"kind": "linear", "warmup": 0.05},
        "batch": {"examples": 8, "micro_tokens": 1024}, "monitor": {"report_to": []},
        "checkpoint": {"keep": 1, "best": False}, "parallel": {"device": options.device}, "epochs": options.epochs,
        "seed": options.seed, "output_dir": str(folder), **({"max_steps": options.steps} if options.steps else {}),
        **({"precision": precision} if precision else {}),
    }  # fmt: skip


def figures(made: Any, answered: int) -> dict:
    """Held-out loss per token and exact match of a network as it stands."""
    rows = datasets.open_rows(made.config.data, made.renderer, None, lambda _: None, lambda _: None)[1]
    made.network.eval()
    found = evaluate.held_out(made, rows, 1024).columns
    out = {"loss": float(found["loss"].sum() / found["weight"].sum())}
    if answered:
        given = evaluate.answers(made, rows, answered, 48, 50)
        out["exact_match"] = sum(a.exact for a in given) / len(given)
    return out


def stored_bytes(model: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())


def trained(options: argparse.Namespace, folder: Path, precision: dict | None) -> tuple[Any, float]:
    method = {"lora": ("lora", "qat-lora"), "full": ("full", "qat")}[options.trainable][precision is not None]
    began = time.monotonic()
    train(configure(settings(options, folder, precision), method=method), Console(quiet=True))
    return restore(folder)[0], time.monotonic() - began


def plain(made: Any) -> None:
    """The network with its adapters merged for good, so that the one that is rounded is the one that was measured."""
    from luthier.surgery import Adapter, innermost, outer, swap

    model, state = made.network.model, merged_state(made.network.model)
    for name, layer in list(outer(model)):
        if isinstance(layer, Adapter):
            swap(model, name, innermost(layer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trainable", choices=("lora", "full"), default="full")
    parser.add_argument("--model", help="another model than the demo's")
    parser.add_argument("--rows", type=int, help="of training and held-out rows together; all without it")
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--answers", type=int, default=400, help="prompts answered; 0 for none")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--continue-from", type=int, help="steps in full precision before those with rounding")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="SCHEME:GROUP")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    with tempfile.TemporaryDirectory() as work:
        made, seconds = trained(options, Path(work) / "fp", None)
        plain(made)
        fp = figures(made, options.answers)
        show({"model": "fp", "seconds": seconds, "bytes": stored_bytes(made.network.model), **fp})
        for case in options.cases:
            scheme, _, group = case.partition(":")
            precision = {"scheme": scheme, "group_size": int(group)}
            one(options, Path(work), Path(work) / "fp", precision, fp)


def one(options: argparse.Namespace, work: Path, start: Path, precision: dict, fp: dict) -> None:
    config = QAT(**precision)
    made = restore(start)[0]
    plain(made)
    converted.ptq(made.network.model, config)
    made.network.model.to(made.ranks.device)
    ptq = figures(made, options.answers)
    show({"model": "ptq", **precision, "bytes": stored_bytes(made.network.model), **ptq})
    late = {"fake_quant_after_n_steps": options.continue_from} if options.continue_from else {}
    folder = work / f"{config.scheme}-{config.group_size}"
    made, seconds = trained(options, folder, precision | late)
    faked = figures(made, 0)["loss"]
    converted.convert(made.network.model)
    qat = figures(made, options.answers)
    show({"model": "qat", **precision, **late, "seconds": seconds, "bytes": stored_bytes(made.network.model), **qat,
          "fake_quantised_loss": faked, "lost": [round(m["loss"] - fp["loss"], 5) for m in (qat, ptq)],
          "ratio": (qat["loss"] - fp["loss"]) / (ptq["loss"] - fp["loss"])})  # fmt: skip


def show(values: dict) -> None:
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
    print("RESULT " + json.dumps(rounded), flush=True)


if __name__ == "__main__":
    main()
