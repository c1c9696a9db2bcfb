"""Contexts of several spans of attention: decoding steps share the spans out over the workers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from aios_compile import SamplingParams
from tests import zoo
from tests.compiled.conftest import Load
from tests.compiled.test_batches import answers

NAME, LENGTH = "qwen3_layer_types", 1200  # windows of 16 tokens, and full attention


def longer(folder: Path, base: Path) -> Path:
    """Return a copy of a zoo model that knows more positions."""
    path = shutil.copytree(zoo.make(NAME, base, "float32"), folder / "longer")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LENGTH}))
    return Path(path)


@pytest.mark.nightly
def test_tokens_and_logprobs_do_not_depend_on_threads_or_steps(
    load: Load, zoo_folder: Path, tmp_path: Path
) -> None:
    path, rng = longer(tmp_path, zoo_folder), random.Random(5)
    prompts = [[rng.randrange(128) for _ in range(n)] for n in (1130, 505, 20)]
    params = SamplingParams(max_tokens=20, temperature=0.7, seed=1, logprobs=3)
    model = load(path, num_threads=3, max_num_batched_tokens=200, max_num_seqs=4)
    together = answers(model.generate(prompts, params))
    assert together == [answers([model.generate(p, params)])[0] for p in prompts]
    ids = prompts[0] + list(together[0][0][0][0])
    whole = model(ids)  # in steps of many tokens, whose spans are not shared out
    reference = zoo.reference_logits(path, ids)
    assert np.abs(np.asarray(whole) - np.asarray(reference)).max() <= zoo.TOLERANCE
    single = load(path, num_threads=1, max_num_batched_tokens=64, max_num_seqs=4)
    assert together == answers(single.generate(prompts, params))
