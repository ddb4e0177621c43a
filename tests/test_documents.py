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
PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


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


def tree(name: str) -> dict[str, str]:
    """The tree of files in a README: path in the package -> caption; folders end in a slash."""
    block = re.search(r"```\nsrc/luthier/\n(.*?)```", (ROOT / name).read_text(), re.S)
    assert block, f"{name} has no tree of src/luthier"
    found, above = {}, []
    for line in block[1].splitlines():
        indent, file, caption = re.fullmatch(r"( *)(\S+) +(\S.*)", line).groups()
        above = above[: len(indent) // 2 - 1]
        path = "".join(above) + file
        assert path not in found, f"{name} names {path} twice"
        found[path] = caption
        if file.endswith("/"):
            above.append(file)
    return found


def package_files() -> set[str]:
    """Files and folders of the package; a folder's caption is that of its __init__.py."""
    paths = [path for path in PACKAGE.rglob("*") if "__pycache__" not in path.parts]
    found = {path.relative_to(PACKAGE).as_posix() + ("/" if path.is_dir() else "") for path in paths}
    return {path for path in found if not path.endswith("/__init__.py")}


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_tree_names_every_file_with_a_caption_and_no_other(name):
    captions = tree(name)
    assert captions.keys() == package_files()
    if name == "README.md":
        for path, caption in captions.items():
            assert len(caption.split()) <= 8, f"{path}: {caption}"
    else:
        for path, caption in captions.items():
            assert len(caption) <= 40, f"{path}: {caption}"


@pytest.mark.parametrize("name", ["README", "docs/first-fine-tune"])
def test_english_and_chinese_agree(name):
    """The same headings by level, rows of tables, points of lists, commands, code, and links."""
    english, chinese = ((ROOT / f"{name}{tongue}.md").read_text() for tongue in ("", ".zh"))
    for pattern in (r"^(#+) ", r"^\|", r"^- ", r"^\d+\. "):
        assert re.findall(pattern, prose(english), re.M) == re.findall(pattern, prose(chinese), re.M), pattern
    assert blocks(english) == blocks(chinese)
    assert links(english) == links(chinese)
    assert sorted(code_spans(english)) == sorted(code_spans(chinese))
    written = re.findall(r"[\u4e00-\u9fff]", chinese)
    assert len(written) > 1000
    assert not re.findall(r"[\u4e00-\u9fff][,;:?!]", prose(chinese)), "Chinese text has its own punctuation"


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def blocks(text: str) -> list[str]:
    """Fenced blocks without their comments, and but for the tree, which has captions of its own."""
    found = re.findall(r"^```\w*\n.*?^```", text, re.S | re.M)
    return [re.sub(r"(^|\s+)# .*$", "", block, flags=re.M) for block in found if "\nsrc/luthier/\n" not in block]


def links(text: str) -> list[str]:
    """Their targets, sorted, with no difference between a page and its twin, or between the names of headings."""
    return sorted(target.replace(".zh.md", ".md").partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text))


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


@pytest.mark.parametrize("name", ["README.md", "README.zh.md", "ARCHITECTURE.md", *PAGES])
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
    from luthier.faults import keys

    text = (ROOT / "docs" / "configuration.md").read_text()
    for key in keys():
        assert f"`{key}`" in text, key
