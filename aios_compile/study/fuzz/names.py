"""Names of passes and operators; free of torch, so that a wrong name is reported at once."""

from __future__ import annotations

from collections.abc import Sequence

from aios_compile.errors import ConfigError, did_you_mean
from aios_compile.study.fuzz.graph_ops import OPS
from aios_compile.study.fuzz.raise_patterns import SOURCES
from aios_compile.study.fuzz.step_patterns import FUSED, STEPS

# Those whose patterns are drawn with a setting; tests hold the table against patterns.PATTERNS.
BY_SETTING = ("keep_quantized_weights", "quantize_weights", "quantize_kv", "round_activations")
PLANTED = tuple(sorted({*SOURCES, *FUSED, *STEPS, *BY_SETTING}))


def check_names(passes: Sequence[str], ops: Sequence[str]) -> None:
    """Raise ConfigError for a pass without patterns, or an operator that is not drawn."""
    for kind, names, known in (("pass", passes, PLANTED), ("operator", ops, tuple(OPS))):
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(
                    f"no {kind} {name!r}", advice=f"{hint}there are {', '.join(known)}"
                )
