"""What it saves to run a prompt once for all its answers: a pass forward and backward, beside the same with it off.

    python benchmarks/shared_prompts.py                    # LoRA on the demo's SmolLM2-135M, this machine's CPU
    python benchmarks/shared_prompts.py --device cuda      # LoRA and full, a Llama of 1B of random weights, bf16

Prints a row of a table for each shape: a prompt of so many tokens, so many answers to it, of so many tokens. Both are
learnt alike but for the switch, take turns, and the figures are medians; memory is the peak that a pass adds to what
rests, by PyTorch's own record. Before anything is timed, loss and gradients of both must agree, and with shared
prompts a second pass must give the same bits.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import numpy as np
import torch

from luthier.batch import Batch, Document
from luthier.models import network, trials
from luthier.objectives import NextToken
from luthier.parallel import Parallel, layers
from luthier.surgery import trainable
from luthier.trainable import Full, LoRA

SHAPES = {  # prompt, answers, length of each, prompts in a row
    "cpu": [(400, 2, 50, 1), (200, 2, 200, 1), (200, 8, 25, 1)],
    "cuda": [(400, 2, 50, 18), (800, 2, 200, 8), (200, 2, 200, 20), (50, 2, 200, 32), (400, 8, 200, 3)],
}


def row_of(prompt: int, answers: int, length: int, prompts: int, vocabulary: int) -> Batch:
    rng = np.random.default_rng(0)
    documents = []
    for number in range(prompts):
        start = rng.integers(0, vocabulary, prompt)
        for _ in range(answers):
            tokens = np.r_[start, rng.integers(0, vocabulary, length + 1)].astype(np.int32)
            weights = np.r_[np.zeros(prompt), np.ones(length + 1)].astype(np.float32)
            documents.append(Document(tokens, weights, number))
    return Batch.pack(documents)


def network_of(device: str, trained: str) -> network.Network:
    if device == "cpu":
        from luthier.cli import demo
        from luthier.models.gguf import read_model

        model = read_model(demo.model_path(), torch.float32)
    else:
        from gpu import llama  # type: ignore[import-not-found]

        model = llama("1b")
    net = network.Network(model.train())
    reason = trials.prepare(net, "packed")
    assert reason is None, reason
    assert net.shares, "the kernel does not take queries as a document's last tokens"
    (LoRA(r=8) if trained == "lora" else Full()).apply(model)
    with torch.no_grad():
        for name, p in trainable(model).items():
            if "lora_B" in name:
                p.normal_(std=0.02)
    parallel = Parallel(device=device)
    layers.choose_kernels(parallel, torch.device(device))
    layers.compile_layers(parallel, model, torch.device(device))
    net.compiled = layers.compiled(parallel, torch.device(device))
    net.longest = 1024
    return net


def learn(net: network.Network, batch: Batch) -> float:
    for p in trainable(net.model).values():
        p.grad = None
    loss = NextToken().build()(net, batch)
    mean = loss.total / loss.count
    mean.backward()
    return mean.item()


def gradients(net: network.Network) -> torch.Tensor:
    return torch.cat([p.grad.flatten().float() for p in trainable(net.model).values()])


def check(net: network.Network, batch: Batch) -> str:
    """Both ways agree, and one gives the same bits twice."""
    net.shares = False
    apart, of_apart = learn(net, batch), gradients(net)
    net.shares = True
    together, found = learn(net, batch), gradients(net)
    assert learn(net, batch) == together
    assert torch.equal(found, gradients(net)), "a second pass gives other bits"
    off = float((found - of_apart).norm() / of_apart.norm())
    exact = net.dtype == torch.float32
    assert abs(together - apart) <= (1e-5 if exact else 2e-3) * abs(apart), (together, apart)
    assert off <= (1e-4 if exact else 5e-2), off
    return f"{abs(together - apart):.1e}, {off:.1e}"


def seconds(net: network.Network, batch: Batch) -> float:
    cuda = net.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    learn(net, batch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak(net: network.Network, batch: Batch) -> int:
    for p in trainable(net.model).values():
        p.grad = None
    gc.collect()
    if net.device.type == "cuda":
        resting = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        learn(net, batch)
        return torch.cuda.max_memory_allocated() - resting
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        learn(net, batch)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def compare(net: network.Network, trained: str, shape: tuple[int, int, int, int], rounds: int) -> str:
    batch = row_of(*shape, net.config.vocab_size)
    if net.compiled:
        batch = batch.padded_to(-(-len(batch) // 2048) * 2048)
    batch = batch.to(net.device)
    agreed = check(net, batch)
    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for shares in taken:
            net.shares = shares
            taken[shares].append(seconds(net, batch))
    most = {}
    for shares in taken:
        net.shares = shares
        most[shares] = peak(net, batch) / 1e6
    off, on = (statistics.median(taken[shares]) for shares in (False, True))
    prompt, answers, length, _ = shape
    run = len(batch) - sum(batch.alike())
    return (
        f"| {trained} | {prompt} | {answers} x {length} | {len(batch)} | {run} | {off:.3f} | {on:.3f} | "
        f"{off / on:.2f} | {most[False]:.0f} | {most[True]:.0f} | {agreed} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shape", type=int, help="one shape only, by its number from 0")
    options = parser.parse_args()
    print("| trained | prompt | answers | tokens | run once | s apart | s once | ratio | MB apart | MB once | off by |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for trained in ("lora",) if options.device == "cpu" else ("lora", "full"):
        net = network_of(options.device, trained)
        chosen = SHAPES[options.device]
        for shape in chosen if options.shape is None else [chosen[options.shape]]:
            print(compare(net, trained, shape, options.rounds), flush=True)
        del net
        gc.collect()


if __name__ == "__main__":
    main()
