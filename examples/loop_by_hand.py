"""A fine-tune by hand: Luthier's parts in one flat loop, without Config, to read or to change.

    python examples/loop_by_hand.py MODEL ROWS.jsonl [STEPS]

MODEL is a hub name, a folder or a .gguf file. The trained adapter is written to the folder `adapter_by_hand`.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from luthier.batch import Batch
from luthier.data import Data, dataset, stream
from luthier.data.masks import Renderer
from luthier.generate import Chat
from luthier.models import Model, load, network, trials
from luthier.objectives import NextToken
from luthier.optim import AdamW, Linear, schedule
from luthier.optim.clipping import clip_scale
from luthier.optim.optimizer import Optimizer
from luthier.surgery import adapters, trainable
from luthier.trainable import LoRA

name, rows = sys.argv[1], sys.argv[2]
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 60
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
torch.manual_seed(0)

# 1 data: rows -> tokens, with what is learnt of them
model_settings = Model(name=name)
tokenizer = load.load_tokenizer(model_settings)
data = Data(train=rows, max_length=512, on_bad_row="skip")
renderer = Renderer(tokenizer, data.train_on, data.max_length)
everything = dataset.settle(dataset.load(data, rows, renderer), data, None, print)
training, held_out = dataset.split(everything, min(50, len(everything) // 5), seed=0)
plan = stream.plan(
    training.lengths, examples=8, tokens=None, micro_tokens=512, pack=True, seed=0, epochs=None, max_steps=steps
)  # fmt: skip

# 2 model, with packed attention where its family allows it
model = load.load_model(model_settings, dtype, device)
net = network.Network(model)
print("padded:" if (reason := trials.prepare(net, "auto")) else "packed", reason or "")

# 3 and 4 what moves, and what is made small
lora = LoRA(r=8, lora_alpha=16)
lora.apply(model)
objective = NextToken().build()

# 5 to 7 optimiser, schedule, clipping
settings = AdamW(learning_rate=2e-3)
parameters = trainable(model)
optimizer = Optimizer(parameters, settings)


def held_out_loss() -> float:
    model.eval()
    losses = [objective.evaluate(net, Batch.pack([d]).to(device)) for d in held_out.documents]
    model.train()
    return float(sum(loss.total for loss in losses) / sum(loss.count for loss in losses))


print(f"held out before: {held_out_loss():.4f}")
for step, step_rows in enumerate(plan):
    total, count = 0.0, 0.0
    for row in step_rows:
        batch = objective.prepare(net, Batch.pack([training.documents[d] for d in row]).to(device))
        loss = objective(net, batch)
        loss.total.backward()
        total, count = total + loss.total.detach(), count + loss.count
    norm = optimizer.norm() / count
    factor = schedule.factor(Linear(), step, len(plan))
    optimizer.step(factor, clip_scale(norm, max_norm=1.0) / count)
    optimizer.zero_grad()
    rate = settings.learning_rate * factor
    print(f"step {step + 1}/{len(plan)}  loss {float(total / count):.4f}  grad {float(norm):.3f}  lr {rate:.2e}")

# 8 what it is worth now
print(f"held out after: {held_out_loss():.4f}")
prompt, wanted = renderer.prompt(held_out.conversations[0])
print("asked, and wanted:", repr(tokenizer.decode(prompt[-20:])), "->", wanted)
question = next(m["content"] for m in reversed(held_out.conversations[0].messages) if m["role"] == "user")
print("answered:", Chat(net, renderer).ask(question, max_new_tokens=48)[0])

# 10 in PEFT's layout
out = Path("adapter_by_hand")
out.mkdir(exist_ok=True)
sides = {(n.replace(".base", ""), side): getattr(a, side) for n, a in adapters(model) for side in ("lora_A", "lora_B")}
save_file(
    {f"base_model.model.{n}.{side}.weight": t.detach().cpu() for (n, side), t in sides.items()},
    out / "adapter_model.safetensors",
)
peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name, "r": 8, "lora_alpha": 16,
        "target_modules": sorted({n.rpartition(".")[2] for n, _ in sides}), "inference_mode": True}  # fmt: skip
(out / "adapter_config.json").write_text(json.dumps(peft))
print(f"written to {out}")
