"""Upload an exported model or a set of rows to a hub: what goes is told before, and what arrived is compared after.

Files travel by huggingface_hub in one commit, so that a repository never has half of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import ConfigError, UploadError

Say = Callable[[str], None]

MODEL_FILES = ("config.json", "adapter_config.json", "*.gguf", "*.onnx")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
KINDS = ("model", "dataset")


def files_of(folder: Path, kind: str) -> dict[str, Path]:
    """What of a folder goes to the hub, by its name there. Raises ConfigError for what should not."""
    if not folder.is_dir():
        raise ConfigError(f"FOLDER {folder}: there is no such folder; give one that `luthier export` wrote")
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").exists():
        raise ConfigError(f"FOLDER {folder} is a run, with its checkpoints: `luthier export` it first, and upload that")
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file() or p.is_symlink()}
    found = {name: path for name, path in found.items() if not any(part.startswith(".") for part in Path(name).parts)}
    if not found:
        raise ConfigError(f"FOLDER {folder} has no files")
    for name, path in found.items():
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"FOLDER {folder}: {name} leads out of it, to {path.resolve()}: put the file there")
        if any(path.match(pattern) for pattern in PICKLES):
            raise ConfigError(
                f"FOLDER {folder}: {name} may be a pickle, which runs code where it is loaded; take it away, or save "
                "it as safetensors"
            )
    if kind == "model" and not any(path.match(pattern) for path in found.values() for pattern in MODEL_FILES):
        raise ConfigError(
            f"FOLDER {folder} has no {', '.join(MODEL_FILES)}: it is no model; of rows, use --type dataset"
        )
    return found


def remarks(folder: Path, files: dict[str, Path]) -> list[str]:
    """What a reader elsewhere would stumble over."""
    said = [] if "README.md" in files else ["there is no README.md: nobody will know what it is, and its licence"]
    if (path := files.get("adapter_config.json")) is not None:
        base = json.loads(path.read_text()).get("base_model_name_or_path")
        if base and (base.startswith(("/", "~", ".")) or Path(base).exists()):
            said.append(
                f"adapter_config.json: base_model_name_or_path={base!r} is a path of this machine, and others have no "
                "such model: write the base's name on the hub"
            )
    return said


def upload(
    folder: Path, name: str, *, kind: str = "model", public: bool = False, revision: str | None = None,
    message: str | None = None, dry_run: bool = False, say: Say = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Upload a folder to the repository `name` (OWNER/NAME) in one commit, then compare what lies there.

    A repository that is made is private, unless `public`; one that others can read is written to only with `public`.
    Raises ConfigError for what is wrong here, and UploadError for what the hub says.
    """
    if kind not in KINDS:
        raise ConfigError(f"--type {kind}: known are {', '.join(KINDS)}")
    if not NAME.fullmatch(name) or ".." in name or "--" in name:
        raise ConfigError(f"NAME {name!r}: give OWNER/NAME, of letters, digits, -, _ and .")
    files = files_of(folder, kind)
    sizes = {path_there: path.stat().st_size for path_there, path in files.items()}
    answer: dict[str, Any] = {
        "repository": name, "type": kind, "files": sizes, "bytes": sum(sizes.values()), "public": public,
        "remarks": remarks(folder, files), "uploaded": False,
    }  # fmt: skip
    for line in answer["remarks"]:
        say(f"remark: {line}")
    if dry_run:
        return answer
    from huggingface_hub import HfApi, errors

    api = HfApi()
    say(f"{len(files)} files, {answer['bytes']:,} bytes, to {api.endpoint}/{name}")
    try:
        _made(api, name, kind, public)
        if revision is not None:
            api.create_branch(name, branch=revision, repo_type=kind, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, repo_type=kind, revision=revision,
            allow_patterns=[_literal(n) for n in files], commit_message=message or f"Upload {folder.name}",
        )  # fmt: skip
        wrong = _differing(api, name, kind, revision, files)
    except errors.LocalTokenNotFoundError:
        raise UploadError("there is no token: set HF_TOKEN, or run `hf auth login`") from None
    except errors.HfHubHTTPError as error:
        raise UploadError(_told(error, api.endpoint, name)) from None
    except ValueError as error:  # a name or a card's head that the hub's rules forbid
        raise UploadError(f"{name}: {error}; nothing was uploaded") from None
    except OSError as error:
        raise UploadError(f"{api.endpoint} cannot be reached: {error}") from None
    except Exception as error:  # of the library that sends, whose errors have no common parent
        if not type(error).__module__.startswith(("httpx", "httpcore", "huggingface_hub", "hf_xet")):
            raise
        raise UploadError(f"{api.endpoint} cannot be reached: {error}") from None
    if wrong:
        raise UploadError(
            f"{name} has other bytes than {folder} in {', '.join(wrong[:5])}: run the same command again"
        )
    return {**answer, "uploaded": True, "commit": done.oid, "address": f"{api.endpoint}/{_prefix(kind)}{name}"}


def _prefix(kind: str) -> str:
    return "datasets/" if kind == "dataset" else ""


def _literal(name: str) -> str:
    """A pattern that matches a name, and only it."""
    return re.sub(r"([\[*?])", r"[\1]", name)


def _made(api: Any, name: str, kind: str, public: bool) -> None:
    """The repository is there, and is read by those who shall read it."""
    from huggingface_hub import errors

    try:
        there = api.repo_info(name, repo_type=kind)
    except errors.RepositoryNotFoundError:
        api.create_repo(name, repo_type=kind, private=not public, exist_ok=False)
        return
    if not there.private and not public:
        raise ConfigError(f"NAME {name}: it is there already, and everybody can read it: say --public, or another name")
    if there.private and public:
        raise ConfigError(f"NAME {name}: it is there already, and private; leave --public out, or change it on the hub")


def _differing(api: Any, name: str, kind: str, revision: str | None, files: dict[str, Path]) -> list[str]:
    """Files whose bytes there are others than here, by the sums that the hub tells."""
    there = {
        entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in api.list_repo_tree(name, recursive=True, revision=revision, repo_type=kind)
        if hasattr(entry, "blob_id")
    }
    wrong = []
    for path_there, path in files.items():
        size, sha256, blob = there.get(path_there, (None, None, None))
        mine = _sum(path, "sha256", b"") if sha256 else _sum(path, "sha1", b"blob %d\0" % path.stat().st_size)
        if size != path.stat().st_size or mine != (sha256 or blob):
            wrong.append(path_there)
    return wrong


def _sum(path: Path, kind: str, head: bytes) -> str:
    """Of a file; git's own is that of its bytes behind a head."""
    made = hashlib.new(kind, head, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()


def _told(error: Exception, endpoint: str, name: str) -> str:
    """What the hub said, in a line, with what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = " ".join(str(getattr(error, "server_message", None) or error).split())[:300]
    remedy = {
        401: "the token is missing or wrong: set HF_TOKEN, or run `hf auth login`",
        403: f"the token may not write to {name}: make one with the right to write, or use your own name as OWNER",
        404: f"there is no {name} that this token may see",
        409: f"{name} was changed meanwhile: run the same command again",
        413: "a file is larger than the hub takes",
    }.get(status or 0, "try again later")
    return f"{endpoint} answered {status or 'with an error'}: {remedy} ({said})"
