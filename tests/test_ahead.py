"""Values computed once for every row: the same as now, kept whole, computed again only where they must be."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_preference import pairs as pairs
from test_preference import unpaired as unpaired
from test_ranks import run_on_two

from luthier import ahead, checkpoint, configure, train
from luthier.assemble import assemble
from luthier.batch import Batch
from luthier.data import dataset
from luthier.monitor import Console, records


@pytest.fixture
def kept(pairs, monkeypatch):
    """A network, its rows, and files of five rows each."""
    monkeypatch.setattr(ahead, "STRETCH", 5)
    made = assemble(configure(pairs, {"objective": {"precompute_ref_log_probs": True}}, method="dpo"))
    rows, _ = dataset.open_rows(made.config.data, made.renderer, None, print, print)
    return made, rows


def silent(text: str) -> None:
    pass


def test_what_is_computed_ahead_is_what_is_computed_now(kept, tmp_path):
    made, rows = kept
    known = ahead.known(made, rows, tmp_path / "ahead", silent, silent)
    assert len(list((tmp_path / "ahead").glob("*.safetensors"))) == -(-len(rows) // 5)
    batch = Batch.pack(known.documents[3:9])
    with made.reference() as network:
        now = made.objective.ahead(network, Batch.pack(rows.documents[3:9]))["reference"]
    torch.testing.assert_close(batch.token_fields["reference"][batch.trained], now, atol=1e-5, rtol=1e-5)
    assert not batch.token_fields["reference"][batch.weights == 0].any()
    assert known.documents[-1].fields["reference"].shape == known.documents[-1].tokens.shape
    assert known.fingerprint() == rows.fingerprint()


def test_what_is_there_is_not_computed_again(kept, tmp_path, monkeypatch):
    """Killed in the middle, with another key, and damaged."""
    made, rows = kept
    folder, computed, whole = tmp_path / "ahead", [], ahead._stretch

    def stretch(made, documents):
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(documents[0].row)
        return whole(made, documents)

    monkeypatch.setattr(ahead, "_stretch", stretch)
    with pytest.raises(KeyboardInterrupt):
        ahead.known(made, rows, folder, silent, silent)
    computed.clear()
    monkeypatch.setattr(ahead, "_stretch", lambda made, documents: computed.append(1) or whole(made, documents))
    ahead.known(made, rows, folder, silent, silent)
    files = -(-len(rows) // 5)
    assert len(computed) == files - 3
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    computed.clear()
    told = []
    ahead.known(made, rows, folder, told.append, told.append)
    assert not computed
    assert not told
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    ahead.known(made, rows, folder, silent, told.append)
    assert len(computed) == files
    assert "was changed after it was written" in told[0]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    computed.clear()
    ahead.known(made, rows.subset(range(20)), folder, silent, silent)
    assert len(computed) == 4, "other rows have other values"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_values_of_several_numbers_come_back(kept, tmp_path, dtype):
    """As the outputs of a teacher: [N, 3], here where each token is predicted and which it is."""
    made, rows = kept

    def several(network, batch):
        at = batch.trained
        return {"outputs": torch.stack([batch.positions[at], batch.targets[at], 0 * at], 1).to(dtype)}

    made.objective.ahead = several
    known = ahead.known(made, rows, tmp_path / "ahead", silent, silent)
    batch = Batch.pack(list(known.documents)[:7])
    found = batch.token_fields["outputs"]
    assert found.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    at = batch.trained
    wanted = torch.stack([batch.positions[at], batch.targets[at], 0 * at], 1).to(dtype)
    assert torch.equal(found[at].to(dtype), wanted)


def test_auto_is_decided_with_the_run(pairs):
    def chosen(**extra):
        return configure(pairs | {"max_steps": None}, extra, method="dpo").objective.precompute_ref_log_probs

    assert chosen() is False, "once is once"
    assert chosen(epochs=2) is True
    assert chosen(trainable="full") is True, "no first values have to be kept"
    assert chosen(trainable="full", max_steps=5) is False
    assert chosen(epochs=2, objective={"precompute_ref_log_probs": False}) is False
    assert chosen(epochs=2, max_steps=5) is False


def test_two_ranks_share_what_is_computed_ahead_and_kto_s_reference_point(unpaired, tmp_path):
    """KTO of every weight: values ahead by both ranks, the point z over all rows of a step."""
    extra = {
        "trainable": {"kind": "full"}, "objective": {"beta": 0.5}, "max_steps": None, "data": {"validation": 20},
        "batch": {"examples": 10, "micro_tokens": 200}, "optim": {"learning_rate": 1e-3},
    }  # fmt: skip
    train(configure(unpaired, extra, method="kto"), Console(quiet=True))
    both = configure(unpaired, extra, {"output_dir": str(tmp_path / "two")}, method="kto").model_dump(mode="json")
    assert both["objective"]["precompute_ref_log_probs"] is True
    assert run_on_two(both) == [0, 0]
    one, two = (list(records(tmp_path / name / "metrics.jsonl")) for name in ("run", "two"))
    assert len(one) == len(two) > 4
    assert any(r["kl"] > 0 for r in one)
    assert sum("rewards/margins" in r for r in one) > 3
    for a, b in zip(one, two):
        assert set(a) == set(b)  # of a step without one side, neither has its means
        for name in [n for n in ("loss", "kl", "rewards/margins", "logps/chosen") if n in a]:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-3), (a["kind"], a["step"], name)
    one, two = (load_file(checkpoint.listed(tmp_path / n / "checkpoints")[-1] / "weights.safetensors")
                for n in ("run", "two"))  # fmt: skip
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=2e-4, msg=name)
