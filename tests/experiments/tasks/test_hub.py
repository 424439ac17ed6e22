"""CoLA and a BERT from a hub, by the libraries that people have: fetched once, and used with no network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

COMMIT = "a" * 40
REPOS = ("models/bert-base-uncased", "datasets/nyu-mll/glue")
CARD = "---\nconfigs:\n- config_name: cola\n  data_files:\n" + "".join(
    f"  - split: {split}\n    path: cola/{split}-*\n" for split in ("train", "validation", "test")
)


class Hub(BaseHTTPRequestHandler):
    """The few requests that downloading takes, answered from the files in ``root``."""

    root: Path

    def do_GET(self):
        parts = urlsplit(self.path).path.strip("/").split("/")
        kind = "models" if "resolve" in parts and parts[0] != "datasets" else ""
        path = "/".join(part for part in [kind, *parts] if part).removeprefix("api/")
        repo = next((repo for repo in REPOS if path.startswith(f"{repo}/") or path == repo), None)
        if repo is None:
            return self.answer(404, error="RepoNotFound")
        files, (verb, *rest) = self.files(repo), [*path.removeprefix(repo).split("/")[1:], ""]
        if verb == "resolve":
            content = files.get("/".join(rest[1:-1]))
            return self.answer(404, error="EntryNotFound") if content is None else self.answer(200, content)
        if verb == "tree":
            return self.json(self.below("/".join(rest[1:-1]), files))
        return self.json(
            {"id": repo.partition("/")[2], "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
        )

    do_HEAD = do_GET

    def do_POST(self):
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        repo = next(repo for repo in REPOS if f"/{repo}/" in self.path)
        self.json([entry(name, content) for name, content in self.files(repo).items() if name in asked])

    def files(self, repo: str) -> dict[str, bytes]:
        folder = self.root / repo
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }

    def below(self, folder: str, files: dict[str, bytes]) -> list[dict]:
        prefix, found = f"{folder}/" if folder else "", {}
        for name, content in files.items():
            first, _, more = name.removeprefix(prefix).partition("/")
            if name.startswith(prefix):
                of_folder = {"type": "directory", "path": prefix + first, "oid": COMMIT}
                found[first] = of_folder if more else entry(name, content)
        return list(found.values())

    def json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode())

    def answer(self, code: int, content: bytes = b"", error: str | None = None) -> None:
        headers = {"Content-Length": len(content), "ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT}
        self.send_response(code)
        for name, value in (headers | ({"X-Error-Code": error} if error else {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def entry(name: str, content: bytes) -> dict:
    return {"type": "file", "path": name, "size": len(content), "oid": digest(content)}


@pytest.fixture
def hub(tmp_path) -> ThreadingHTTPServer:
    import pandas as pd
    from transformers import BertConfig, BertModel, BertTokenizerFast

    model, data = (tmp_path / "hub" / repo for repo in REPOS)
    model.mkdir(parents=True)
    (data / "cola").mkdir(parents=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "do", "##ll", "sings", "."]
    (model / "vocab.txt").write_text("\n".join(pieces))
    BertTokenizerFast(str(model / "vocab.txt")).save_pretrained(model)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(BertConfig(vocab_size=len(pieces), **sizes)).save_pretrained(model)
    (data / "README.md").write_text(f"{CARD}---\n")
    for split, number in (("train", 70), ("validation", 40), ("test", 5)):
        table = pd.DataFrame(
            {"sentence": ["The doll sings."] * number, "label": [i % 2 for i in range(number)]}
        )
        table.to_parquet(data / "cola" / f"{split}-00000-of-00001.parquet")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (Hub,), {"root": tmp_path / "hub"}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.server_close()


SCRIPT = """
import json, sys
from experiments import cli
for argv in json.loads(sys.argv[1]):
    print("exit", cli._dispatch(argv), flush=True)
"""


@pytest.mark.slow
def test_what_was_fetched_is_used_without_a_network(hub, tmp_path):
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }

    def clipbench(*commands: str) -> tuple[str, list[str]]:
        argv = [sys.executable, "-c", SCRIPT, json.dumps([command.split() for command in commands])]
        done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stderr, done.stdout.splitlines()

    prepare = "prepare task=cola task.max_length=16"
    _, told = clipbench(f"{prepare} --check", prepare)
    assert (told[3], told[-1]) == ("exit 1", "exit 0")
    home = tmp_path / "home"
    assert f"missing: CoLA, not fetched yet; looked in {home}/datasets." in told[1]
    assert f"missing: the model 'bert-base-uncased', not fetched yet; looked in {home}/hub." in told[2]
    assert f"CoLA: {home}/datasets" in told
    assert f"the model 'bert-base-uncased': {home}/hub/models--bert-base-uncased/snapshots/{COMMIT}" in told
    assert told[-2].startswith("read batches to train on: 2, the first of input_ids (32, 7), attention_mask")
    assert told[-2].endswith("; to evaluate on: 1")

    hub.shutdown()
    hub.server_close()
    run = "run task=cola preset=paper task.max_length=16 max_steps=2 eval_every=2 quiet=true"
    errors, told = clipbench(f"{prepare} --check", run)
    assert [line for line in told if line.startswith("exit")] == ["exit 0", "exit 0"]
    assert errors == ""
