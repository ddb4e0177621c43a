"""Optimisers against PyTorch, transformers, bitsandbytes, schedulefree and by hand; groups, rounding, fused, resume."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from pydantic import TypeAdapter
from safetensors.torch import load_file

from luthier import checkpoint, configure, open_run, steps, train
from luthier.errors import ConfigError
from luthier.measured import Measured
from luthier.monitor import Console, records
from luthier.optim import SGD, AdamW, Optim, adamw_8bit
from luthier.optim.muon import orthogonalised
from luthier.optim.optimizer import Optimizer
from luthier.optim.rounding import round_, seed_of
from luthier.surgery import replaced, roles, trainable
from luthier.train import Trainer

QUIET = Console(quiet=True)
HERE = {"model": "owner/name", "data": "owner/rows"}
KINDS = ["adamw", "adamw_8bit", "adafactor", "sgd", "lion", "muon", "schedule_free_adamw"]
SHAPES = {"matrix": (24, 16), "vector": (24,), "stack": (3, 6, 4)}


def made(kind, **fields):
    return TypeAdapter(Optim).validate_python({"kind": kind, **fields})


def weights(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def follow(config, reference, shapes=SHAPES, count=12, before=lambda p: None, factors=None):
    """Our weights and another library's after the same gradients; `reference` makes its optimiser from parameters."""
    ours, theirs = weights(shapes), weights(shapes)
    optimizer, other = Optimizer(ours, config), reference(list(theirs.values()))
    generator = torch.Generator().manual_seed(1)
    for step in range(count):
        factor = factors[step] if factors else 1.0
        for name, p in ours.items():
            gradient = torch.randn(p.shape, generator=generator)
            p.grad, theirs[name].grad = gradient * 8, gradient
            before(theirs[name])
        optimizer.step(factor, torch.tensor(1 / 8))
        optimizer.zero_grad()
        for group in other.param_groups if factors else ():
            group["lr"] = config.learning_rate * factor
        other.step()
    return ours, theirs, optimizer, other


def assert_equal(ours, theirs, rtol=1e-5, atol=1e-6):
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------------- oracles


def test_adamw_equals_that_of_pytorch():
    config = made("adamw", learning_rate=1e-2, adam_beta1=0.8, adam_beta2=0.95)
    for factors in (None, [(i + 1) / 12 for i in range(12)]):
        found = follow(config, lambda p: torch.optim.AdamW(p, betas=(0.8, 0.95), lr=1e-2, weight_decay=0.0),
                       factors=factors)  # fmt: skip
        assert_equal(*found[:2])


@pytest.mark.parametrize("extra", [{}, {"scale_parameter": True}, {"beta1": 0.9, "weight_decay": 0.1}])
def test_adafactor_equals_that_of_transformers(extra):
    from transformers.optimization import Adafactor

    def reference(p):
        wanted = {"scale_parameter": False, "relative_step": False, "weight_decay": 0.0} | extra
        return Adafactor(p, lr=1e-2, **wanted)

    shapes = {n: s for n, s in SHAPES.items() if n != "vector"} if "weight_decay" in extra else SHAPES
    ours, theirs, optimizer, _ = follow(made("adafactor", learning_rate=1e-2, **extra), reference, shapes)
    assert_equal(ours, theirs)
    assert optimizer.slots["matrix"]["exp_avg_sq_row"].shape == (24,)
    assert optimizer.slots["matrix"]["exp_avg_sq_col"].shape == (16,)


@pytest.mark.parametrize("extra", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_equals_that_of_pytorch(extra, decay):
    """Decoupled decay is a product before PyTorch's step."""

    def decayed(p):
        with torch.no_grad():
            p.mul_(1 - 1e-2 * (decay if p.ndim >= 2 else 0.0))

    config = made("sgd", learning_rate=1e-2, weight_decay=decay, **extra)
    assert_equal(*follow(config, lambda p: torch.optim.SGD(p, 1e-2, **extra), before=decayed)[:2])


def test_lion_by_hand():
    """Weight 2, gradients 1 and -3, beta 0.5 and 0.75, rate 0.1, decay 0.5.

    u1 = sign(0.5 * 0 + 0.5 * 1) = 1, w = 2 (1 - 0.05) - 0.1 = 1.8, m = 0.25;
    u2 = sign(0.5 * 0.25 - 0.5 * 3) = -1, w = 1.8 * 0.95 + 0.1 = 1.81, m = 0.75 * 0.25 - 0.25 * 3 = -0.5625.
    """
    w = torch.nn.Parameter(torch.tensor([[2.0]]))
    config = made("lion", learning_rate=0.1, weight_decay=0.5, lion_beta1=0.5, lion_beta2=0.75)
    optimizer = Optimizer({"w": w}, config)
    for gradient, weight, m in ((1.0, 1.8, 0.25), (-3.0, 1.81, -0.5625)):
        w.grad = torch.tensor([[gradient]])
        optimizer.step(1.0, torch.tensor(1.0))
        assert w.item() == pytest.approx(weight)
        assert optimizer.slots["w"]["exp_avg"].item() == pytest.approx(m)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon_equals_that_of_pytorch(adjust, nesterov, monkeypatch):
    """In bfloat16, in which PyTorch's is made: to its rounding."""
    import luthier.optim.muon as ours_file

    monkeypatch.setattr(ours_file, "orthogonalised", lambda m, n: orthogonalised(m, n, torch.bfloat16))
    shapes = {"wide": (8, 24), "tall": (24, 8), "square": (16, 16)}
    config = made("muon", learning_rate=1e-2, weight_decay=0.1, adjust_lr_fn=adjust, nesterov=nesterov)
    ours, theirs, *_ = follow(
        config,
        lambda p: torch.optim.Muon(p, 1e-2, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn=adjust),
        shapes,
    )
    moved = weights(shapes)
    for name, p in ours.items():
        difference = (p - theirs[name]).norm() / (theirs[name] - moved[name]).norm()
        assert difference < 0.02, name


def test_newton_schulz_makes_singular_values_about_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((20, 50), (50, 20), (3, 20, 50)):
        matrix = torch.randn(shape, generator=generator)
        found = orthogonalised(matrix, 5)
        values = torch.linalg.svdvals(found)
        assert found.shape == matrix.shape
        assert values.min() > 0.6
        assert values.max() < 1.3
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), 0) > 0.98
    assert orthogonalised(torch.zeros(3, 4), 5).eq(0).all()


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model = make_model("llama")
    optimizer = Optimizer(
        trainable(model), made("muon", adamw_learning_rate=3e-3, learning_rate=2e-2), roles=roles(model)
    )  # fmt: skip
    by_muon = {n for n, slots in optimizer.slots.items() if "momentum" in slots}
    assert by_muon == {n for n in trainable(model) if "proj" in n}
    assert {b.hidden: b.rate for b in optimizer.buckets} == {True: 2e-2, False: 3e-3}
    assert any("hidden matrices by Muon" in line for line in optimizer.describe())
    ours, theirs, *_ = follow(made("muon", learning_rate=1e-2), lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0),
                              {"vector": (9,)})  # fmt: skip
    assert_equal(ours, theirs)


@pytest.mark.parametrize("extra", [{}, {"r": 1.0, "weight_lr_power": 1.0}])
def test_schedule_free_equals_its_authors(extra):
    from schedulefree import AdamWScheduleFree

    shapes = {"matrix": (24, 16), "stack": (3, 6, 4)}
    config = made("schedule_free_adamw", learning_rate=1e-2, weight_decay=0.1, **extra)

    def reference(p):
        other = AdamWScheduleFree(p, lr=1e-2, weight_decay=0.1, warmup_steps=5, foreach=False, **extra)
        other.train()
        return other

    ours, theirs = weights(shapes), weights(shapes)
    optimizer, other = Optimizer(ours, config), reference(list(theirs.values()))
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        for name, p in ours.items():
            p.grad = torch.randn(p.shape, generator=generator)
            theirs[name].grad = p.grad.clone()
        optimizer.step(min(1.0, (step + 1) / 5), torch.tensor(1.0))
        other.step()
    assert_equal(ours, theirs)
    trained = {n: p.detach().clone() for n, p in ours.items()}
    other.eval()
    with replaced(optimizer.parameters, optimizer.averaged()):
        assert_equal(ours, theirs)
        assert not torch.equal(ours["matrix"], trained["matrix"])
    assert all(torch.equal(p, trained[n]) for n, p in ours.items())
    assert_equal(optimizer.averaged(), theirs)


def test_the_average_of_schedule_free_by_hand():
    """With equal weights x is the mean of all z: for SGD-like signs (Adam's first step is a sign), to the eye."""
    w = torch.nn.Parameter(torch.tensor([[1.0]]))
    optimizer = Optimizer({"w": w}, made("schedule_free_adamw", learning_rate=0.1, adam_epsilon=1e-12))
    z = []
    for _ in range(5):
        w.grad = torch.tensor([[1.0]])
        optimizer.step(1.0, torch.tensor(1.0))
        z.append(optimizer.slots["w"]["z"].item())
    assert z == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    assert optimizer.averaged()["w"].item() == pytest.approx(sum(z) / 5)
    assert w.item() == pytest.approx(0.9 * sum(z) / 5 + 0.1 * z[-1])


# ---------------------------------------------------------------------------- 8 bits


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_and_its_rounding_equal_those_of_bitsandbytes(signed):
    import bitsandbytes.functional as bnb

    assert adamw_8bit.codes(signed).tolist() == pytest.approx(bnb.create_dynamic_map(signed).tolist(), abs=1e-7)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    values = values if signed else values.square()
    code, largest = torch.empty(1000, dtype=torch.uint8), torch.empty(4)
    adamw_8bit.quantise(values, code, largest, signed)
    theirs, state = bnb.quantize_blockwise(values, code=bnb.create_dynamic_map(signed), blocksize=256)
    assert (code != theirs).float().mean() < 0.05  # on a CPU theirs looks values up in a coarse table
    torch.testing.assert_close(largest, state.absmax)
    back = adamw_8bit.dequantised(code, largest, signed)
    their_back = bnb.dequantize_blockwise(theirs, state)
    assert ((back - values).abs() <= (their_back - values).abs() + 1e-6).all()
    torch.testing.assert_close(back, values, rtol=0.1, atol=0.02)


def test_adamw_in_8_bits_equals_that_of_bitsandbytes_and_follows_adamw():
    import bitsandbytes

    shapes = {"matrix": (70, 100), "vector": (24,)}  # 28 blocks, the last of 88; and one that stays in float32
    config = made("adamw_8bit", learning_rate=1e-2)
    ours, theirs, optimizer, other = follow(
        config, lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2, weight_decay=0.0), shapes
    )
    exact, *_ = follow(made("adamw", learning_rate=1e-2), lambda p: torch.optim.AdamW(p, 1e-2), shapes)
    start = weights(shapes)
    state = other.state[theirs["matrix"]]
    assert state["state1"].dtype == torch.uint8
    for found, most in ((theirs, 0.03), (exact, 0.15)):
        assert (ours["matrix"] - found["matrix"]).norm() / (found["matrix"] - start["matrix"]).norm() < most
    assert torch.equal(ours["vector"], exact["vector"])
    slots = optimizer.slots["matrix"]
    assert {n: (t.dtype, len(t)) for n, t in slots.items()} == {
        "exp_avg": (torch.uint8, 7000), "exp_avg_absmax": (torch.float32, 28),
        "exp_avg_sq": (torch.uint8, 7000), "exp_avg_sq_absmax": (torch.float32, 28),
    }  # fmt: skip
    torch.testing.assert_close(slots["exp_avg_absmax"], state["absmax1"], rtol=0.05, atol=1e-4)


def test_8_bits_in_chunks_of_any_size_are_the_same(monkeypatch):
    ends = []
    for chunk in (256, 512, adamw_8bit.CHUNK):
        monkeypatch.setattr(adamw_8bit, "CHUNK", chunk)
        ours, *_ = follow(made("adamw_8bit", learning_rate=1e-2), lambda p: torch.optim.SGD(p, 0.0), {"m": (70, 100)})
        ends.append(ours["m"].detach())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_a_second_moment_in_8_bits_is_never_rounded_to_zero():
    """A gradient 10,000 times smaller than its block's largest: its square is 10^8 times smaller, beyond the code."""
    w = torch.nn.Parameter(torch.zeros(4096))
    optimizer = Optimizer({"w": w}, made("adamw_8bit", learning_rate=1.0))
    w.grad = torch.full((4096,), 1e-4)
    w.grad[0] = 1.0
    optimizer.step(1.0, torch.tensor(1.0))
    w.grad[:] = 0
    optimizer.step(1.0, torch.tensor(1.0))
    assert w.abs().max() < 2  # without it, 1e-5 / 1e-8


# ---------------------------------------------------------------------------- freshness and groups


def test_a_parameter_that_moves_later_begins_afresh():
    """Bias corrections count the parameter's own steps."""
    late, reference = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    early = torch.nn.Parameter(torch.ones(4))
    optimizer, other = Optimizer({"early": early, "late": late}, AdamW()), torch.optim.AdamW([reference], 1e-4)
    for step in range(30):
        early.grad = torch.ones(4)
        if step >= 20:
            late.grad, reference.grad = torch.full((4,), 0.1 * step), torch.full((4,), 0.1 * step)
            other.param_groups[0]["weight_decay"] = 0
            other.step()
        optimizer.step(1.0, torch.tensor(1.0))
        optimizer.zero_grad()
    torch.testing.assert_close(late, reference)
    assert optimizer.counts == {"early": 30, "late": 10}


def rates(optimizer):
    return {name: (b.rate, b.decay) for b in optimizer.buckets for name in b.names}


def test_groups_have_rates_and_decays_of_their_own():
    model = make_model("llama")
    groups = [
        {"patterns": "layers.0", "lr_scale": 0.5},
        {"patterns": ["*.mlp.*", "re:.*q_proj.*"], "learning_rate": 7e-3, "weight_decay": 0.0},
        {"patterns": "embed_tokens", "weight_decay": 0.3},
    ]
    optimizer = Optimizer(trainable(model), made("adamw", learning_rate=1e-2, weight_decay=0.1, groups=groups))
    found = rates(optimizer)
    assert found["model.layers.0.mlp.up_proj.weight"] == (5e-3, 0.1)  # the first group that names it
    assert found["model.layers.0.input_layernorm.weight"] == (5e-3, 0.0)  # norms never decay
    assert found["model.layers.1.mlp.up_proj.weight"] == (7e-3, 0.0)
    assert found["model.layers.1.self_attn.q_proj.weight"] == (7e-3, 0.0)
    assert found["model.layers.1.self_attn.k_proj.weight"] == (1e-2, 0.1)
    assert found["model.embed_tokens.weight"] == (1e-2, 0.3)
    assert found["lm_head.weight"] == (1e-2, 0.1)
    assert found["model.norm.weight"] == (1e-2, 0.0)
    told = optimizer.describe()
    assert sum("optim.groups[0]" in line for line in told) == 2
    assert "at rate 0.007, decay 0 (optim.groups[1])" in "\n".join(told)


def test_groups_equal_the_groups_of_pytorch():
    ours, theirs = weights(), weights()
    config = made("adamw", learning_rate=1e-2, groups=[{"patterns": "stack", "lr_scale": 0.1, "weight_decay": 0.5}])
    optimizer = Optimizer(ours, config)
    other = torch.optim.AdamW(
        [{"params": [theirs["matrix"], theirs["vector"]], "lr": 1e-2, "weight_decay": 0.0},
         {"params": [theirs["stack"]], "lr": 1e-3, "weight_decay": 0.5}]
    )  # fmt: skip
    for _ in range(5):
        for name, p in ours.items():
            p.grad = torch.randn_like(p)
            theirs[name].grad = p.grad.clone()
        optimizer.step(1.0, torch.tensor(1.0))
        other.step()
    assert_equal(ours, theirs)


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ([{"patterns": "layers.0.mpl", "lr_scale": 2}], "matches no parameter that moves; did you mean 'model.lay"),
        ([{"patterns": "q_prj", "lr_scale": 2}], "did you mean 'q_proj'?"),
        ([{"patterns": "norm", "weight_decay": 0.1}], "norms and biases never decay"),
        ([{"patterns": "*", "lr_scale": 2}, {"patterns": "q_proj", "lr_scale": 3}], "belongs to groups before it"),
    ],
)
def test_a_group_that_does_nothing_is_an_error(groups, told):
    with pytest.raises(ConfigError) as caught:
        Optimizer(trainable(make_model("llama")), made("adamw", groups=groups))
    assert told in str(caught.value)


def test_loraplus_is_the_rate_of_b(settings, tmp_path, capsys):
    extra = {"optim": {"loraplus_lr_ratio": 16, "kind": "sgd"}, "trainable": {"r": 4}, "max_steps": 1,
             "clipping": "none"}  # fmt: skip
    trainer = Trainer(configure(settings, extra), Console())
    assert "(LoRA+)" in capsys.readouterr().err
    found = rates(trainer.optimizer)
    assert {rate for n, (rate, _) in found.items() if n.endswith("lora_B")} == {0.16}
    assert {rate for n, (rate, _) in found.items() if n.endswith("lora_A")} == {1e-2}
    before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    trainer.run()
    without = {"optim": {"loraplus_lr_ratio": None}, "output_dir": str(tmp_path / "plain")}
    plain = Trainer(configure(settings, extra, without), QUIET)
    plain.run()
    for name, p in trainer.parameters.items():
        times = 16 if name.endswith("lora_B") else 1
        other = plain.parameters[name]
        torch.testing.assert_close(p - before[name], (other - before[name]) * times, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------------- rounding


def test_stochastic_rounding_is_right_on_average():
    """1 + 2^-9 lies a quarter of the way from 1 to its neighbour in bfloat16, 1 + 2^-7."""
    exact = torch.full((100_000,), 1 + 2**-9)
    rounded = torch.empty(100_000, dtype=torch.bfloat16)
    round_(rounded, exact, seed=3)
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    share = rounded.float().gt(1).float().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 100_000)
    round_(rounded, -exact, seed=4)
    assert abs(rounded.float().mean().item() + 1 + 2**-9) < 5 * 2**-7 * math.sqrt(0.25 * 0.75 / 100_000)


def test_stochastic_rounding_keeps_what_bfloat16_holds_and_what_is_not_finite():
    held = torch.randn(1000).bfloat16()
    rounded = torch.empty_like(held)
    round_(rounded, held.float(), seed=1)
    assert torch.equal(rounded, held)
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    rounded = torch.empty(4, dtype=torch.bfloat16)
    round_(rounded, odd, seed=1)
    assert rounded.tolist()[:2] == [float("inf"), float("-inf")]
    assert rounded[2].isnan()
    assert rounded[3] == 0


def test_seeds_are_functions_of_run_name_and_step():
    seeds = {seed_of(s, n, c) for s in range(3) for n in ("a", "b") for c in range(50)}
    assert len(seeds) == 300
    assert all(0 <= s < 2**31 for s in seeds)
    assert seed_of(1, "a", 2) == seed_of(1, "a", 2)


@pytest.mark.parametrize("kind", KINDS)
def test_small_steps_in_bfloat16(kind):
    """Two hundred steps of 2^-11 from 1, each an eighth of half a unit: lost to the nearest, kept by the other two."""
    ends = {}
    for rounding in ("master", "stochastic", "nearest"):
        w = torch.nn.Parameter(torch.ones(64, 64).bfloat16())
        config = made(kind, learning_rate=2**-11, rounding=rounding)
        optimizer = Optimizer({"w": w}, config, roles={"w": "embedding"})
        for _ in range(200):
            w.grad = torch.ones(64, 64).bfloat16()
            optimizer.step(1.0, torch.tensor(1.0))
        ends[rounding] = w.detach().float().mean().item()
        assert bool(optimizer.masters) == (rounding == "master")
        assert w.dtype == torch.bfloat16
    assert ends["stochastic"] == pytest.approx(ends["master"], abs=4e-3)
    assert ends["master"] < 0.97 if kind != "schedule_free_adamw" else ends["master"] < 0.99
    assert ends["nearest"] == 1.0


def test_rounding_needs_weights_in_16_bits():
    with pytest.raises(ConfigError, match="all that moves is kept in float32"):
        Optimizer(weights(), made("adamw", rounding="stochastic"))
    half = {"w": torch.nn.Parameter(torch.ones(2).half())}
    with pytest.raises(ConfigError, match="stochastic is for bfloat16"):
        Optimizer(half, made("adamw", rounding="stochastic"))


# ---------------------------------------------------------------------------- runs


def run(settings, folder, *extra, until=None, method="full"):
    """A run's folder; with `until` as it is when a process dies after that step."""
    config = configure(settings, {"output_dir": str(folder), "checkpoint": {"every": 2}}, *extra, method=method)
    for step in steps(config, QUIET):
        if step.step == until:
            break
    return folder


def last(folder):
    """The bytes of the last checkpoint."""
    found = checkpoint.listed(folder / "checkpoints")[-1]
    return {p.name: p.read_bytes() for p in sorted(found.iterdir())}


RESUMED = [(kind, "float32", "master") for kind in KINDS] + [
    *[(kind, "bfloat16", "stochastic") for kind in KINDS],
    ("adamw", "bfloat16", "master"), ("adamw", "bfloat16", "nearest"), ("muon", "bfloat16", "master"),
    ("schedule_free_adamw", "bfloat16", "master"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype", "rounding"), RESUMED)
def test_killed_and_resumed_ends_with_the_same_bytes(settings, tmp_path, kind, dtype, rounding):
    extra = {
        "optim": {"kind": kind, "rounding": rounding, "learning_rate": 1e-3, "weight_decay": 0.1},
        "precision": {"dtype": dtype}, "max_steps": 5,
    }  # fmt: skip
    if kind == "adamw_8bit":
        extra["optim"]["min_8bit_size"] = 256
    if kind == "sgd":
        extra["optim"] |= {"momentum": 0.9, "learning_rate": 0.1}
    run(settings, tmp_path / "whole", extra)
    run(settings, tmp_path / "parted", extra, until=3)
    torch.manual_seed(99)
    run(settings, tmp_path / "parted", extra)
    assert last(tmp_path / "whole") == last(tmp_path / "parted")
    losses = [r["loss"] for r in records(tmp_path / "whole" / "metrics.jsonl") if r["kind"] == "train"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimiser_learns_with_lora(settings, tmp_path, kind):
    rate = {"lion": 2e-3, "muon": 3e-3, "sgd": 0.3}.get(kind, 1e-2)
    extra = {"optim": {"kind": kind, "learning_rate": rate}, "trainable": {"r": 4}, "max_steps": 20}
    config = configure(settings, extra, {"output_dir": str(tmp_path / kind)})
    report = train(config, QUIET).report
    assert report["held_out_loss"]["tuned"] < report["held_out_loss"]["base"] - 0.05


def test_what_is_evaluated_and_exported_is_the_average(settings, tmp_path):
    extra = {"optim": {"kind": "schedule_free_adamw"}, "trainable": {"r": 4}, "max_steps": 8}
    folder = run(settings, tmp_path / "run", extra, method="lora")
    config = configure(folder / "config.yaml")
    assert config.schedule.kind == "constant"
    kept = checkpoint.listed(folder / "checkpoints")[-1]
    trained, averaged = (load_file(kept / f"{n}.safetensors") for n in ("weights", "deployed"))
    assert set(trained) == set(averaged)
    assert any(not torch.equal(t, averaged[n]) for n, t in trained.items())
    result = open_run(folder)
    assert result.export(tmp_path / "out")["largest_difference"] < 1e-4
    exported = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj.lora_A"
    assert torch.equal(exported[f"base_model.model.{name}.weight"], averaged[name])
    from luthier import evaluate
    from luthier.assemble import restore

    made_again, _ = restore(folder)
    trainer = Trainer(config, QUIET)
    assert trainer.step == 8
    found = Measured({"held_out": evaluate.held_out(made_again, trainer.validation, 64)}).values()["loss"]
    assert found == pytest.approx(result.report["held_out_loss"]["tuned"], rel=1e-6)
    raw = Measured({"held_out": evaluate.held_out(trainer.made, trainer.validation, 64)}).values()["loss"]
    assert raw != pytest.approx(found, rel=1e-6)


# ---------------------------------------------------------------------------- fused into the backward pass

ONE_ROW = {"batch": {"examples": 4, "micro_tokens": 512}, "clipping": "none", "max_steps": 4}


@pytest.mark.parametrize(
    ("kind", "clipping"),
    [*((kind, {"kind": "none"}) for kind in KINDS), ("adamw", {"kind": "value", "clip_value": 0.05}),
     ("adamw", {"kind": "adaptive"}), ("muon", {"kind": "adaptive"})],
)  # fmt: skip
def test_fused_into_the_backward_pass_ends_with_the_same_weights(settings, tmp_path, kind, clipping):
    extra = {"optim": {"kind": kind, "learning_rate": 1e-3}, "clipping": clipping}
    for fused in (False, True):
        run(settings, tmp_path / str(fused), ONE_ROW, extra, {"optim": {"fused_backward": fused}})
    one, other = last(tmp_path / "False"), last(tmp_path / "True")
    assert one["weights.safetensors"] == other["weights.safetensors"]
    assert one.get("optimizer.safetensors") == other.get("optimizer.safetensors")
    norms = [[r["grad_norm"] for r in records(tmp_path / n / "metrics.jsonl") if r["kind"] == "train"]
             for n in ("False", "True")]  # fmt: skip
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_never_coexist_where_the_step_is_fused(settings, fused):
    config = configure(settings, ONE_ROW, {"optim": {"fused_backward": fused}}, method="full")
    trainer = Trainer(config, QUIET)
    parameters = list(trainer.parameters.values())
    alive = []

    def count(_):
        alive.append(sum(p.grad is not None for p in parameters))

    for p in parameters:
        p.register_post_accumulate_grad_hook(count)  # after the optimiser's own
    trainer._take()
    assert len(alive) == len(parameters)
    assert max(alive) == (0 if fused else len(parameters))


def test_fused_and_resumed_with_rounding(settings, tmp_path):
    extra = {"optim": {"fused_backward": True, "rounding": "stochastic", "learning_rate": 1e-3},
             "precision": {"dtype": "bfloat16"}}  # fmt: skip
    run(settings, tmp_path / "whole", ONE_ROW, extra)
    run(settings, tmp_path / "parted", ONE_ROW, extra, until=3)
    run(settings, tmp_path / "parted", ONE_ROW, extra)
    assert last(tmp_path / "whole") == last(tmp_path / "parted")
    run(settings, tmp_path / "plain", ONE_ROW, extra, {"optim": {"fused_backward": False}})
    assert last(tmp_path / "plain")["weights.safetensors"] == last(tmp_path / "whole")["weights.safetensors"]


def test_fused_with_tied_weights(tmp_path, settings):
    """A tied weight has its whole gradient only when both of its places have theirs."""
    from conftest import _llama, make_tokenizer

    torch.manual_seed(0)
    _llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    make_tokenizer().save_pretrained(tmp_path / "tied")
    for fused in (False, True):
        extra = {"model": str(tmp_path / "tied"), "optim": {"fused_backward": fused},
                 "parallel": {"activation_checkpointing": 1}}  # fmt: skip
        run(settings, tmp_path / str(fused), ONE_ROW, extra)
    assert last(tmp_path / "False")["weights.safetensors"] == last(tmp_path / "True")["weights.safetensors"]


def test_fused_is_refused_where_gradients_must_be_added(settings, monkeypatch):
    fused = {"optim": {"fused_backward": True}}
    with pytest.raises(ConfigError, match="use clipping=none"):
        configure(settings, fused)
    monkeypatch.setattr("luthier.assemble.assemble", None)
    many = configure(settings, fused, ONE_ROW, {"batch": {"micro_tokens": 64}})
    with pytest.raises(ConfigError, match="allows one row a step, and here a step has up to"):
        Trainer(many, QUIET)
    two = SimpleNamespace(world=2, first=True, rank=0)
    monkeypatch.setattr(sys.modules["luthier.train"], "Ranks", lambda config: two)
    with pytest.raises(ConfigError, match="is for one process, and here are 2"):
        Trainer(configure(settings, fused, ONE_ROW), QUIET)


# ---------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim=adamw_torch", "did you mean 'adamw'?"),
        ("optim=paged_adamw_8bit", "did you mean 'adamw_8bit'?"),
        ("optim=adamw_bnb_8bit", "did you mean 'adamw_8bit'?"),
        ("optim=schedule_free", "did you mean 'schedule_free_adamw'?"),
        ("optim=adafacter", "did you mean 'adafactor'?"),
        ("optim.momentum=0.9", "it is a setting of optim.kind=sgd or muon"),
        ("optim={kind: sgd, nesterov: true}", "optim.nesterov=true needs optim.momentum"),
        ("optim={kind: lion, adam_beta1: 0.9}", "it is a setting of optim.kind=adamw or adamw_8bit"),
        ("optim.groups=[{patterns: a, lr_scale: 2, learning_rate: 1}]", "optim.groups[0]: learning_rate and lr_scale"),
        ("optim.groups=[{patterns: a}]", "optim.groups[0] changes nothing"),
        ("optim.groups=[{patterns: [], lr_scale: 2}]", "optim.groups[0].patterns: names nothing"),
        ("optim.groups=[{pattern: a}]", "optim.groups[0].pattern: unknown key; did you mean 'patterns'?"),
        ("optim.groups=[{patterns: a, lr_scale: 0}]", "optim.groups[0].lr_scale=0: should be greater than 0"),
        ("optim.loraplus_lr_ratio=0", "optim.loraplus_lr_ratio=0: should be greater than 0"),
        ("optim.rounding=random", "optim.rounding='random': should be 'master', 'stochastic' or 'nearest'"),
        ("{optim: {rounding: stochastic}, precision: {dtype: float32}}", "precision.dtype=bfloat16"),
        ("{optim: {fused_backward: true}, clipping: none, batch: {tokens: 8192}}", "use batch.micro_tokens=8192"),
        ("{optim: schedule_free_adamw, schedule: cosine}", "use schedule.kind=constant"),
        ("optim={kind: muon, ns_steps: 0}", "optim.ns_steps=0: should be greater than or equal to 1"),
        ("optim={kind: schedule_free_adamw, adam_beta1: 0.0}", "optim.adam_beta1=0.0: should be greater than 0"),
        ("optim={kind: adafactor, decay_rate: 0.8}", "optim.decay_rate=0.8: should be less than 0"),
    ],
)
def test_a_mistake_is_explained(override, told):
    import yaml

    given = yaml.safe_load(override) if override.startswith("{") else override
    with pytest.raises(ConfigError) as caught:
        configure(HERE, given)
    assert told in "\n".join(caught.value.problems)


def test_loraplus_needs_a_lora():
    with pytest.raises(ConfigError, match=r"trainable\.kind is full: leave it out, or use method=lora"):
        configure(HERE, "optim.loraplus_lr_ratio=16", method="full")
    with pytest.raises(ConfigError, match="no matrix B of a LoRA moves here"):
        Optimizer(weights(), SGD(loraplus_lr_ratio=4.0))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_survives_its_own_yaml(kind, tmp_path):
    config = configure(HERE, {"optim": kind}, "optim.groups=[{patterns: [q_proj], lr_scale: 0.5}]")
    (tmp_path / "config.yaml").write_text(config.dump())
    assert configure(tmp_path / "config.yaml") == config
    assert config.optim.kind == kind
    assert config.optim.learning_rate == 2e-4  # the method's


def test_the_schema_lets_a_kind_be_left_out():
    from luthier.config import schema

    made_schema = schema()
    references = made_schema["properties"]["optim"]["anyOf"][0]["discriminator"]["mapping"]
    required = {kind: "kind" in made_schema["$defs"][r.rpartition("/")[2]].get("required", [])
                for kind, r in references.items()}  # fmt: skip
    assert required == {kind: kind != "adamw" for kind in KINDS}
