"""Values computed once for every row: the same as now, kept whole, computed again only where they must be."""

from __future__ import annotations

import pytest
import torch
from test_preference import pairs as pairs

from luthier import ahead, configure
from luthier.assemble import assemble
from luthier.batch import Batch
from luthier.data import dataset


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
