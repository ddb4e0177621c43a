"""The other half of an export's check, in a fresh process: by transformers and PEFT, or by Luthier's own loader."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


CLASSES = {
    "tokens": "AutoModelForCausalLM", "text": "AutoModelForSequenceClassification",
    "each": "AutoModelForTokenClassification",
}  # fmt: skip


def main() -> None:
    """Reads a request from the standard input; writes the log-probabilities, or scores, of its documents to a file."""
    import torch
    from safetensors.torch import save_file

    request = json.load(sys.stdin)
    with torch.no_grad():
        model = loaded(request)
        found = by_luthier(model, request) if request["ours"] else by_transformers(model, request)
    save_file({"logprobs": found}, request["out"])


def loaded(request: dict) -> Any:
    """The base of an adapter, or a whole model."""
    import torch
    import transformers

    auto = getattr(transformers, CLASSES[request["ends_in"]])
    dtype = getattr(torch, request["dtype"])
    source = request["base"] or request["model"]
    given: dict[str, Any] = {}
    if request["quantisation"]:
        from transformers import BitsAndBytesConfig

        four_bits = BitsAndBytesConfig(**request["quantisation"])
        given = {"quantization_config": four_bits, "device_map": {"": request["device"]}}
    if request["labels"] and request["base"]:  # the head of the base is another, or none: the adapter has its own
        given |= {"num_labels": len(request["labels"]), "ignore_mismatched_sizes": True}
    model = auto.from_pretrained(source, dtype=dtype, **given)
    if request["labels"]:
        model.config.get_text_config().pad_token_id = request["pad"]
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would round its scales to 16 bits on this CPU
            module.support_avx512bf16_for_cpu = False
        if getattr(module, "quantization_scheme", None) is not None and not request["rounded_activations"]:
            module.quantization_scheme.input_activations = None
    model = model.float() if request["wide"] else model  # the numbers of 16 bits, if it was loaded in them, in 32
    return model.to(request["device"]).eval()


def by_transformers(model: Any, request: dict) -> Tensor:
    """With the adapter as PEFT loads it, on a base into which those beneath it are merged."""
    import torch

    if request["base"]:
        if request["rows"] != model.get_input_embeddings().weight.shape[0]:  # the run added tokens
            model.resize_token_embeddings(request["rows"], mean_resizing=False)
        from peft import PeftModel

        if request["beneath"]:
            from luthier import adapters

            laid(model, request["beneath"])
            adapters.merge(model)
        model = PeftModel.from_pretrained(model, request["model"]).to(request["device"]).eval()
    out = []
    for document, types in zip(request["documents"], request["types"]):
        tokens = torch.tensor([document], device=request["device"])
        if request["ends_in"] != "tokens":
            pair = {} if types is None else {"token_type_ids": torch.tensor([types], device=request["device"])}
            logits = model(input_ids=tokens, **pair).logits[0]
            own = logits[-len(document) :] if request["ends_in"] == "each" else logits  # after virtual tokens
            out.append(own.float().cpu().flatten())
            continue
        logits = model(input_ids=tokens, use_cache=False).logits[0, -len(document) :-1].float()
        out.append(logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].cpu())
    return torch.cat(out)


def laid(model: Any, entries: list[dict[str, Any]]) -> None:
    """Saved adapters on their base, which may hold what its weights in fewer bits stand for: it is not checked."""
    from luthier.trainable import adapter_files, saved

    for entry in entries:
        saved.load(model, adapter_files.read(entry["path"]), entry["name"], entry["share"], check=False)


def by_luthier(model: Any, request: dict) -> Tensor:
    """With adapters that PEFT does not know, or that cannot be merged beneath one that it does."""
    import numpy as np
    import torch

    from luthier.batch import Batch, Document
    from luthier.logprobs import scored
    from luthier.models import network, trials

    net = network.Network(model, request["ends_in"]).eval()
    if request["ends_in"] != "tokens":
        trials.find_scores(net)  # before there are virtual tokens, which the model itself knows nothing of
    laid(model, [*request["beneath"], {"path": request["model"], "name": "default", "share": 1.0}])
    trials.prepare(net, "padded")
    if request["ends_in"] != "tokens":
        return scores(net, request)
    documents = [Document(np.asarray(d, np.int32), np.r_[0.0, np.ones(len(d) - 1)].astype(np.float32), 0)
                 for d in request["documents"]]  # fmt: skip
    batch = Batch.pack(documents).to(torch.device(request["device"]))
    hidden, targets, _ = net.predictions(batch, net.hidden(batch))
    return scored(hidden, net.head, targets)[0].float().cpu()


def scores(net: Any, request: dict) -> Tensor:
    """Of each document, one after the other."""
    import numpy as np
    import torch

    from luthier.batch import Batch, Document

    out = []
    for tokens, types in zip(request["documents"], request["types"]):
        ids, pair = np.asarray(tokens, np.int32), None if types is None else np.asarray(types, np.int32)
        batch = Batch.pack([Document(ids, np.zeros(len(ids), np.float32), 0, types=pair)])
        out.append(net.scores(batch.to(torch.device(request["device"]))).float().cpu().flatten())
    return torch.cat(out)


if __name__ == "__main__":
    main()
