"""Persistent launches of two models' layers, compiled for every card: what is joined never spills.

One token is always joined; a variant that spills, or does not fit, keeps its kernels' own launches.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from aios_compile.codegen.triton import join_launches
from aios_compile.codegen.triton.cards import CARDS, card_of
from aios_compile.codegen.triton.compile_ahead import Binary
from aios_compile.errors import CodegenError
from aios_compile.study import gpu_compile
from tests.codegen.test_triton_persistent import REPORT
from tests.codegen.triton_models import LLAMA_8B, QWEN3
from tests.codegen.triton_modules import load
from tests.interpreted.test_ahead_of_time import started


def test_nothing_of_a_persistent_launch_is_compiled_after_ready(tmp_path: Path) -> None:
    """Found in the artefact under the key that a launch asks for, options and all."""
    seen = started(tmp_path, (), persistent_decode=True)
    assert seen["at_start"] == 0 and seen["late"] == 0 and seen["misaligned"] > 0, seen
    assert seen["launches"] == 2 + 7  # layers, and what surrounds them


@pytest.mark.parametrize("target", CARDS)
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("config", [QWEN3, LLAMA_8B], ids=["qwen3", "llama"])
def test_layers_fit_the_card(
    config: Any, quantization: str | None, target: str, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    options = {"max_model_len": 4096, "persistent_decode": True}
    options |= {"quantization": quantization} if quantization else {}  # type: ignore[dict-item]
    if not target.startswith("cuda"):
        with pytest.raises(CodegenError, match=f"{target} .* has no persistent decode"):
            gpu_compile.plan_for(tmp_path, target, options)
        return
    found: list[Binary] = []
    texts: dict[int | None, str] = {}
    compile_ahead = join_launches.compile_ahead

    def noted(*arguments: Any) -> list[list[Binary]]:
        binaries = compile_ahead(*arguments)
        found.extend(b for b in binaries[0] if b.most is not None and b.most <= 32)
        texts.update({b.most: b.assembly() for b in found})  # the folder goes
        return binaries

    monkeypatch.setattr(join_launches, "compile_ahead", noted)
    planned = gpu_compile.plan_for(tmp_path, target, options)
    used = {b.most: (b.registers, b.spill_bytes, b.shared_bytes) for b in found}
    source = planned.emitted.sources[planned.emitted.joined["layer"]]
    module = load(source)
    joined = {v["most"] for v in module.VARIANTS if "operands" not in v["launches"][0]}
    assert 1 in joined and joined == {m for m, (_, spills, _) in used.items() if not spills}, used
    text = texts[1]
    assert text.count("ld.acquire.gpu") >= 4, "a wait a phase"
    raised = re.findall(r"\batom\.\S+", text)
    assert len(raised) >= 5 and all(x.startswith("atom.global.gpu.acq_rel.add") for x in raised)
    if card_of(target).dependent_launch:
        assert "griddepcontrol.wait" in text
        assert ("prefetch.global.L2" in text) == (quantization is None)
    if (target, config, quantization) == ("cuda:90", QWEN3, None):
        assert used == REPORT or not triton.__version__.startswith("3.7.")
