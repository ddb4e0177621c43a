"""One model through every format: size, perplexity of real text, exact match, tokens per second, loaded by whom.

    python benchmarks/formats.py runs/demo            # a run; or a folder, a hub name, a GGUF file
    python benchmarks/formats.py runs/demo F32 Q8_0   # some of the formats

Perplexity is of the topics of Python's help (TEXTS of TOKENS tokens each), exact match of the first ROWS held-out rows
of a run, answered greedily, tokens per second of the likeliest text after a prompt of 64 tokens, one text at a time, on
THREADS threads. Each file is written by the exporter's own functions, without its checks, loaded in a process of its
own by the tool that is named, and goes. Each format prints one line `RESULT {json}`; a table comes last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

TEXTS, TOKENS = int(os.environ.get("TEXTS", 4)), int(os.environ.get("TOKENS", 512))
ROWS, ANSWER = int(os.environ.get("ROWS", 12)), 48
THREADS, DECODED = int(os.environ.get("THREADS", 2)), 48


def one(request: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: what llama.cpp makes of a file."""
    import numpy as np

    from luthier.export.gguf.library import Llama

    llama = Llama(request["model"], 1024, THREADS)
    logprobs = np.concatenate([llama.logprobs(d) for d in request["documents"]])
    begun = time.perf_counter()
    llama.continued(request["documents"][0][:64], 1)
    prompt = time.perf_counter() - begun
    llama.continued(request["documents"][0][:64], DECODED)
    seconds = time.perf_counter() - begun - 2 * prompt
    answers = []
    for tokens in request["prompts"]:
        found = llama.continued(tokens, ANSWER, set(request["stops"]))
        answers.append([t for t in found if t not in request["stops"]])
    return {
        "perplexity": float(np.exp(-logprobs.astype(np.float64).mean())),
        "tokens_per_second": (DECODED - 1) / seconds, "answers": answers,
    }  # fmt: skip


def asked(found: Any) -> tuple[list[list[int]], list[str]]:
    """Prompts and references of a run's held-out rows."""
    if found.made is None or not ROWS:
        return [], []
    from luthier.data.dataset import open_rows

    _, held_out = open_rows(found.made.config.data, found.renderer, None, lambda text: None, lambda text: None)
    pairs = [found.renderer.prompt(c) for c in held_out.conversations[:ROWS]]
    return [p for p, _ in pairs], [r for _, r in pairs]


def in_memory(found: Any, documents: Sequence[list[int]], prompts: Sequence[list[int]]) -> dict[str, Any]:
    """What Luthier itself makes of the model."""
    from luthier.export import compare
    from luthier.generate import generate

    logprobs = compare.logprobs(found, documents)
    stops = found.renderer.stop_tokens()
    begun = time.perf_counter()
    generate(found.network, [documents[0][:64]], set(), 1)
    prompt = time.perf_counter() - begun
    generate(found.network, [documents[0][:64]], set(), DECODED)
    seconds = time.perf_counter() - begun - 2 * prompt
    return {
        "perplexity": logprobs.double().mean().neg().exp().item(), "tokens_per_second": (DECODED - 1) / seconds,
        "answers": generate(found.network, prompts, stops, ANSWER) if prompts else [],
    }  # fmt: skip


def main() -> None:
    import torch

    from luthier.export import _config, _opened, compare
    from luthier.export.gguf import model, numbers

    torch.set_num_threads(THREADS)
    source, wanted = sys.argv[1], sys.argv[2:] or ["safetensors", "onnx", *numbers.TABLE]
    found, _ = _opened(source, _config(source, "full") if Path(source, "config.yaml").exists() else None, print)
    documents = [d[:TOKENS] for d in compare.probe(replace(found, made=None))[:TEXTS]]
    prompts, references = asked(found)
    stops = sorted(found.renderer.stop_tokens())
    rows = []
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            if name == "safetensors":
                row = {"loaded by": "transformers, Luthier", **in_memory(found, documents, prompts)}
                row["bytes"] = sum(p.numel() for p in {id(p): p for p in found.model.parameters()}.values()) * 4
            elif name == "onnx":
                row = graph(found, Path(folder), documents)
            else:
                model.write(found, path, name)
                request = {"model": str(path), "documents": documents, "prompts": prompts, "stops": stops}
                ran = subprocess.run(
                    [sys.executable, __file__, "--one"], input=json.dumps(request), capture_output=True, text=True,
                    env=os.environ | {"OMP_NUM_THREADS": str(THREADS)},
                )  # fmt: skip
                assert not ran.returncode, ran.stderr[-2000:]
                row = {"loaded by": "llama.cpp", **json.loads(ran.stdout), "bytes": path.stat().st_size}
        texts = [found.tokenizer.decode(a, skip_special_tokens=True).strip() for a in row.pop("answers", [])]
        if texts:
            row["exact_match"] = sum(a == r for a, r in zip(texts, references)) / len(texts)
        rows.append({"format": name, **row})
        print("RESULT", json.dumps(rows[-1]), flush=True)
    table(rows)


def graph(found: Any, folder: Path, documents: list[list[int]]) -> dict[str, Any]:
    """An ONNX graph, which keeps no keys and values: how fast it decodes says nothing."""
    from luthier.export import compare, onnx

    with onnx._float32(found) as model, onnx._quiet():
        onnx._graph(model, folder)
    told = {"documents": documents, "model": str(folder), "out": str(folder / "probe.safetensors")}
    logprobs = compare.read_again("onnx_runtime", told)["logprobs"]
    return {
        "loaded by": "onnxruntime", "perplexity": logprobs.double().mean().neg().exp().item(),
        "bytes": compare.size(folder),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> None:
    """In Markdown; changes against the first row."""
    print("\n| format | MB | perplexity | change | exact match | tokens/s | loaded by |\n" + "| --- " * 7 + "|")
    for row in rows:
        change = row["perplexity"] / rows[0]["perplexity"] - 1
        match = f"{row['exact_match']:.2f}" if "exact_match" in row else ""
        speed = f"{row['tokens_per_second']:.1f}" if "tokens_per_second" in row else ""
        print(
            f"| {row['format']} | {row['bytes'] / 1e6:.0f} | {row['perplexity']:.3f} | {change:+.2%} | {match} "
            f"| {speed} | {row['loaded by']} |"
        )


if __name__ == "__main__":
    if sys.argv[1:] == ["--one"]:
        print(json.dumps(one(json.load(sys.stdin))))
    else:
        main()
