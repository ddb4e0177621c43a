"""Uploading, by the real client library to a small hub on this machine: what arrives, what is refused, what is told."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from luthier.cli import main
from luthier.errors import ConfigError
from luthier.upload import upload


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as an upload needs, in memory; large files go the way of LFS."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value, status=200, headers=()):
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in (("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers):
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(body)

    def handled(self):
        state = self.server.state
        length = int(self.headers.get("Content-Length") or 0)
        chunked = "chunked" in (self.headers.get("Transfer-Encoding") or "")
        body = self.chunks() if chunked else self.rfile.read(length)
        path = unquote(self.path.partition("?")[0])
        state["asked"].append((self.command, path))
        if "/lfs/" not in path and self.headers.get("Authorization") != "Bearer hf_good":
            return self.answer({"error": "Invalid username or password."}, 401)
        if found := state["refuse"].get((self.command, re.sub(r"/(main|branch)$", "", path))):
            return self.answer({"error": "no"}, found)
        if path == "/api/validate-yaml":
            wrong = [{"message": "license is no licence"}] if b"license: mine" in body else []
            return self.answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'ann'}/{asked['name']}"
            state["repos"][name] = {"private": asked.get("private", asked.get("visibility") == "private"), "files": {}}
            return self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            there = f"http://{self.headers['Host']}/lfs"
            told = [
                {**w, "actions": {"upload": {"href": f"{there}/{w['oid']}", "header": {}}}} for w in wanted
            ]
            return self.answer({"transfer": "basic", "objects": told})
        if path.startswith("/lfs/") and self.command == "PUT":
            state["large"][path.removeprefix("/lfs/")] = body
            return self.answer({})
        match = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?", path)
        if not match or match[2] not in state["repos"]:
            return self.answer({"error": "Repository not found"}, 404, [("X-Error-Code", "RepoNotFound")])
        repo, rest = state["repos"][match[2]], match[3] or ""
        if not rest or rest.startswith("/revision"):
            return self.answer({"id": match[2], "private": repo["private"], "sha": "0" * 40, "siblings": []})
        if rest.startswith("/preupload"):
            files = json.loads(body)["files"]
            told = [{"path": f["path"], "uploadMode": "lfs" if f["size"] > 5000 else "regular", "shouldIgnore": False}
                    for f in files]  # fmt: skip
            return self.answer({"files": told})
        if rest.startswith("/commit"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo["files"][value["path"]] = (base64.b64decode(value["content"]), None)
                if line["key"] == "lfsFile":
                    repo["files"][value["path"]] = (state["large"][value["oid"]], value["oid"])
            if state["damage"]:
                repo["files"] = {name: (b"!" + content[1:], oid) for name, (content, oid) in repo["files"].items()}
            there = f"http://{self.headers['Host']}/{match[2]}/commit/{'1' * 40}"
            return self.answer({"commitUrl": there, "commitOid": "1" * 40, "success": True})
        if rest.startswith("/tree"):
            return self.answer([self.entry(name, *kept) for name, kept in repo["files"].items()])
        if rest.startswith("/branch"):
            return self.answer({})
        return self.answer({"error": f"what is {path}?"}, 500)

    def entry(self, name, content, oid):
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        told = {"type": "file", "path": name, "size": len(content), "oid": git}
        if oid:
            told["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return told

    def chunks(self):
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_POST = do_PUT = do_HEAD = handled


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.state = {"repos": {}, "large": {}, "asked": [], "refuse": {}, "damage": False}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "out" / "adapter"
    (made / "sub").mkdir(parents=True)
    told = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (made / "adapter_config.json").write_text(json.dumps(told))
    (made / "adapter_model.safetensors").write_bytes(os.urandom(20_000))
    (made / "README.md").write_text("# A card\n")
    (made / "sub" / "tokens [1].txt").write_text("a\n")
    (made / ".secret").write_text("hidden")
    return made


def command(hub, *words, token="hf_good"):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1", "HF_HOME": "/nonexistent"}  # fmt: skip
    if token:
        env["HF_TOKEN"] = token
    told = [sys.executable, "-m", "luthier", "upload", *map(str, words)]
    return subprocess.run(told, env=env, capture_output=True, text=True)


def test_what_arrives_is_what_lies_here(hub, folder):
    ran = command(hub, folder, "ann/mine", "--json")
    assert ran.returncode == 0, ran.stderr
    repo = hub.state["repos"]["ann/mine"]
    assert repo["private"] is True
    here = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    del here[".secret"]
    assert {name: content for name, (content, _) in repo["files"].items()} == here
    assert repo["files"]["adapter_model.safetensors"][1], "the large one went another way"
    told = json.loads(ran.stdout)
    assert told["files"] == {name: len(content) for name, content in here.items()}
    assert (told["uploaded"], told["commit"], told["public"]) == (True, "1" * 40, False)
    assert "hf_good" not in ran.stdout + ran.stderr


def test_a_set_of_rows(hub, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    ran = command(hub, tmp_path, "ann/rows", "--type", "dataset", "--public")
    assert ran.returncode == 0, ran.stderr
    assert hub.state["repos"]["ann/rows"]["private"] is False
    assert f"127.0.0.1:{hub.server_port}/datasets/ann/rows" in ran.stdout
    assert "remark: there is no README.md" in ran.stderr
    assert "everybody can read it" in ran.stdout


@pytest.mark.parametrize(
    ("there", "flags", "message"), [(False, [], "everybody can read it: say --public"), (True, ["--public"], "private")]
)
def test_who_can_read_is_as_was_said(hub, folder, there, flags, message):
    hub.state["repos"]["ann/mine"] = {"private": there, "files": {}}
    ran = command(hub, folder, "ann/mine", *flags)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert not hub.state["repos"]["ann/mine"]["files"]
    asked = [way for way, path in hub.state["asked"] if way == "POST"]
    assert not asked, "nothing was written"


def test_what_does_not_arrive_is_told(hub, folder):
    hub.state["damage"] = True
    ran = command(hub, folder, "ann/mine")
    assert ran.returncode == 1
    assert "has other bytes than" in ran.stderr
    assert "run the same command again" in ran.stderr


def test_a_wrong_token_and_none(hub, folder):
    for token in ("hf_bad", None):
        ran = command(hub, folder, "ann/mine", token=token)
        assert ran.returncode == 1
        assert "HF_TOKEN" in ran.stderr
        assert "Traceback" not in ran.stderr
        assert "hf_bad" not in ran.stderr


def test_a_hub_that_refuses_and_one_that_is_not_there(hub, folder):
    hub.state["refuse"] = {("POST", "/api/repos/create"): 403}
    ran = command(hub, folder, "other/mine")
    assert ran.returncode == 1
    assert "may not write to other/mine" in ran.stderr
    hub.shutdown()
    hub.server_close()
    ran = command(hub, folder, "ann/mine")
    assert ran.returncode == 1
    assert "cannot be reached" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_card_whose_head_the_hub_refuses(hub, folder):
    (folder / "README.md").write_text("---\nlicense: mine\n---\n# A card\n")
    ran = command(hub, folder, "ann/mine")
    assert ran.returncode == 1
    assert "license is no licence; nothing was uploaded" in ran.stderr
    assert not hub.state["repos"]["ann/mine"]["files"]


def test_a_dry_run_sends_nothing(hub, folder, capsys):
    ran = command(hub, folder, "ann/mine", "--dry-run")
    assert ran.returncode == 0
    assert "nothing was sent" in ran.stdout
    assert "adapter_model.safetensors" in ran.stdout
    assert not hub.state["asked"]


def refused(folder, message, name="ann/mine", **given):
    with pytest.raises(ConfigError, match=message):
        upload(folder, name, dry_run=True, **given)


def test_what_should_not_go(folder, tmp_path, capsys):
    refused(tmp_path / "none", "there is no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no files")
    for name in ("mine", "ann/mi ne", "../x", "a/b/c", "ann/a..b"):
        refused(folder, "give OWNER/NAME", name)
    refused(folder, "known are model, dataset", kind="space")
    (folder / "model.bin").write_bytes(b"x")
    refused(folder, "may be a pickle")
    (folder / "model.bin").unlink()
    (folder / "away").symlink_to("/etc/hostname")
    refused(folder, "away leads out of it")
    (folder / "away").unlink()
    (folder / "adapter_config.json").unlink()
    refused(folder, "it is no model; of rows, use --type dataset")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    refused(run, "is a run, with its checkpoints: `luthier export` it first")
    assert main(["upload", str(run), "ann/mine"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_base_that_only_this_machine_has(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(Path.home())}))
    (remark,) = upload(folder, "ann/mine", dry_run=True)["remarks"]
    assert "is a path of this machine" in remark
