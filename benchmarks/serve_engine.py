"""Tokens per second of the serving engine with 1, 8 and 32 requests at a time, beside plain generation and llama.cpp.

    python benchmarks/serve_engine.py [--new 64] [--at 1 8 32] [--only engine luthier transformers llama.cpp] [--threads 2]

The demo's model: float32 for PyTorch, its 4-bit file for llama.cpp. The prompts are questions of about 40 tokens that
begin with the same 20 (a system turn); answers are greedy and of equal length. `luthier` is `luthier generate`: batches
of equal beginnings and ends, all there at once; `transformers` is `model.generate`, left-padded, likewise.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

QUESTIONS = [f"Name {n} towns in {where} and say {what} about each." for n in (2, 3, 5, 7) for where in ("France", "Peru",
             "Japan", "Kenya") for what in ("one thing", "something old")]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--at", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--only", nargs="+", default=["engine", "luthier", "transformers", "llama.cpp"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    from luthier.cli.demo import model_path
    from luthier.opened import opened

    path = model_path()
    rows: dict[tuple[str, int], float] = {}
    if set(options.only) - {"llama.cpp"}:
        made = opened(path)
        prompts = [
            made.tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)["input_ids"]
            for q in QUESTIONS
        ]
        print(f"prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {options.new} new ones")
        for name in options.only:
            if name != "llama.cpp":
                for at, rate in globals()[f"by_{name}"](made, prompts, options.at, options.new).items():
                    rows[name, at] = rate
    if "llama.cpp" in options.only:
        for at, rate in by_llama_cpp(path, options.at, options.new, options.threads).items():
            rows["llama.cpp", at] = rate
    for name in options.only:
        print(json.dumps({"what": name} | {str(at): round(rows[name, at], 1) for at in options.at}))


def timed(count: int, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def by_engine(made, prompts, sizes, new):
    from luthier.serve.engine import Engine, Limits
    from luthier.serve.requests import Request

    found = {}
    for at in sizes:
        with Engine(made.network, made.tokenizer, Limits(slots=at, cache_tokens=at * 256, kept=0)) as engine:
            def work(engine=engine, at=at):
                streams = [engine.submit(Request(prompts[i], new)) for i in range(at)]
                assert sum(len(stream.result().tokens) for stream in streams) == at * new

            found[at] = timed(at * new, work)
    return found


def by_luthier(made, prompts, sizes, new):
    from luthier.generate import generate

    return {at: timed(at * new, lambda at=at: generate(made.network, prompts[:at], set(), new)) for at in sizes}


def by_transformers(made, prompts, sizes, new):
    import torch

    model = made.model
    model.set_attn_implementation("sdpa")

    def work(at):
        longest = max(map(len, prompts[:at]))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts[:at]])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts[:at]])
        model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new,
                       pad_token_id=0)  # fmt: skip

    return {at: timed(at * new, lambda at=at: work(at)) for at in sizes}


def by_llama_cpp(path, sizes, new, threads):
    """Its own server with as many slots, asked over HTTP from as many threads."""
    import xllamacpp

    found = {}
    for at in sizes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel, params.port = at * 512, at, port
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_gpu_layers = 0
        server = xllamacpp.Server(params)
        url = f"{server.listening_address}/v1/chat/completions"

        def ask(question, url=url):
            body = {"messages": [{"role": "user", "content": question}], "max_tokens": new, "temperature": 0,
                    "ignore_eos": True}  # fmt: skip
            wanted = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            return json.load(urllib.request.urlopen(wanted))["usage"]["completion_tokens"]

        with ThreadPoolExecutor(at) as pool:
            start = time.perf_counter()
            counted = sum(pool.map(ask, QUESTIONS[:at]))
            found[at] = counted / (time.perf_counter() - start)
        del server
    return found


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
