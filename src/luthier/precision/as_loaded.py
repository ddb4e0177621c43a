"""Plain floating point: which dtype the hardware at hand computes in."""

import torch

from . import Stored


def resolve(config: Stored, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
