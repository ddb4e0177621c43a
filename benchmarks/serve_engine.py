"""Tokens per second of the serving engine with 1, 8 and 32 requests at a time, beside plain generation and llama.cpp.

    python benchmarks/serve_engine.py [--new 64] [--at 1 8 32] [--only engine llama.cpp] [--threads 2]

The demo's model: float32 for PyTorch, its 4-bit file for llama.cpp. The prompts are questions of about 40 tokens that
begin with the same 20 (a system turn); answers are greedy and of equal length, and all are asked for at once. `engine`
runs what prompts share once. `luthier` is `luthier generate` and `transformers` is
`model.generate`: one left-padded batch, which begins and ends together. Prompts are a part of the time. Beside tokens a
second stand tokens a second of processor time, which hardly depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

QUESTIONS = [
    f"Name {n} towns in {where} and say {what} about each."
    for n in (2, 3, 5, 7) for where in ("France", "Peru", "Japan", "Kenya") for what in ("one thing", "something old")
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--at", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    from luthier.cli.demo import model_path
    from luthier.opened import opened

    path = model_path()
    made = opened(path)
    prompts = [
        made.tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)["input_ids"]
        for q in QUESTIONS
    ]
    print(f"prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {options.new} new ones", flush=True)
    for name in options.only:
        work = CONTESTANTS[name](made, prompts, options.new, path, options.threads)
        wall, processor = {}, {}
        for at in options.at:
            with work(at) as ask:
                start, used = time.perf_counter(), time.process_time()
                ask()
                wall[at] = round(at * options.new / (time.perf_counter() - start), 1)
                processor[at] = round(at * options.new / (time.process_time() - used), 1)
        print(json.dumps({"what": name, "tokens_per_second": wall, "per_second_of_processor": processor}), flush=True)


def by_engine(made, prompts, new, path, threads):
    from luthier.serve.engine import Engine, Limits
    from luthier.serve.requests import Request

    @contextmanager
    def work(at):
        with Engine(made.network, made.tokenizer, Limits(slots=at, cache_tokens=at * 512)) as engine:
            def ask():
                streams = [engine.submit(Request(prompts[i], new)) for i in range(at)]
                assert sum(len(stream.result().tokens) for stream in streams) == at * new

            yield ask

    return work


def by_luthier(made, prompts, new, path, threads):
    from luthier.generate import generate

    @contextmanager
    def work(at):
        yield lambda: generate(made.network, prompts[:at], set(), new)

    return work


def by_transformers(made, prompts, new, path, threads):
    import torch

    made.model.set_attn_implementation("sdpa")

    @contextmanager
    def work(at):
        longest = max(map(len, prompts[:at]))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts[:at]])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts[:at]])
        yield lambda: made.model.generate(
            tokens, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
        )

    return work


def by_llama_cpp(made, prompts, new, path, threads):
    """Its own server with as many slots, asked over HTTP from as many threads."""
    import xllamacpp

    @contextmanager
    def work(at):
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel, params.n_gpu_layers = at * 512, at, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        server = xllamacpp.Server(params)
        url = f"{server.listening_address}/v1/chat/completions"

        def one(question):
            body = {"messages": [{"role": "user", "content": question}], "max_tokens": new, "temperature": 0,
                    "ignore_eos": True}  # fmt: skip
            wanted = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            return json.load(urllib.request.urlopen(wanted))["usage"]["completion_tokens"]

        with ThreadPoolExecutor(at) as pool:
            yield lambda: sum(pool.map(one, QUESTIONS[:at]))
        server = None  # which ends it

    return work


CONTESTANTS = {
    "engine": by_engine, "luthier": by_luthier, "transformers": by_transformers, "llama.cpp": by_llama_cpp,
}  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
