"""Small models to serve, and a server around them: in a process of its own, or in a thread of the test."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from conftest import make_tokenizer

TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "Call with <tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def small_llama(seed: int = 0, sharp: float = 4.0):
    """With weights so large that answers vary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=2048,
    ))  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(sharp if p.ndim > 1 else 1.0)
    return model.eval()


def write_model(folder: Path, seed: int = 0) -> Path:
    small_llama(seed).save_pretrained(folder)
    make_tokenizer(TOOLS_TEMPLATE).save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, seed: int = 1, rank: int = 4) -> Path:
    """A LoRA in PEFT's layout, drawn by a seed."""
    from safetensors.torch import save_file

    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for name, out in (("q_proj", 32), ("v_proj", 16)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(rank, 32, generator=draw)
            tensors[f"{at}.lora_B.weight"] = torch.randn(out, rank, generator=draw)
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": str(base), "fan_in_fan_out": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


class Process:
    """`luthier serve` as somebody starts it."""

    def __init__(self, *arguments: str, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "luthier", "serve", *arguments, "--port", "0", "--json"], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        self.told: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self._reader.join()
            raise RuntimeError("".join(self.told))
        told = json.loads(line)
        self.url, self.models = told["url"], told["models"]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.told.append(line)

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(60)
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()
        return code


@contextlib.contextmanager
def in_thread(source: Path, log: list[str] | None = None, **settings) -> Iterator:
    """A server in this process: its base URL and itself."""
    from luthier.serve.listening import make_server
    from luthier.serve.served import served
    from luthier.serve.settings import Serving

    chosen = Serving(**{"port": 0, "drain": 5.0, **settings})
    chosen.check()
    made = served(str(source), chosen).start()
    ready, urls = threading.Event(), []

    def tell(url: str) -> None:
        urls.append(url)
        ready.set()

    server = make_server(made, tell, (log if log is not None else []).append)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert ready.wait(60)
        yield urls[0], server
    finally:
        server.stop()
        thread.join(60)
        made.stop()
        assert not thread.is_alive()


def raw(url: str, data: bytes, read: bool = True, timeout: float = 20) -> bytes:
    """What comes back for these bytes, up to the end of the connection."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=timeout) as connection:
        connection.sendall(data)
        made = b""
        while read and (part := connection.recv(65536)):
            made += part
        return made
