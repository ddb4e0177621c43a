"""What the documents say is true: the tree, the examples, the commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.cli import VERBS
from luthier.errors import EXIT_CODES
from luthier.methods import METHODS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "luthier"


def test_the_loop_by_hand_runs_and_peft_loads_what_it_writes(tiny_model, rows_file, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ran = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "loop_by_hand.py"), str(tiny_model), str(rows_file), "12"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    before, after = (float(re.search(rf"held out {when}: ([\d.]+)", ran.stdout)[1]) for when in ("before", "after"))
    assert after < before
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter_by_hand")


def test_the_tree_in_architecture_names_every_file():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            assert path.name in text, f"ARCHITECTURE.md does not name {path.relative_to(PACKAGE)}"


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "docs/configuration.md"])
def test_links_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_readme_names_verbs_methods_and_exit_codes():
    text = (ROOT / "README.md").read_text()
    for verb in VERBS:
        assert f"luthier {verb}" in text
    for method in METHODS:
        assert f"`{method}`" in text
    assert "make demo" in text
    assert "make test" in text
    for code in EXIT_CODES:
        assert re.search(rf"\| {code} \|", text), code


def test_python_in_the_readme_runs(tiny_model, rows_file, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 2
    for i, block in enumerate(blocks):
        code = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_model)).replace(
            "rows.jsonl", str(rows_file)
        )
        ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, f"block {i}: {ran.stderr}"


def test_every_setting_is_documented():
    from luthier.config import keys

    text = (ROOT / "docs" / "configuration.md").read_text()
    for key in keys():
        assert f"`{key}`" in text, key
