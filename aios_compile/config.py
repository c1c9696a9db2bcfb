"""Every option of `load_and_compile`: its default, its range and whether it changes the artefact.

One table serves the Python API, the command line and the cache key. Values are checked when the
object is made, so every CompileOptions that exists is in range.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aios_compile import env
from aios_compile.errors import ConfigError, did_you_mean
from aios_compile.ir.quant_format import SHORT_NAMES, QuantFormat

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8", "fp8")
KV_CODES = {"int8": "int8", "fp8": "e4m3"}  # caches of codes, and what the codes are
SCHEDULING_POLICIES = ("fcfs", "priority", "fair_share", "shortest_remaining")
# The names that vLLM and torch use for the same thing.
_DTYPE_ALIASES = {"float": "float32", "half": "float16", "fp32": "float32", "bf16": "bfloat16"}
_KV_ALIASES = {**_DTYPE_ALIASES, "fp8_e4m3": "fp8", "float8_e4m3fn": "fp8"}

# Fields that leave the artefact as it is, each with the reason. All others are part of its key.
NOT_IN_KEY = {
    "progress": "changes only what is printed",
    "cache_dir": "says where the artefact lies",
    "local_files_only": "says how files are found; their content is in the key",
    "seed": "goes to the sampler with each request",
    "num_threads": "kernels give the same bits for every number of threads",
    "enable_prefix_caching": "a policy of the runtime",
    "speculative_config": "a policy of the runtime; the draft model has an artefact of its own",
    "scheduling_policy": "a policy of the runtime",
    "chunked_prefill_size": "a policy of the runtime",
    "swap_space_bytes": "sizes a pool that no kernel sees",
    "decision_log": "says what is written down",
    "kv_cache_memory_bytes": "sizes the runtime's pool of pages, which no kernel depends on",
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class CompileOptions:
    """The keywords of `load_and_compile`. Frozen; raises ConfigError for a value out of range.

    `dtype` and `device` also accept torch's objects: only their text is read. Sizes left at None
    are chosen by `resolve_sizes` when the model is known.
    """

    device: str = _option("auto", "auto, cpu, cuda, or interpreter: Triton kernels on a CPU")
    dtype: str = _option("auto", "auto (the checkpoint's), float32, bfloat16 or float16")
    quantization: str | None = _option(None, "int8, int4, fp8, or a format: uint4_g64_f16_min_f16")
    quantize_embeddings: bool = _option(
        False, "with quantization: the embedding table too; one tied to the head is stored once"
    )
    kv_cache_dtype: str = _option("auto", "auto, float32, bfloat16, int8 or fp8 (e4m3)")
    max_model_len: int | None = _option(None, "longest prompt + output, in tokens")
    max_num_seqs: int | None = _option(None, "sequences in one step")
    max_num_batched_tokens: int | None = _option(None, "tokens in one step")
    kv_cache_memory_bytes: int | None = _option(None, "size of the KV cache, in bytes")
    persistent_decode: bool = _option(
        False, "on a GPU: one launch a layer for up to 32 tokens instead of one a kernel"
    )
    compile_candidates: int = _option(
        0,
        "on a GPU: configurations of a linear kernel that the compiler reports on before one "
        "is chosen, a variant; 0: by the cost model alone",
    )
    gpu_memory_utilization: float = _option(0.9, "share of the GPU's memory to use, 0..1")
    enable_prefix_caching: bool = _option(True, "share the pages of equal prefixes")
    scheduling_policy: str = _option("fcfs", "fcfs, priority, fair_share or shortest_remaining")
    chunked_prefill_size: int | None = _option(
        None, "prompt tokens in a step that also continues running sequences; default a quarter"
    )
    swap_space_bytes: int | None = _option(
        None,
        "host memory for preempted sequences, in bytes; default a quarter of the KV cache, beside "
        "a GPU at most 2 GiB",
    )
    decision_log: str | None = _option(None, "file for every decision of the scheduler, see replay")
    speculative_config: Mapping[str, Any] | None = _option(
        None, "drafts: method ngram or a draft model, num_speculative_tokens, prompt_lookup_min/max"
    )
    tensor_parallel_size: int = _option(1, "1; more is not built yet")
    pipeline_parallel_size: int = _option(1, "1; more is not built yet")
    tokenizer: str | None = _option(None, "folder or hub id of another tokenizer")
    local_files_only: bool = _option(False, "never ask the hub")
    cache_dir: str | None = _option(None, "folder of the artefact cache")
    seed: int = _option(0, "seed of requests that bring none")
    num_threads: int | None = _option(None, "threads of the C++ target; default all cores")
    disable_passes: tuple[str, ...] = _option((), "passes to leave out")
    progress: bool = _option(True, "show the stages and their time on stderr")

    def __post_init__(self) -> None:
        aliases = {"device": {}, "dtype": _DTYPE_ALIASES, "kv_cache_dtype": _KV_ALIASES}
        for name, known in aliases.items():
            text = str(getattr(self, name)).removeprefix("torch.")
            self._set(name, known.get(text, text))
        for name in ("tokenizer", "cache_dir", "decision_log"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, str | os.PathLike):
                    raise _bad(name, value, "a path or None")
                self._set(name, os.fspath(value))
        self._set("disable_passes", _names("disable_passes", self.disable_passes))
        self._check_choices()
        self._check_numbers()
        self._check_not_built()
        _ = self.speculation  # raises

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_choices(self) -> None:
        if self.device.partition(":")[0] not in ("auto", "cpu", "cuda", "interpreter"):
            raise _bad("device", self.device, "auto, cpu, cuda or interpreter")
        if self.dtype not in DTYPES:
            raise _bad("dtype", self.dtype, ", ".join(DTYPES))
        if self.quantization is not None:
            self._check_quantization(self.quantization)
        if self.quantize_embeddings is True and self.quantization is None:
            raise _bad("quantize_embeddings", True, "quantization to say how")
        if self.scheduling_policy not in SCHEDULING_POLICIES:
            raise _bad("scheduling_policy", self.scheduling_policy, ", ".join(SCHEDULING_POLICIES))
        known = (*KV_CACHE_DTYPES, "fp8_e5m2")
        if self.kv_cache_dtype not in known:
            raise _bad("kv_cache_dtype", self.kv_cache_dtype, ", ".join(KV_CACHE_DTYPES))
        for name in (
            "enable_prefix_caching",
            "local_files_only",
            "persistent_decode",
            "progress",
            "quantize_embeddings",
        ):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "True or False")

    def _check_numbers(self) -> None:
        _whole("max_model_len", self.max_model_len, 2, 1 << 24)
        _whole("max_num_seqs", self.max_num_seqs, 1, 4096)
        _whole("max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 20)
        _whole("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, 1 << 50)
        _whole("chunked_prefill_size", self.chunked_prefill_size, 1, 1 << 20)
        _whole("swap_space_bytes", self.swap_space_bytes, 0, 1 << 50)
        _whole("num_threads", self.num_threads, 1, 1024)
        _whole("compile_candidates", self.compile_candidates, 0, 64, optional=False)
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            _whole(name, getattr(self, name), 1, 1024, optional=False)
        _whole("seed", self.seed, 0, (1 << 64) - 1, optional=False)
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise _bad("gpu_memory_utilization", share, "a number above 0 and at most 1")
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if seqs is not None and tokens is not None and tokens < seqs:
            raise _bad("max_num_batched_tokens", tokens, f"at least max_num_seqs ({seqs})")

    def _check_not_built(self) -> None:
        missing = {
            "kv_cache_dtype": self.kv_cache_dtype not in KV_CACHE_DTYPES
            and "a KV cache of e5m2 numbers",
            "tensor_parallel_size": self.tensor_parallel_size > 1 and "tensor parallelism",
            "pipeline_parallel_size": self.pipeline_parallel_size > 1 and "pipeline parallelism",
        }
        for name, part in missing.items():
            if part:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}: {part} has not been built yet",
                    advice=f"leave {name} at {_FIELDS[name].default!r}",
                )

    def _check_quantization(self, name: object) -> None:
        expected = "int8, int4, fp8, or int4_g64_f16, uint4_g32_bf16_min_bf16 and their like"
        try:
            usable = isinstance(name, str) and QuantFormat.parse(_form(name)).can_quantize
        except ValueError:
            usable = False
        if not usable:
            raise _bad("quantization", name, expected)

    def quantization_format(self) -> str:
        """Return the name of the format (ir/quant_format.py) of linear weights, or ""."""
        return "" if self.quantization is None else _form(self.quantization)

    @classmethod
    def parse(cls, keywords: Mapping[str, Any]) -> CompileOptions:
        """Return the options in `keywords`; an unknown name raises and lists the known ones."""
        for name in keywords:
            if name not in _FIELDS:
                hint = did_you_mean(name, _FIELDS)
                raise ConfigError(
                    f"unknown option {name!r}", advice=f"{hint}the options are {', '.join(_FIELDS)}"
                )
        return cls(**keywords)

    def key_fields(self) -> dict[str, Any]:
        """Return everything that changes the artefact, ready for JSON; see NOT_IN_KEY."""
        fields = {name: getattr(self, name) for name in _FIELDS if name not in NOT_IN_KEY}
        fields["disable_passes"] = list(self.disabled_passes())
        return fields

    def disabled_passes(self) -> tuple[str, ...]:
        """Return the passes to leave out: the option's and those of AIOS_DISABLE, sorted."""
        return tuple(sorted({*self.disable_passes, *env.DISABLE.get_names()}))

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """Return the checked speculative_config."""
        given = self.speculative_config
        return None if given is None else SpeculativeConfig.parse(given)

    def joined_launches(self) -> str:
        """Return the kind of device that persistent_decode is for, "" when it is off.

        Raises ConfigError for the C++ target, whose step is one parallel region as it is.
        """
        kind = self.device.partition(":")[0]
        if self.persistent_decode and kind not in ("cuda", "interpreter"):
            raise ConfigError(
                f"persistent_decode=True with device={self.device!r}: only a GPU has launches",
                advice="leave it out: a step on the CPU is one parallel region as it is",
            )
        return kind if self.persistent_decode else ""

    def threads(self) -> int:
        """Return the number of threads: the option, or every core that this process may use."""
        return env.num_cores() if self.num_threads is None else self.num_threads

    def resolve_sizes(self, model_max_len: int) -> ResolvedSizes:
        """Return the sizes of a step for a model that knows `model_max_len` positions.

        The defaults suit a machine with a few cores: 16 sequences, 512 tokens a step (far past the
        point where a prefill chunk is bound by arithmetic) and at most 4096 positions.
        """
        length = self.max_model_len or min(model_max_len, 4096)
        if length > model_max_len:
            raise _bad("max_model_len", length, f"at most the model's {model_max_len} positions")
        tokens = self.max_num_batched_tokens or max(512, self.max_num_seqs or 0)
        return ResolvedSizes(length, self.max_num_seqs or min(16, tokens), tokens)


@dataclass(frozen=True)
class SpeculativeConfig:
    """How drafts are made (vLLM's names). method "ngram" looks the last tokens up in the text so
    far, longest match first, of prompt_lookup_min to prompt_lookup_max tokens; "draft_model" asks
    the model in `model`, a folder or hub id. num_speculative_tokens: most drafts in one step.
    adaptive: fewer, or none, where measurements say that they do not pay.
    """

    method: str
    num_speculative_tokens: int = 3  # 1 + 3 rows are one tile of the CPU's linear kernels
    model: str | None = None
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4
    adaptive: bool = True

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> SpeculativeConfig:
        """Return the checked config; raise ConfigError for unknown names and values."""
        where = "speculative_config"
        if not isinstance(given, Mapping):
            raise _bad(where, given, "a mapping, or None")
        known = [item.name for item in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"{where}: unknown key {name!r}", advice=f"the keys are {', '.join(known)}"
                )
        values = dict(given)
        model = values.get("model")
        if model in ("ngram", "[ngram]"):  # vLLM takes the method under this name too
            values.update(method="ngram", model=None)
        elif model is not None:
            if not isinstance(model, str | os.PathLike):
                raise _bad(f"{where}: model", model, "a path")
            values["model"] = os.fspath(model)
            values.setdefault("method", "draft_model")
        method = values.get("method")
        if method not in ("ngram", "draft_model"):
            raise _bad(f"{where}: method", method, "ngram or draft_model")
        if (method == "draft_model") != (values.get("model") is not None):
            raise ConfigError(
                f"{where}: method {method!r} with model={values.get('model')!r}, expected a model "
                "for draft_model and none for ngram"
            )
        _whole(
            f"{where}: num_speculative_tokens",
            values.get("num_speculative_tokens", 1),
            1,
            64,
            optional=False,
        )
        low, high = values.get("prompt_lookup_min"), values.get("prompt_lookup_max")
        if low is None or high is None:  # as in vLLM, one of them alone is both
            values["prompt_lookup_min"] = low or high or cls.prompt_lookup_min
            values["prompt_lookup_max"] = high or low or cls.prompt_lookup_max
        for name in ("prompt_lookup_min", "prompt_lookup_max"):
            _whole(f"{where}: {name}", values[name], 1, 64, optional=False)
        if values["prompt_lookup_min"] > values["prompt_lookup_max"]:
            raise ConfigError(
                f"{where}: prompt_lookup_min={values['prompt_lookup_min']} is above "
                f"prompt_lookup_max={values['prompt_lookup_max']}"
            )
        if not isinstance(values.get("adaptive", True), bool):
            raise _bad(f"{where}: adaptive", values["adaptive"], "True or False")
        return cls(**values)


@dataclass(frozen=True)
class ResolvedSizes:
    """The sizes of one step, all given."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


_FIELDS = {item.name: item for item in dataclasses.fields(CompileOptions)}


def _form(quantization: str) -> str:
    return SHORT_NAMES.get(quantization, quantization)


def _bad(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{name}={value!r} is out of range, expected {expected}")


def _whole(name: str, value: object, low: int, high: int, *, optional: bool = True) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _bad(name, value, f"a whole number from {low} to {high}")


def _names(field_name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else list(value)
    names = [item.strip() for item in items if isinstance(item, str)]
    if len(names) != len(items) or not all(name.isidentifier() for name in names if name):
        raise _bad(field_name, value, "names of passes")
    return tuple(sorted({name for name in names if name}))
