"""PPO and GRPO on a task that can be verified: words written backwards, from a model that learnt it by half.

    python benchmarks/words_backwards.py                  # 120 batches of rollouts, 2 to 12 minutes on two cores
    python benchmarks/words_backwards.py --method grpo    # or rloo, dr_grpo, dapo, gspo: groups of 8 answers
    python benchmarks/words_backwards.py --method grpo --trl    # TRL's GRPOTrainer beside it, same start and steps
    python benchmarks/words_backwards.py --rounds 12      # a try of a minute
    python benchmarks/words_backwards.py --critic model   # a copy of the start instead of a head on the policy

A small model (0.9 M weights, bytes as tokens) starts at random and learns to write words backwards from examples, until
its greedy answers are right about two times in five, and one in seven of those that it samples. The method goes on
from there with nothing but the reward, 1 where the answer is the word backwards and else 0, on words that the examples
did not have; 300 others are held out, answered greedily. Printed: the curve, a row for the table of results, the KL.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from luthier import Config, configure, train
from luthier.monitor import Console, records

MODEL = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
GROUP = 8  # answers to a prompt, where they are compared with each other
UNBOUND = ("dr_grpo", "dapo")  # no KL in the loss, as their papers have it
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] + ('<|endoftext|>' if m['role'] == 'assistant' else '>') }}{% endfor %}"
)


def words(count: int, seed: int) -> list[str]:
    """So many different words of 4 to 8 letters that can be spoken."""
    drawn, made = random.Random(seed), {}
    while len(made) < count:
        length = drawn.randint(4, 8)
        letters = [drawn.choice("bdfgklmnprstvz" if at % 2 else "aeiou") for at in range(1, length + 1)]
        made["".join(letters)] = None
    return list(made)


def write(path: Path, chosen: list[str], key: str) -> str:
    path.write_text("".join(json.dumps({"prompt": word, key: word[::-1]}) + "\n" for word in chosen))
    return str(path)


def begun(folder: Path, chosen: list[str], steps: int, seed: int, template: Path) -> str:
    """The start: a model that learnt from examples, saved as transformers saves it."""
    config = configure(
        {
            "model": {"config": MODEL, "tokenizer": "train", "vocab_size": 260, "chat_template": str(template)},
            "data": {"train": write(folder / "examples.jsonl", chosen, "completion"), "max_length": 32},
            "batch": {"examples": 64, "micro_tokens": 4096}, "optim": {"learning_rate": 1e-3}, "epochs": 100,
            "schedule": {"kind": "constant", "warmup": 20}, "max_steps": steps, "seed": seed,
            "monitor": {"report_to": []}, "output_dir": str(folder / "begun"),
        },
        method="full",
    )  # fmt: skip
    train(config, Console(quiet=True)).export(folder / "start", "full")
    return str(folder / "start")


def configuration(folder: Path, start: str, options: argparse.Namespace) -> Config:
    fresh = words(9000, 1)[5000:]
    objective: dict = {"rewards": ["exact_match"], "max_completion_length": 12, "num_mini_batches": 4}
    if options.method == "ppo":
        critics = {"head": "head", "detached": {"kind": "head", "detach": True}, "model": start}
        objective |= {"num_ppo_epochs": 2, "kl_coef": options.kl_coef, "lam": 1.0, "missing_eos_penalty": 0.5,
                      "critic": critics[options.critic]}  # fmt: skip
    else:
        objective |= {"num_iterations": 2, "num_generations": GROUP}
        objective |= {} if options.method in UNBOUND else {"beta": options.kl_coef}
    each = options.mini_batch * objective["num_mini_batches"] // objective.get("num_generations", 1)
    return configure(
        {
            "model": start,
            "data": {
                "train": write(folder / "prompts.jsonl", fresh[300:], "answer"), "max_length": 32,
                "validation": write(folder / "held_out.jsonl", fresh[:300], "answer"),
            },
            "objective": objective, "trainable": {"kind": "full"},
            "batch": {"examples": options.mini_batch, "micro_tokens": 4096}, "optim": {"learning_rate": options.rate},
            "seed": options.seed, "epochs": 1 + options.rounds * each // len(fresh[300:]),
            "max_steps": options.rounds * 8, "evaluation": {"every": max(1, options.rounds // 6) * 8},
            "monitor": {"report_to": []}, "output_dir": str(folder / "run"),
        },
        method=options.method,
    )  # fmt: skip


def of_trl(folder: Path, start: str, config: Config, options: argparse.Namespace) -> dict:
    """GRPOTrainer with its own generation, on the same prompts with the same settings; greedy answers at both ends."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def rows(name: str) -> list[dict]:
        read = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        return [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in read]

    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    network, held_out = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32), rows("held_out")

    @torch.no_grad()
    def measured(network) -> float:
        network.eval()
        given = tokenizer.apply_chat_template(
            [row["prompt"] for row in held_out], add_generation_prompt=True, return_tensors="pt", padding=True,
            return_dict=True,
        )  # fmt: skip
        given.pop("token_type_ids", None)
        out = network.generate(**given, do_sample=False, max_new_tokens=12)[:, given["input_ids"].shape[1] :]
        found = [tokenizer.decode(row, skip_special_tokens=True) for row in out]
        return sum(a.strip() == row["answer"] for a, row in zip(found, held_out)) / len(held_out)

    def reward(completions, answer, **_) -> list[float]:
        return [float(c[0]["content"].strip() == a) for c, a in zip(completions, answer)]

    settings = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=options.mini_batch, num_generations=GROUP,
        steps_per_generation=4, num_iterations=2, max_completion_length=12, learning_rate=options.rate,
        lr_scheduler_type="constant", beta=config.objective.beta, epsilon=0.2, loss_type="grpo", temperature=1.0,
        max_steps=options.rounds * 8, seed=options.seed, use_cpu=True, bf16=False, report_to=[], logging_steps=8,
        save_strategy="no", gradient_checkpointing=False, max_grad_norm=1.0, disable_tqdm=True,
    )  # fmt: skip
    base = measured(network)
    data = Dataset.from_list(rows("prompts"))
    trainer = GRPOTrainer(network, reward, settings, data, processing_class=tokenizer)
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    logged = [round(entry["reward"], 3) for entry in trainer.state.log_history if "reward" in entry]
    return {"base": base, "tuned": measured(trainer.model), "seconds": seconds, "curve": logged,
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}  # fmt: skip


def beside(folder: Path, start: str, options: argparse.Namespace, ours: dict) -> None:
    """TRL in a process of its own, as memory is a process's."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", str(folder), start]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stderr[-3000:])
    theirs = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("RESULT "))[7:])
    (folder / "trl.json").write_text(json.dumps(theirs))
    print(
        f"\nTRL: {theirs['base']:.3f} -> {theirs['tuned']:.3f}, {theirs['seconds']:.0f} s of training, "
        f"{theirs['memory']:.2f} GB\nrewards of its rounds, every tenth: {theirs['curve'][::10]}\n"
        f"luthier / TRL: time {ours['seconds'] / theirs['seconds']:.2f} ({ours['seconds']:.0f} s), "
        f"memory {ours['memory'] / theirs['memory']:.2f} ({ours['memory']:.2f} GB)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="ppo")
    parser.add_argument("--rounds", type=int, default=120, help="batches of rollouts")
    parser.add_argument("--mini-batch", type=int, default=64, help="answers in an optimiser step, a quarter of a batch")
    parser.add_argument("--begin", type=int, default=110, help="steps on examples before")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--kl-coef", type=float, help="or beta, of groups (default: 0.01 of ppo, 0 of groups)")
    parser.add_argument("--critic", choices=("head", "detached", "model"), default="head")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", help="folder of a start that --keep-start kept")
    parser.add_argument("--keep-start", help="keep it in this folder")
    parser.add_argument("--keep", help="keep the run in this folder")
    parser.add_argument("--trl", action="store_true", help="TRL's GRPOTrainer, too")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.kl_coef = (0.01 if options.method == "ppo" else 0.0) if options.kl_coef is None else options.kl_coef
    if options.one:
        folder, start = options.one
        config = configuration(Path(folder), start, options)
        print("RESULT " + json.dumps(of_trl(Path(folder), start, config, options)))
        return
    if options.trl and options.method != "grpo":
        parser.error("--trl is for grpo")
    with nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory() as root:
        folder, began = Path(root), time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        template = folder / "template.jinja"
        template.write_text(TEMPLATE)
        start = options.start or begun(folder, words(5000, 1), options.begin, options.seed, template)
        if options.keep_start:
            shutil.copytree(start, options.keep_start)
        warm = time.monotonic() - began
        print(f"the start: {options.begin} steps on 5,000 examples, {warm:.0f} s", flush=True)
        config = configuration(folder, start, options)
        report = train(config, Console(quiet=True)).report
        history = records(folder / "run" / "metrics.jsonl")
        show(options, report, history, time.monotonic() - began)
        if options.trl:
            memory = max(r["memory_gb"] for r in history if r["kind"] == "train")
            beside(folder, start, options, {"seconds": report["training_seconds"], "memory": memory})


def show(options: argparse.Namespace, report: dict, history: list[dict], seconds: float) -> None:
    print("| step | reward of greedy answers, held out | KL of an answer from the start |\n| --- | --- | --- |")
    taken = [r for r in history if r["kind"] == "train"]
    for record in history:
        if record["kind"] == "evaluation":
            kl = next((f"{r['kl']:.2f}" for r in taken if r["step"] > record["step"]), f"{taken[-1]['kl']:.2f}")
            print(f"| {record['step']} | {record['reward']:.3f} | {kl} |")
    figure = report["figures"]["reward"]
    low, high = figure["change_interval"]
    critic = f", critic {options.critic}" if options.method == "ppo" else ""
    print(
        f"\n| method | base | tuned | gain (95%) | KL | seconds |\n| --- | --- | --- | --- | --- | --- |\n"
        f"| {options.method}{critic} | {figure['base']:.3f} | {figure['tuned']:.3f} | {figure['change']:.3f} "
        f"({low:.3f} to {high:.3f}) | {taken[-1]['kl']:.2f} | {seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
