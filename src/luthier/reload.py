"""The other half of an export's check: a program that knows transformers and peft only, run in a fresh process."""

import json
import sys


def main() -> None:
    """Reads a request from the standard input; writes the log-probabilities of its documents to a file."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    request = json.load(sys.stdin)
    dtype = getattr(torch, request["dtype"])
    source = request["base"] or request["model"]
    given = {}
    if request["quantisation"]:
        from transformers import BitsAndBytesConfig

        four_bits = BitsAndBytesConfig(**request["quantisation"])
        given = {"quantization_config": four_bits, "device_map": {"": request["device"]}}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **given)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would round its scales to 16 bits on this CPU
            module.support_avx512bf16_for_cpu = False
    if request["base"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, request["model"])
    model = model.to(request["device"]).eval()
    out = []
    with torch.no_grad():
        for document in request["documents"]:
            tokens = torch.tensor([document], device=request["device"])
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
            out.append(logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].cpu())
    save_file({"logprobs": torch.cat(out)}, request["out"])


if __name__ == "__main__":
    main()
