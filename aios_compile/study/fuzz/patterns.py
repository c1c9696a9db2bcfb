"""All patterns, by the pass that looks for them."""

from __future__ import annotations

import re
from typing import Any

from aios_compile.study.fuzz.builder import Pattern
from aios_compile.study.fuzz.raise_patterns import SOURCES
from aios_compile.study.fuzz.step_patterns import CODES, FUSED, QUANTISED, ROUNDED, STEPS

STORED = ("int8_g32_f16", "uint4_g32_f16_min_f16")
QUANTIZATION = ("int8_g32_f16", "int4_g32_f16")


def _pattern(pass_name: str, text: str, *, steps: bool = False, **more: Any) -> Pattern:
    found = re.search(r"def (\w+)", text)
    assert found
    return Pattern(pass_name, found[1], text.strip() + "\n", steps, **more)


def _all() -> tuple[Pattern, ...]:
    found = [
        _pattern(name, text)
        for table in (SOURCES, FUSED)
        for name, texts in table.items()
        for text in texts
    ]
    found += [_pattern(n, text, steps=True) for n, texts in STEPS.items() for text in texts]
    for text in QUANTISED:
        found += [
            _pattern("keep_quantized_weights", text, steps=True, stored=form) for form in STORED
        ]
        found += [
            _pattern("quantize_weights", text, steps=True, quantization=form)
            for form in QUANTIZATION
        ]
    found += [
        _pattern("quantize_kv", text, steps=True, kv=form)
        for text in CODES
        for form in ("int8", "e4m3")
    ]
    found.append(_pattern("round_activations", ROUNDED, steps=True, rounded=True))
    return tuple(found)


PATTERNS = _all()
