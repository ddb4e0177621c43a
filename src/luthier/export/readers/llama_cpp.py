"""A GGUF file, and an adapter on it, as llama.cpp reads it: log-probabilities, the likeliest text, tokens of texts."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Reads a request from the standard input; writes what it asks for to a file of tensors."""
    import numpy as np
    from safetensors.numpy import save_file

    from luthier.export.gguf.library import Llama

    request = json.load(sys.stdin)
    documents, prompts, count = request["documents"], request.get("prompts", []), request.get("greedy", 0)
    longest = max([len(d) for d in documents] + [len(p) + count for p in prompts])
    threads = min(os.cpu_count() or 1, int(os.environ.get("OMP_NUM_THREADS", 64)))
    llama = Llama(request["model"], -(-longest // 256) * 256, threads, request.get("adapter"))
    texts = zip(request.get("texts", []), request.get("whole", []))
    ids = [llama.tokenised(text, special=whole) for text, whole in texts]
    found = {
        "logprobs": np.concatenate([llama.logprobs(d) for d in documents]),
        "greedy": np.asarray([llama.continued(p, count) for p in prompts], np.int64),
        "ids": np.asarray([i for row in ids for i in row], np.int64),
        "counts": np.asarray([len(row) for row in ids], np.int64),
        "ends": np.asarray([llama.ends(token) for token in request.get("stops", [])], np.int64),
        "exact": np.asarray([llama.exact], np.int64),
    }
    save_file(found, request["out"])


if __name__ == "__main__":
    main()
