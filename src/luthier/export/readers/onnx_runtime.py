"""An ONNX graph as onnxruntime runs it: log-probabilities, two documents at a time, the shorter padded."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Reads a request from the standard input; writes the log-probabilities of its documents to a file."""
    import numpy as np
    import onnxruntime
    from safetensors.numpy import save_file

    request = json.load(sys.stdin)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = min(os.cpu_count() or 1, int(os.environ.get("OMP_NUM_THREADS", 64)))
    path = str(Path(request["model"]) / "model.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = []
    for at in range(0, len(request["documents"]), 2):
        documents = request["documents"][at : at + 2]
        longest = max(map(len, documents))
        ids, mask = (np.zeros((len(documents), longest), np.int64) for _ in range(2))
        for row, document in enumerate(documents):
            ids[row, : len(document)], mask[row, : len(document)] = document, 1
        logits: Any = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
        logits = logits.astype(np.float64)
        for row, document in enumerate(documents):
            own = logits[row, : len(document) - 1]
            top = own.max(-1)
            chosen = own[np.arange(len(own)), document[1:]]
            found.append(chosen - top - np.log(np.exp(own - top[:, None]).sum(-1)))
    save_file({"logprobs": np.concatenate(found).astype(np.float32)}, request["out"])


if __name__ == "__main__":
    main()
