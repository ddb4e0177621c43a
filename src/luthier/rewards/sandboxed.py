"""The separate process that runs an answer's code and its tests; started by sandbox.py, standard library only."""

import ast
import builtins
import importlib
import json
import os
import resource
import sys
from typing import Any


def limit(request: dict) -> None:
    """Processor time in seconds, memory, the size of a file and the number of open ones."""
    seconds, memory = request["cpu_seconds"], request["memory_mb"] << 20
    wanted = {
        resource.RLIMIT_CPU: (seconds, seconds + 1), resource.RLIMIT_AS: (memory, memory),
        resource.RLIMIT_FSIZE: (request["file_mb"] << 20,) * 2, resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
    }  # fmt: skip
    for kind, (soft, hard) in wanted.items():
        most = resource.getrlimit(kind)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(kind, (soft, hard))


def imported(sources: list[str]) -> dict:
    """The modules that the tests import, with what is in them now: the answer's code may put something else there."""
    names = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
    kept: dict[str, Any] = {"builtins": (builtins, dict(vars(builtins)))}
    for name in sorted(names):
        try:
            module = importlib.import_module(name)
        except Exception:  # the test that needs it fails by itself
            continue
        kept[name] = (module, dict(vars(module)))
    return kept


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    channel, token = int(sys.argv[1]), request["token"]
    write, leave, modules, run = os.write, os._exit, sys.modules, exec

    def tell(what: str) -> None:
        write(channel, f"{token} {what}\n".encode())

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    tests = [compile(source, "<tests>", "exec", optimize=0) for source in request["tests"]]
    kept = imported(request["tests"])
    limit(request)
    try:
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
        confinement = importlib.import_module("confinement")

        sys.path.pop(0)
        del modules["confinement"]
        confinement.confine(os.getcwd())
    except (OSError, AttributeError) as error:
        if request["confine"]:
            tell(f"unconfined {error}")
            leave(1)
    tell("ready")
    sys.argv[:] = ["answer.py"]
    made = {"__name__": "answer", "__builtins__": builtins}
    try:
        run(compile(request["code"], "<answer>", "exec", dont_inherit=True), made)
        for name, (module, inside) in kept.items():  # what they had is again as it was
            modules[name] = module
            module.__dict__.update(inside)
        wanted = request["entry_point"]
        usual = {n: v for n, v in made.items() if not (n in kept["builtins"][1] or n.startswith("__")) or n == wanted}
        for number, test in enumerate(tests):
            space = {**usual, "__name__": "tests", "__builtins__": builtins}
            try:
                run(test, space)
                check: Any = space.get("check")
                if wanted is not None and check is not None:
                    check(made[wanted])
            except Exception:
                continue
            tell(f"passed {number}")
    finally:  # without what the answer may have left to be done at the end
        leave(0)


if __name__ == "__main__":
    main()
