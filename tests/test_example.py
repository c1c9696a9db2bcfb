"""The example checkpoints: their loss, transformers' view of it, a training run that resumes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aios_compile.checkpoint.folder import CheckpointFolder
from aios_compile.checkpoint.tokenizer import Tokenizer
from aios_compile.models.config import ModelConfig
from aios_compile.models.parameters import parameter_shapes, tied_parameters
from tests import zoo

torch.set_num_threads(1)
EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDER = EXAMPLES / "shakespeare"
DRAFT = EXAMPLES / "shakespeare-draft"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shakes", EXAMPLES / "train_shakespeare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_folder_is_small_and_complete() -> None:
    folder = CheckpointFolder.open(FOLDER)
    config = ModelConfig.from_dict(folder.config)
    folder.weights.check(parameter_shapes(config), tied_parameters(config))
    names = folder.weights.names()
    assert {folder.weights.info(name).dtype for name in names} == {"BF16"}
    assert 4e6 <= sum(folder.weights.read(name).size for name in names) <= 6e6
    assert (FOLDER / "model.safetensors").stat().st_size <= 12e6
    assert config.model_type == "qwen3" and config.tie_word_embeddings and not config.ignored_keys
    assert config.num_key_value_heads < config.num_attention_heads
    tokenizer = folder.load_tokenizer()
    assert 1000 <= tokenizer.vocab_size == config.vocab_size <= 2000
    assert tokenizer.eos_ids == tuple(folder.generation_config["eos_token_id"])


def test_the_draft_is_smaller_and_speaks_the_same_tokens(script: ModuleType) -> None:
    folder = CheckpointFolder.open(DRAFT)
    config = ModelConfig.from_dict(folder.config)
    folder.weights.check(parameter_shapes(config), tied_parameters(config))
    names = folder.weights.names()
    assert {folder.weights.info(name).dtype for name in names} == {"BF16"}
    assert sum(folder.weights.read(name).size for name in names) <= 1e6
    assert (DRAFT / "model.safetensors").stat().st_size <= 2.5e6
    assert (DRAFT / "tokenizer.json").read_bytes() == (FOLDER / "tokenizer.json").read_bytes()
    assert json.loads((DRAFT / "config.json").read_text()) == script.config_of("shakespeare-draft")


@pytest.mark.parametrize(("folder", "limit"), [(FOLDER, 1.50), (DRAFT, 1.55)])
def test_validation_loss(script: ModuleType, folder: Path, limit: float) -> None:
    """In nats per character, on a third of the text that training never saw."""
    _, held_out = script.split_text(EXAMPLES / "tinyshakespeare.txt")
    part = held_out[: len(held_out) // 3]
    ids = torch.tensor(Tokenizer.load(folder).encode(part))
    loss = script.nats_per_character(zoo.decoder(folder).eval(), ids, len(part))
    assert loss <= limit


@pytest.mark.parametrize("folder", [FOLDER, DRAFT])
def test_transformers_loads_the_folder_to_the_same_logits(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("ROMEO:\nBut soft, what light through yonder window breaks?")
    with torch.no_grad():
        ours = zoo.decoder(folder)(torch.tensor(ids), torch.arange(len(ids)))
    assert (ours - zoo.reference_logits(folder, ids)).abs().max() <= zoo.TOLERANCE


def test_a_chat_turn_ends_itself() -> None:
    """The model has learnt the turn tokens: a greedy answer stops by an end token."""
    tokenizer, model = Tokenizer.load(FOLDER), zoo.decoder(FOLDER)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Good morrow, my lord."}])
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    with torch.no_grad():
        for _ in range(120):
            logits = model(torch.tensor(ids), torch.arange(len(ids)))
            ids.append(int(logits[-1].argmax()))
            if ids[-1] in tokenizer.eos_ids:
                break
    assert ids[-1] in tokenizer.eos_ids


def test_a_stopped_training_run_resumes_to_the_same_weights(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text((EXAMPLES / "tinyshakespeare.txt").read_text()[:60_000])

    def run(name: str) -> None:
        options = ["--steps=2", "--every=1", "--tokens=128", "--length=64", "--threads=1"]
        paths = [f"--text={text}", f"--out={tmp_path / name}", f"--state={tmp_path / name}.state"]
        script.main(options + paths)

    run("whole")
    save = script.save_state

    def save_and_stop(*args: Any) -> None:
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "save_state", save_and_stop)
        run("parts")
    run("parts")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    parts = load_file(tmp_path / "parts" / "model.safetensors")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
