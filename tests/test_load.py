"""Models by name: what is refused, what converts it, remote code, shards, attention that cannot be packed."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import make_model, make_tokenizer, save_model

from luthier.errors import ModelError
from luthier.models import Model, load, names, network, trials

CPU = torch.device("cpu")


def test_the_command_that_a_pickle_is_refused_with_converts_it(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    model = make_model()
    model.config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle") as caught:
        load.load_model(Model(name=str(folder)), torch.float32, CPU)
    command = re.search(r"^\s+(python -c .*)$", str(caught.value), re.M)[1]
    _, *arguments = shlex.split(command)
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True, capture_output=True)
    found = load.load_model(Model(name=str(tmp_path / "old-safetensors")), torch.float32, CPU)
    for name, p in model.named_parameters():
        assert torch.equal(p, found.get_parameter(name)), name


REMOTE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class CustomConfig(LlamaConfig):
    model_type = "custom-thing"
class Custom(LlamaForCausalLM):
    config_class = CustomConfig
"""


def test_remote_code_runs_only_when_asked_for(tmp_path):
    folder = save_model(tmp_path / "custom")
    marker = tmp_path / "it ran"
    (folder / "modeling_custom.py").write_text(REMOTE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling_custom.CustomConfig", "AutoModelForCausalLM": "modeling_custom.Custom"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "custom-thing", "auto_map": auto}))
    with pytest.raises(ModelError, match=r"set model\.trust_remote_code=true"):
        load.load_model(Model(name=str(folder)), torch.float32, CPU)
    assert not marker.exists()
    found = load.load_model(Model(name=str(folder), trust_remote_code=True), torch.float32, CPU)
    assert type(found).__name__ == "Custom"
    assert marker.exists()


def test_remote_code_of_a_known_family_is_left_alone(tmp_path):
    folder = save_model(tmp_path / "custom")
    marker = tmp_path / "it ran"
    (folder / "modeling_custom.py").write_text(REMOTE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_custom.Custom"}})
    )
    assert type(load.load_model(Model(name=str(folder)), torch.float32, CPU)).__name__ == "LlamaForCausalLM"
    assert not marker.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_are_read_in_the_wanted_dtype(tmp_path, dtype):
    model = make_model()
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    found = load.load_model(Model(name=str(tmp_path / "m")), dtype, CPU)
    for name, p in model.named_parameters():
        assert torch.equal(p.to(dtype), found.get_parameter(name)), name


def test_what_is_on_the_disk_is_judged_before_it_is_opened(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in str(names.problem(Model(name=str(tmp_path / "empty")))).replace("without", "no")
    assert "does not exist" in str(names.problem(Model(name="./nowhere")))
    assert names.problem(Model(name="org/model")) is None


def test_dropout_inside_attention_is_kept_by_sdpa():
    """GPT-2 drops attention by default: on a CPU the packed path has it, too, and stays exact without it."""
    model = make_model("gpt2")
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.5
    model.config.attn_pdrop = 0.5
    model.train()
    net = network.Network(model)
    assert trials.prepare(net, "packed") is None
    assert model.training
