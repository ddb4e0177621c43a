"""LoRA: patterns, first values, embeddings and heads, experts, what is trained beside it; against PEFT throughout."""

import pytest
import torch


def mixtral(**extra):
    from conftest import LLAMA
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2, **extra))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model.eval()
