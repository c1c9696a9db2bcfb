"""Model folders: hostile JSON, paths that leave the folder, remote code, hub ids."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from aios_compile.checkpoint import hub
from aios_compile.checkpoint.folder import CheckpointFolder
from aios_compile.checkpoint.tokenizer import Tokenizer
from aios_compile.config import CompileOptions
from aios_compile.errors import CheckpointError
from aios_compile.model_source import open_source
from tests import zoo

SHAKESPEARE = Path(__file__).parents[1] / "examples" / "shakespeare"


def test_open_lists_every_file_that_matters(tmp_path: Path) -> None:
    folder = CheckpointFolder.open(zoo.make("llama_gqa", tmp_path))
    assert folder.config["model_type"] == "llama" and folder.generation_config == {}
    assert {path.name for path in folder.files()} == {"config.json", "model.safetensors"}
    assert not folder.has_tokenizer()
    names = {path.name for path in CheckpointFolder.open(SHAKESPEARE).files()}
    assert names == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    }


BAD_CONFIGS = [
    (b"", "not valid JSON"),
    (b"[1]", "holds a list, expected a JSON object"),
    (b'"x"', "holds a str"),
    (b'{"hidden_size": NaN}', "NaN is not a JSON number"),
    (b'{"hidden_size": -Infinity}', "-Infinity is not a JSON number"),
    (b'{"hidden_size": 1e999}', "1e999 is out of range"),
    (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
    (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    (b'{"a": ' + b"[" * 100_000 + b"}", "nested too deeply"),
    (b'{"a": "\xff"}', "not valid JSON"),
    (b'{"a": 1', "not valid JSON"),
    (b" " * (17 << 20), "larger than"),
    (b'{"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}', "auto_map.*never run"),
]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'{"eos_token_id": "</s>"}', "eos_token_id is '</s>', expected a token id below"),
        (b'{"eos_token_id": [[1]]}', r"eos_token_id is \[1\], expected"),
        (b'{"eos_token_id": 10000}', "eos_token_id is 10000, expected a token id below"),
        (b'{"temperature": -1}', "generation_config.json: temperature=-1 is out of range"),
        (b'{"stop": 5}', "generation_config.json: stop=5 is out of range"),
    ],
)
def test_bad_generation_config(content: bytes, reason: str, tmp_path: Path) -> None:
    """Told when the model is opened, not when it has been compiled."""
    path = zoo.make("llama_gqa", tmp_path)
    (path / "generation_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        open_source(path, CompileOptions())


@pytest.mark.parametrize("content, reason", BAD_CONFIGS)
def test_bad_config_files(content: bytes, reason: str, tmp_path: Path) -> None:
    path = zoo.make("llama_gqa", tmp_path)
    (path / "config.json").write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=reason) as caught:
        CheckpointFolder.open(path)
    assert "config.json" in str(caught.value) and time.perf_counter() - started < 5


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        CheckpointFolder.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        CheckpointFolder.open(tmp_path)
    path = zoo.make("llama_gqa", tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        CheckpointFolder.open(path).load_tokenizer()
    os.unlink(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        CheckpointFolder.open(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_that_leave_the_folder(name: str, tmp_path: Path) -> None:
    path = zoo.make("llama_gqa", tmp_path)
    outside = (path / name).rename(tmp_path / "outside")
    (path / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="link that leaves the model folder"):
        CheckpointFolder.open(path)
    (path / name).unlink()
    (path / name).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="missing"):
        CheckpointFolder.open(path)
    (path / name).unlink()
    (path / name).symlink_to(name)  # a loop
    with pytest.raises(CheckpointError, match="missing or unreadable"):
        CheckpointFolder.open(path)
    (path / name).unlink()
    os.mkfifo(path / name)  # opening it would hang
    with pytest.raises(CheckpointError, match="not a regular file"):
        CheckpointFolder.open(path)
    (path / name).unlink()
    outside.rename(path / "inside")
    (path / name).symlink_to("inside")
    assert CheckpointFolder.open(path)


def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    path = zoo.make("llama_gqa", tmp_path)
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    blobs = repository / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for i, name in enumerate(("config.json", "model.safetensors")):
        (path / name).rename(blobs / f"{i:040x}")
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / f"{i:040x}")
    assert CheckpointFolder.open(snapshot).weights.names()
    other = tmp_path / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    (blobs / f"{0:040x}").rename(other / "x")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(other / "x")
    with pytest.raises(CheckpointError, match="link that leaves"):
        CheckpointFolder.open(snapshot)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", "\x00", "not a tokenizer"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": "x.Y"}}, "auto_map"),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template is not text"),
        ("tokenizer_config.json", {"chat_template": "{% if %}"}, "not valid Jinja"),
        ("tokenizer_config.json", {"chat_template": "{{" * 600_000}, "at most 1048576"),
        ("tokenizer_config.json", [], "expected a JSON object"),
        ("generation_config.json", {"eos_token_id": "x"}, "not a token id"),
        ("generation_config.json", {"eos_token_id": [-1]}, "not a token id"),
        ("chat_template.jinja", "{% for %}", "not valid Jinja"),
    ],
)
def test_bad_tokenizer_files(name: str, content: Any, reason: str, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / file).write_bytes((SHAKESPEARE / file).read_bytes())
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        Tokenizer.load(tmp_path)


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve(tmp_path) == tmp_path
    for name in ("../x", "/nowhere/at/all", "a/b/c", "a--b", "", "https://x.y/z", "x" * 5000):
        with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
            hub.resolve(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="not in the local cache"):
        hub.resolve("owner/name", local_files_only=True)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        hub.resolve("owner/name")
