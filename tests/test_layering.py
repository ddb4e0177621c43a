"""The architecture as a test: imports point down, axes never meet, public names are what __all__ says."""

import ast
from pathlib import Path

import luthier

PACKAGE = Path(luthier.__file__).parent
AXES = {"data", "models", "trainable", "precision", "objectives", "optim", "parallel"}
FLOORS = [
    {"__main__"},
    {"cli"},
    {"search", "prepare", "compress", "serve"},
    {"train"},
    {"journal"},
    {"results", "evaluations", "preconditions"},
    {"evaluate", "export", "explain", "upload"},
    {"harness", "card", "ahead", "rollouts", "reward_models"},
    {"sampling", "opened"},
    {"assemble", "generate", "classify", "rating", "adapters", "completions"},
    {"assembled"},
    {"teachers"},
    {"config"},
    {"contradictions", "resolution"},
    {"critics", "faults"},
    {"fields"},
    {"methods"},
    AXES,
    {"checkpoint", "monitor", "measured", "rewards"},
    {"batch", "logprobs", "surgery", "scores", "classes"},
    {"kernels", "files", "settings", "signals", "intervals", "sampled", "labels", "figures", "shared"},
    {"document"},
    {"errors"},
]


def floor(unit: str) -> int:
    return next(i for i, units in enumerate(FLOORS) if unit in units)


def imports(path: Path) -> set[str]:
    """The units of luthier that a file imports, relative imports resolved."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    package = parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("luthier.")}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                if (node.module or "").startswith("luthier"):
                    found.add(([*(node.module or "").split("."), ""])[1])
                continue
            base = package[: len(package) - node.level + 1]
            target = [*base, *(node.module.split(".") if node.module else [])]
            found |= {target[0]} if target else {alias.name for alias in node.names}
    return {name for name in found if name and not name.startswith("__")}


def units() -> list[tuple[str, Path]]:
    files = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE]
    return [(p.relative_to(PACKAGE).parts[0].removesuffix(".py"), p) for p in files]


def test_every_file_has_its_floor():
    known = set().union(*FLOORS)
    assert {unit for unit, _ in units()} <= known


def test_imports_point_down():
    for unit, path in units():
        for other in imports(path) - {unit}:
            assert floor(unit) < floor(other), f"{path.relative_to(PACKAGE)} imports {other}, which is not below it"


def test_axes_never_import_each_other():
    for unit, path in units():
        if unit in AXES:
            assert not (imports(path) & AXES) - {unit}, path


def test_every_file_opens_with_its_caption():
    for _, path in units():
        caption = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        assert caption, f"{path} has no caption"
        assert caption[0].endswith((".", ":")), f"{path}: the first line is one sentence"


def test_public_names():
    assert set(luthier.__all__) == {*luthier._HOMES, *luthier._MODULES}
    for name in luthier.__all__:
        assert getattr(luthier, name) is not None


def test_import_is_light():
    import subprocess
    import sys

    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'rich', 'optuna'}"
    code = f"import sys, luthier, luthier.config, luthier.cli; luthier.cli.parser(); print({heavy} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
