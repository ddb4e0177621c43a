"""Servers side by side: tokens a second of luthier's, transformers' and llama.cpp's, and 200 clients for a minute.

    python benchmarks/serve.py [--clients 8] [--requests 24] [--new 32] [--threads 1] [--only luthier ...]
    python benchmarks/serve.py --minute 60 --clients 200 --new 8 --only luthier

The demo's model: float32 for the first two, its 4-bit file for llama.cpp. Each server is a process of its own, asked on
loopback by so many clients at once, each of which asks again as soon as it is answered; answers are greedy. The
first round, which makes kernels and caches ready, is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from serve_engine import QUESTIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=24, help="of all clients together")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minute", type=float, metavar="SECONDS", help="ask for so long instead of so often")
    parser.add_argument("--only", nargs="+", default=list(SERVERS))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as aside:
        folder = written(Path(aside) / "model")
        for name in options.only:
            with SERVERS[name](folder, options.threads, options.clients) as (port, model, process):
                load(port, model, 2, options.new, 2, None)
                used = processor(process)
                told = load(port, model, options.clients, options.new, options.requests, options.minute)
                if used is not None:
                    spent = processor(process) - used
                    told["per_second_of_processor"] = round(told["tokens"] / spent, 1)
                told["memory_mb"] = memory(process)
            print(json.dumps({"server": name, **told}), flush=True)


def written(folder: Path) -> Path:
    """The demo's model in float32, as a folder."""
    from luthier.cli.demo import model_path
    from luthier.opened import opened

    made = opened(model_path())
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------- servers


@contextlib.contextmanager
def luthier(folder, threads, clients, *more):
    command = [sys.executable, "-m", "luthier", "serve", str(folder), "--port", "0", "--json", "--no-page"]
    command += ["--slots", str(min(clients, 64)), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        port = int(json.loads(process.stdout.readline())["url"].rsplit(":", 1)[1])
        yield port, folder.name, process
    finally:
        end(process)


def transformers(*flags):
    @contextlib.contextmanager
    def started(folder, threads, clients):
        port = free_port()
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--port", str(port)]
        command += ["--device", "cpu", "--dtype", "float32", *flags]
        process = subprocess.Popen(command)
        try:
            until_up(port, "/health", process)
            yield port, str(folder), process
        finally:
            end(process)

    return started


@contextlib.contextmanager
def llama_cpp(folder, threads, clients):
    from luthier.cli.demo import model_path

    code = (
        "import sys, xllamacpp\np = xllamacpp.CommonParams()\np.model.path = sys.argv[1]\n"
        "n, t = int(sys.argv[2]), int(sys.argv[3])\np.n_ctx, p.n_parallel, p.n_gpu_layers = n * 512, n, 0\n"
        "p.cpuparams.n_threads = p.cpuparams_batch.n_threads = t\ns = xllamacpp.Server(p)\n"
        "print('listens at', s.listening_address, flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, model_path(), str(min(clients, 64)), str(threads)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.PIPE, text=True
    )
    try:
        port = next(int(found[1]) for line in process.stdout if (found := re.search(r"listens at .*:(\d+)", line)))
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield port, "any", process
    finally:
        end(process)


SERVERS = {
    "luthier": luthier,
    "transformers": transformers(),
    "transformers, continuous batching": transformers("--continuous-batching"),
    "llama.cpp, 4-bit": llama_cpp,
}


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def until_up(port: int, path: str, process: subprocess.Popen) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        time.sleep(0.5)
    raise SystemExit("the server ended")


def end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---------------------------------------------------------------------------- clients


def load(port, model, clients, new, requests, seconds):
    """Ask `requests` times in all, or for so many seconds."""
    lock, counts, times, tokens = threading.Lock(), Counter(), [], [0]
    left = [requests]
    until = None if seconds is None else time.monotonic() + seconds

    def more() -> int | None:
        with lock:
            if until is not None:
                left[0] += 1
                return left[0] if time.monotonic() < until else None
            left[0] -= 1
            return left[0] if left[0] >= 0 else None

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        while (number := more()) is not None:
            question = QUESTIONS[number % len(QUESTIONS)]
            turns = [{"role": "user", "content": question}]
            body = json.dumps({"model": model, "messages": turns, "temperature": 0, "max_tokens": new})
            started = time.monotonic()
            try:
                kind = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/chat/completions", body, kind)
                answer = connection.getresponse()
                said = json.loads(answer.read())
                count = said["usage"]["completion_tokens"] if answer.status == 200 else 0
                with lock:
                    counts[str(answer.status)] += 1
                    tokens[0] += count
                    times.append(time.monotonic() - started)
            except (OSError, http.client.HTTPException, ValueError) as error:
                connection.close()
                with lock:
                    counts[type(error).__name__] += 1
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.monotonic() - started
    cuts = statistics.quantiles(times, n=20) if len(times) > 1 else [float("nan")] * 19
    return {
        "clients": clients, "answers": dict(counts), "tokens": tokens[0], "seconds": round(wall, 1),
        "tokens_per_second": round(tokens[0] / wall, 1), "half_within": round(cuts[9], 2),
        "95_percent_within": round(cuts[18], 2),
    }  # fmt: skip


def processor(process: subprocess.Popen) -> float | None:
    """Seconds of processor time that the process has used."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(process: subprocess.Popen) -> int | None:
    try:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    except OSError:
        return None
    return int(found[1]) // 1024 if found else None


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
