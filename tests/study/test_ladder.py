"""The ladder: every stage answers the same request; launches and bytes fall as passes are added."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from aios_compile.config import CompileOptions
from aios_compile.errors import ConfigError
from aios_compile.model_source import open_source
from aios_compile.study.ladder import Request, Rung, climb, svg
from tests import zoo


class Loaded:
    """A compiled model that answers with the logits of PyTorch; the fewer passes are left out,
    the quicker: a token a millisecond with all of them."""

    chosen: list[int | None] = []

    runner = SimpleNamespace(num_threads=3)

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.chosen.append(options["num_threads"])
        if options["quantization"]:
            raise ConfigError("no kernel for these rows")
        self.decoder = zoo.decoder(path)
        self.us = 1e3 * (1 + len(options["disable_passes"]))

    def generate(self, prompts: list[Any], max_tokens: int, **unused: Any) -> list[Any]:
        metrics = SimpleNamespace(ttft_us=5e3, total_us=5e3 + self.us * (max_tokens - 1))
        return [SimpleNamespace(metrics=metrics) for _ in prompts]

    def __call__(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.decoder(torch.tensor(ids), torch.arange(len(ids)))

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_every_stage_computes_the_same(tmp_path: Path) -> None:
    path = zoo.make("qwen3_gqa", tmp_path)
    source = open_source(path, CompileOptions())
    request = Request(tuple(range(3, 12)), 4)
    rungs = list(climb(source, CompileOptions(), lambda o: Loaded(path, o), request))
    by_name = {r.name: r for r in rungs}
    titles = ("no optional pass", "+ raise", "+ rewrite", "+ fuse")
    programs = [by_name[f"C++, {title}"] for title in titles]
    launches = [r.launches or 0 for r in programs]
    assert launches == sorted(launches, reverse=True) and len(set(launches)) == 4
    speeds = [r.tokens_per_second for r in programs]
    assert speeds == sorted(speeds) and round(speeds[-1]) == 1000, "each is a program of its own"
    in_pytorch = [by_name[n] for n in ("PyTorch eager", "captured, in PyTorch")]
    assert all(r.error is not None and r.error < 1e-5 for r in (*in_pytorch, *programs))
    assert all(r.tokens_per_second > 0 for r in in_pytorch)
    assert Loaded.chosen[0] is None and set(Loaded.chosen[1:]) == {3}, "the same threads for all"
    assert round(by_name["8 sequences in a batch"].tokens_per_second) == 8000
    assert rungs[-1].name.startswith("int8 weights: no kernel") and not rungs[-1].tokens_per_second


def test_the_plot_has_a_bar_for_each_rung() -> None:
    rungs = [Rung("a < b", 2.0), Rung("c", 2000.0), Rung("not run", 0.0)]
    bars = [e for e in ElementTree.fromstring(svg(rungs)) if e.tag.endswith("rect")]
    assert len(bars) == 2 and float(bars[1].get("width", "0")) > float(bars[0].get("width", "0"))
