"""ONNX graphs that onnxruntime runs: families, runs with adapters, shapes that stay open, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import save_model

from luthier.errors import ExportError
from luthier.export import export, onnx

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_answers_in_onnxruntime_as_in_transformers(family, tmp_path):
    """The check runs two documents at a time, one of them padded; here other numbers of texts and tokens."""
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path / "model", family)
    done = export(folder, tmp_path / "out", "onnx")
    assert done["largest_difference"] < 1e-4
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "README.md"} <= set(done["files"])
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for shape in ((1, 1), (3, 12)):
        ids = torch.randint(0, 300, shape)
        ours = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": np.ones(shape, np.int64)})[0]
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(ours), model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_run_is_written_with_its_adapter(settings, tmp_path):
    from luthier.config import configure
    from luthier.monitor import Console
    from luthier.train import train

    folder = train(configure(settings, method="lora"), Console(quiet=True)).folder
    done = export(folder, tmp_path / "out", "onnx")
    assert done["largest_difference"] < 1e-4
    assert done["checkpoint"]


def test_what_cannot_be_written_is_refused(settings, tiny_model, tmp_path, monkeypatch):
    from luthier.cli import main

    with pytest.raises(ExportError, match="in float32 alone"):
        export(tiny_model, tmp_path / "out", "onnx", "float16")
    monkeypatch.setattr(onnx, "NEEDED", ("onnx", "a_library_that_is_not_there"))
    with pytest.raises(ExportError, match=r"needs a_library_that_is_not_there: pip install luthier\[onnx\]"):
        export(tiny_model, tmp_path / "out", "onnx")
    assert main(["export", str(tiny_model), str(tmp_path / "out"), "--as", "onnx"]) == 7
    assert not list(tmp_path.glob("*out*"))
