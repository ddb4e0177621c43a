"""Operations to seconds: the rate that this machine's products run at, measured when asked, else as we have seen it."""

from __future__ import annotations

import time

import torch

SEEN = (  # part of the device's name, 10^12 operations a second that whole training steps reached, where
    ("H200", 400.0, "full 1B and LoRA 8B in bf16, compiled: docs/log.md"),
    ("H100", 380.0, "taken from an H200's 400, as its products are as fast and its memory is slower"),
)
PER_CORE = 0.06  # of an AVX2 core in float32: a whole LoRA step of SmolLM2-135M, docs/log.md


def rate(device: str, measure: bool) -> tuple[float | None, str]:
    """10^12 operations a second in a training step, and where the figure is from; None where nothing is known."""
    if measure:
        return _measured(device)
    if device == "cpu":
        threads = torch.get_num_threads()
        return PER_CORE * threads, f"{PER_CORE * 1000:.0f} GFLOP/s for each of {threads} threads, as seen on AVX2 cores"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "H200, as there is no GPU here"
    for part, seen, where in SEEN:
        if part in name:
            return seen, f"{seen:.0f} TFLOP/s, as seen on {name.split(',')[0]} ({where})"
    return None, f"unknown for {name}: ask for a measurement (--measure)"


def _measured(device: str) -> tuple[float | None, str]:
    """A product of square matrices, and 60 % of its rate for all that a step does beside."""
    share, size, dtype = 0.6, 1024 if device == "cpu" else 8192, torch.float32 if device == "cpu" else torch.bfloat16
    if device == "cuda" and not torch.cuda.is_available():
        return None, "there is no GPU here to measure"
    a = torch.randn(size, size, device=device, dtype=dtype)
    (a @ a).sum().item()
    began, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < 0.5:
        (a @ a).sum().item()
        done += 1
    found = 2 * size**3 * done / spent / 1e12
    return share * found, f"{share:.0%} of {found:.3g} TFLOP/s, measured now on a product of {size} x {size} matrices"
