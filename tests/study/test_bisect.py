"""Bisect finds planted mistakes by itself: the pass and its node, the kernel, the step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

from aios_compile.cli import bisect as command
from aios_compile.cli.main import app
from aios_compile.codegen.cpp.emitters import EMITTERS
from aios_compile.codegen.triton.dialect import FORMULAS
from aios_compile.config import CompileOptions
from aios_compile.errors import ConfigError
from aios_compile.ir import snapshot
from aios_compile.ir.random_weights import RandomWeights
from aios_compile.model_source import open_source
from aios_compile.passes.context import PassOptions
from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.pipeline import STAGES
from aios_compile.passes.runner import run_pipeline
from aios_compile.study import bisect as study
from aios_compile.study.bisect import (
    Finding,
    Subject,
    find_wrong_kernel,
    find_wrong_pass,
    find_wrong_step,
    logits_of,
    open_subject,
    oracle_of,
    relative_error,
)
from aios_compile.study.bisect_settings import (
    changed,
    find_difference,
    find_different_answer,
    parse_setting,
)
from tests import zoo
from tests.planted import fuse_plants, programs, raise_plants, rewrite_plants
from tests.planted.plants import PLANTS
from tests.quick_builds import build_quickly
from tests.variants import nightly

assert fuse_plants and raise_plants and rewrite_plants, "they register themselves"
PROMPT = tuple(range(3, 22))
# mistake -> the op of the first wrong node, the model's line in decoder.py
NODES = {
    "wrong_epsilon": ("aios.rms_norm.default", "self.weight * x32"),
    "turned_backwards": ("aten.neg.default", "rope"),
    "scale_missing": ("aios.attention.default", "scaled_dot_product_attention"),
    "another_activation": ("aios.gated_activation.default", "down_proj"),
    "merged_in_another_order": ("aios.linear.default", "q_proj"),
    "norm_of_one_summand": ("kernel row_reduction", "self_attn"),
    "keys_read_from_the_values": ("aten.view.default", "k_proj"),  # values that were there before
    "wrong_gather_row": ("aten", ""),
    "one_layers_weight_for_all": ("aios.linear.default", "q_proj"),
}


def subject(program: str, options: PassOptions | None = None) -> Subject:
    captured = programs.level_1(program)
    weights = RandomWeights.of(captured, 0)
    return Subject(captured, options or PassOptions(), weights, PROMPT)


@pytest.mark.parametrize("name", NODES)
def test_a_planted_pass_is_found_with_its_node_and_line(name: str) -> None:
    plant = next(p for p in PLANTS if p.name == name)

    def planted(function: Any) -> Any:
        return plant.apply_to(function) if info_of(function).name == plant.pass_name else function

    stages = [replace(s, passes=tuple(map(planted, s.passes))) for s in STAGES]
    found, _ = find_wrong_pass(subject(plant.program), stages)
    op, line = NODES[name]
    assert (found.kind, found.name) == ("pass", plant.pass_name)
    assert op in found.node and line in found.source_line, found
    assert found.error > found.budget and f"first wrong pass   {plant.pass_name}" in str(found)


@pytest.mark.parametrize("name", ["scale_missing", "merged_in_another_order"])
def test_a_planted_pass_is_found_against_a_setting_without_it(name: str) -> None:
    """No certificate is asked: the other setting's logits are what is right."""
    plant = next(p for p in PLANTS if p.name == name)

    def planted(function: Any) -> Any:
        return plant.apply_to(function) if info_of(function).name == plant.pass_name else function

    wrong = [replace(s, passes=tuple(map(planted, s.passes))) for s in STAGES]
    required = info_of(programs.pass_named(plant.pass_name)).required
    left_out = [] if required else [plant.pass_name]
    pair = subject(plant.program), subject(plant.program)
    found = find_difference(*pair, other_disabled=left_out, stages=wrong)
    op, line = NODES[name]
    assert (found.kind, found.name) == ("pass", plant.pass_name), found
    assert op in found.node and line in found.source_line and found.error > found.budget
    if left_out:
        assert not find_difference(*pair, other_disabled=left_out).kind, "both settings are right"


def test_settings_that_compute_something_else_part_where_they_do() -> None:
    one = subject("qwen3")
    quantised = replace(one, options=PassOptions(quantization="int8_g32_f16"))
    assert find_difference(quantised, one).name == "quantize_weights"
    other_weights = replace(one, weights=RandomWeights.of(one.captured, 1))
    assert find_difference(other_weights, one).kind == "setting"


def test_another_setting_is_read_from_options_and_passes() -> None:
    given = CompileOptions(num_threads=2)
    other = parse_setting("merge_qkv,num-threads=1,quantization=none,dtype=fp32", given)
    wanted = {"num_threads": 1, "disable_passes": ("merge_qkv",), "dtype": "float32"}
    assert changed(given, other) == wanted
    for text in ("raise_attention", "merge_qvk", "num_thread=1", "dtype=fp7"):
        with pytest.raises(ConfigError):
            parse_setting(text, given)


@pytest.mark.parametrize(("token", "logit"), [(7, 0.0), (3, 1e-6)])
def test_a_setting_of_the_runtime_may_not_change_a_bit(token: int, logit: float) -> None:
    class Answers:
        program = SimpleNamespace(settings={"max_model_len": 64})

        def __init__(self, options: CompileOptions) -> None:
            self.threads = options.num_threads or 0

        def __call__(self, ids: list[int]) -> torch.Tensor:
            return torch.ones(len(ids), 5) + (logit if self.threads == 1 else 0.0)

        def generate(self, ids: list[int], max_tokens: int, **unused: Any) -> Any:
            ids = [3] * (max_tokens - 1) + [token if self.threads == 1 else 3]
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)])

        def __enter__(self) -> Answers:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    program = subject("qwen3"), programs.level_1("qwen3")
    options, other = CompileOptions(num_threads=4), CompileOptions(num_threads=1)
    found = find_different_answer(*program, options, other, Answers)
    assert found.kind == "setting" and found.name == "num_threads=1"
    assert ("token 31" if token == 7 else "logits of the prompt") in found.detail
    assert not find_different_answer(*program, options, options, Answers).kind


def lowered(program: str) -> tuple[Subject, Any]:
    searched = subject(program)
    module = snapshot.take(searched.captured)
    run_pipeline(module, STAGES, searched.options, verify=0)
    return searched, module


def broken(name: str, right: str, wrong: str) -> list[ModuleType]:
    """Return the emitters, one of which writes `wrong` for `right`."""

    def spoil(emitter: ModuleType) -> ModuleType:
        if not emitter.__name__.endswith(f".{name}"):
            return emitter

        def emit(spec: Any) -> Any:
            source = emitter.emit(spec)
            assert right in source.text, source.text
            return replace(source, text=source.text.replace(right, wrong))

        return cast(ModuleType, SimpleNamespace(spec_of=emitter.spec_of, emit=emit))

    return [spoil(e) for e in EMITTERS]


@pytest.mark.parametrize(
    ("name", "right", "wrong", "line"),
    [
        ("row_reduction", "1e-06", "1e-03", "self.weight * x32"),
        *nightly(
            ("paged_attention", "0x1.6a09e6", "0x1.5a09e6", "scaled_dot_product_attention"),
        ),
    ],
)
def test_a_planted_emitter_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, right: str, wrong: str, line: str
) -> None:
    build_quickly(monkeypatch)
    searched, module = lowered("qwen3")
    found = find_wrong_kernel(searched, module, broken(name, right, wrong), tmp_path)
    assert found.kind == "kernel" and line in found.source_line, found
    assert found.error > found.budget


def test_a_planted_triton_kernel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ kernels were checked instead, and the step was blamed."""
    searched = subject("qwen3", PassOptions(target="triton"))
    module = snapshot.take(searched.captured)
    run_pipeline(module, STAGES, searched.options, verify=0)
    monkeypatch.setitem(FORMULAS, "silu", "({0} / (1.0 + tl.exp(-1.02 * {0})))")
    found = find_wrong_kernel(searched, module, folder=tmp_path, device="interpreter")
    assert found.kind == "kernel" and "gated_activation" in found.node, found
    assert found.source_line and found.file.startswith("codegen/triton/")


@pytest.mark.parametrize("target", ["cpp", "triton"])
@pytest.mark.parametrize("name", nightly("half", "quantised"))
def test_right_passes_and_kernels_are_acquitted(name: str, target: str, tmp_path: Path) -> None:
    """Those of quantised rows ended the search once: "weights ... cannot be checked"."""
    options = replace(programs.options_of(name), target=target)
    searched, device = subject(name, options), {"cpp": "cpu", "triton": "interpreter"}[target]
    said: list[str] = []
    found, module = find_wrong_pass(searched, say=said.append)
    assert not found.kind and len(said) > 10, found
    found = find_wrong_kernel(searched, module, folder=tmp_path, say=said.append, device=device)
    assert not found.kind and any("linear" in text for text in said), found
    assert "nothing is wrong" in str(found)


@pytest.mark.parametrize("name", ["rounded", "quantised"])
def test_activations_that_a_pass_rounds_are_no_wrong_step(name: str) -> None:
    """They were: a step was held to level 1, and to a budget of float32."""
    searched = subject(name, programs.options_of(name))
    module = snapshot.take(searched.captured)
    run_pipeline(module, STAGES, searched.options, verify=0)
    logits = logits_of(searched, module, None)
    exact, budget = oracle_of(searched, module)
    assert relative_error(logits, exact) > 20 * budget, "they are rounded"
    assert not find_wrong_step(searched, module, logits).kind
    assert find_wrong_step(searched, module, 1.3 * logits).kind == "step"


def test_a_wrong_step_is_what_is_left(tmp_path: Path) -> None:
    source = open_source(zoo.make("qwen3_gqa", tmp_path), CompileOptions())
    searched = open_subject(source, CompileOptions(), PROMPT)
    with torch.no_grad():
        logits = zoo.decoder(Path(source.name))(torch.tensor(PROMPT), torch.arange(len(PROMPT)))
    captured = searched.captured
    assert not find_wrong_step(searched, captured, logits.float()).kind
    assert find_wrong_step(searched, captured, logits.float() + 1e-3).kind == "step"
    with pytest.raises(ConfigError, match="0 tokens"):
        open_subject(source, CompileOptions(), ())


class Loaded:
    """A compiled model that answers with the logits of PyTorch."""

    def __init__(self, model: str) -> None:
        self.decoder = zoo.decoder(Path(model))

    def __call__(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.decoder(torch.tensor(ids), torch.arange(len(ids)))

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels have their own tests above: here they are not built."""
    monkeypatch.setattr(study, "find_wrong_kernel", lambda *_, **__: Finding())
    monkeypatch.setattr(command, "load", lambda model, options: Loaded(model))
    model = str(zoo.make("llama_mqa", tmp_path))
    done = CliRunner().invoke(app, ["bisect", model, "--json", "--against", "merge_qkv"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["kind"] == ""
    wrong = CliRunner().invoke(app, ["bisect", model, "--against", "raise_attention"])
    assert wrong.exit_code == 1 and "no optional pass" in wrong.output
