"""The op table: fakes agree with references, and references agree with PyTorch's own ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aios_compile.ir import ops, sample_op

aios = torch.ops.aios
torch.set_num_threads(1)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def caches() -> tuple[Tensor, Tensor]:
    return rand(6, 2, 8, 16), rand(6, 2, 16, 4)


def steps() -> tuple[Tensor, Tensor, Tensor]:
    """Return query starts, context lengths and page tables of two sequences, 3 and 1 tokens."""
    return torch.tensor([0, 3, 4]), torch.tensor([20, 17]), torch.tensor([[4, 1], [2, 5]])


def sampling(rows: int) -> tuple[Tensor, ...]:
    lengths = {"R": rows, "R+1": rows + 1}
    neutral = {"top_p": 1, "repetition_penalty": 1}
    return tuple(
        torch.full((lengths.get(size, 0),), neutral.get(name, 0), dtype=dtype)
        for name, (dtype, size) in sample_op.INPUTS.items()
    )


EXAMPLES: dict[str, tuple[Any, ...]] = {
    "linear": (rand(3, 8), rand(5, 8, dtype=torch.bfloat16), rand(5)),
    "bf16_linear": (rand(3, 8), rand(5, 8, dtype=torch.bfloat16), rand(5)),
    "expert_linear": (rand(3, 8), rand(4, 5, 8), torch.tensor([1, 0, 3, 3, 0, 2]), rand(4, 5)),
    "quantized_expert_linear": (
        *(rand(3, 64), aios.quantize_rows(rand(4, 5, 64), "int8_g32_f16")),
        *(torch.tensor([1, 0, 3, 3, 0, 2]), "int8_g32_f16", rand(4, 5)),
    ),
    "rms_norm": (rand(3, 2, 8).transpose(0, 1), rand(8), 1e-6, True),
    "layer_norm": (rand(3, 8), rand(8), None, 1e-5),
    "rope": (rand(1, 3, 2, 8), rand(1, 3, 4), rand(1, 3, 4), True),
    "gated_activation": (rand(3, 8), rand(3, 8), "gelu_tanh"),
    "sdpa": (rand(2, 3, 8), rand(2, 3, 8), rand(2, 3, 4), None, True, None, False),
    "attention": (rand(3, 4, 8), rand(3, 2, 8), rand(3, 2, 4), 0.3, 2, 5.0, None, rand(4)),
    "paged_attention": (rand(4, 4, 8), *caches(), *steps(), 0.3, None, None, 4, None),
    "quantized_kv_write": (
        *(rand(3, 2, 8), rand(3, 2, 4), *(c.to(torch.int8) for c in caches())),
        *(rand(6, 2, 16), rand(6, 2, 16), torch.tensor([35, 16, 90])),
    ),
    "kv_write": (rand(3, 2, 8), rand(3, 2, 4), *caches(), torch.tensor([35, 16, 90])),
    "quantize_rows": (rand(5, 64, dtype=torch.bfloat16), "int4_g32_f16"),
    "dequantize_rows": (aios.quantize_rows(rand(5, 64), "int8_g32_f16"), "int8_g32_f16"),
    "quantized_embedding": (
        aios.quantize_rows(rand(5, 64), "int8_g32_f16"),
        torch.tensor([4, 0, 4]),
        "int8_g32_f16",
    ),
    "quantized_linear": (
        rand(3, 64),
        aios.quantize_rows(rand(5, 64), "int8_g32_f16"),
        "int8_g32_f16",
        rand(5),
    ),
    "sample": (rand(2, 30), *sampling(2)),
}


def test_every_op_of_the_table_has_an_example() -> None:
    assert set(EXAMPLES) == set(ops.TABLE)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_fake_has_the_shapes_and_strides_of_the_reference(name: str) -> None:
    overload = getattr(aios, name).default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(overload, EXAMPLES[name], test_utils=checks)


PERMUTED = {
    "rms_norm": lambda x: aios.rms_norm(x, None, 1e-6, True),
    "layer_norm": lambda x: aios.layer_norm(x, None, None, 1e-5),
    "gated_activation": lambda x: aios.gated_activation(x, x, "silu"),
    "rope": lambda x: aios.rope(x, x[..., 0, :], x[..., 0, :], False),
    "linear": lambda x: aios.linear(x, torch.ones(5, 8)),
    "expert_linear": lambda x: aios.expert_linear(
        x[0, 0].t().contiguous().t(), torch.ones(3, 5, 8), torch.arange(x.shape[2]) % 3
    ),
    "attention": lambda x: aios.attention(x[0], x[0], x[0], 1.0),
}


@pytest.mark.parametrize("name", PERMUTED)
def test_results_are_contiguous_whatever_the_inputs_strides(name: str) -> None:
    x = rand(1, 2, 3, 8).transpose(1, 2).contiguous(memory_format=torch.channels_last)
    assert PERMUTED[name](x).is_contiguous()


def test_a_half_precision_weight_is_upcast_and_rounded_once() -> None:
    x, w = rand(3, 64), rand(5, 64, dtype=torch.bfloat16)
    assert torch.equal(aios.linear(x, w), x @ w.float().T)
    half = aios.linear(x.bfloat16(), w)
    assert torch.equal(half, (x.bfloat16().float() @ w.float().T).bfloat16())


def test_rms_norm_is_torch_rms_norm() -> None:
    x, w = rand(3, 64).double(), rand(64).double()
    torch.testing.assert_close(aios.rms_norm(x, w, 1e-6, True), F.rms_norm(x, [64], w, 1e-6))


def test_the_cast_order_of_rms_norm_shows_in_half_precision() -> None:
    x, w = rand(64, 64, dtype=torch.bfloat16), rand(64, dtype=torch.bfloat16)
    after = aios.rms_norm(x, w, 1e-6, False)
    assert not torch.equal(after, aios.rms_norm(x, w, 1e-6, True))


def test_layer_norm_is_torch_layer_norm() -> None:
    x, w, b = rand(3, 64).double(), rand(64).double(), rand(64).double()
    want = F.layer_norm(x, [64], w, b, 1e-5)
    torch.testing.assert_close(aios.layer_norm(x, w, b, 1e-5), want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_rotates_pairs_and_passes_the_rest_through(interleaved: bool) -> None:
    x, angles = rand(3, 2, 8).double(), rand(3, 2).double()
    spread = (lambda a: a.repeat_interleave(2, -1)) if interleaved else (lambda a: a.repeat(1, 2))
    out = aios.rope(x, spread(angles).cos(), spread(angles).sin(), interleaved)
    first = x[..., 0:4:2] if interleaved else x[..., 0:2]
    second = x[..., 1:4:2] if interleaved else x[..., 2:4]
    turned = torch.complex(first, second) * torch.polar(
        torch.ones(3, 1, 2).double(), angles[:, None]
    )
    got = (out[..., 0:4:2], out[..., 1:4:2]) if interleaved else (out[..., 0:2], out[..., 2:4])
    torch.testing.assert_close(torch.complex(*got), turned)
    assert torch.equal(out[..., 4:], x[..., 4:])


def test_attention_is_causal_grouped_scaled_dot_product_attention() -> None:
    q, k, v = rand(9, 4, 8).double(), rand(9, 2, 8).double(), rand(9, 2, 4).double()
    want = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(aios.attention(q, k, v, 0.3), want[0].transpose(0, 1))


def test_window_chunk_and_sinks() -> None:
    q, k, v = rand(9, 2, 8).double(), rand(9, 2, 8).double(), rand(9, 2, 4).double()
    windowed = aios.attention(q, k, v, 0.3, 3)
    torch.testing.assert_close(windowed[8:], aios.attention(q[6:], k[6:], v[6:], 0.3)[2:])
    chunked = aios.attention(q, k, v, 0.3, None, None, 4)
    torch.testing.assert_close(chunked[4:8], aios.attention(q[4:8], k[4:8], v[4:8], 0.3))
    nothing = aios.attention(q, k, v, 0.3, None, None, None, torch.full((2,), -1e30).double())
    torch.testing.assert_close(nothing, aios.attention(q, k, v, 0.3))
    all_of_it = aios.attention(q, k, v, 0.3, None, None, None, torch.full((2,), 1e9).double())
    assert all_of_it.abs().max() == 0


def test_a_write_touches_its_slots_only() -> None:
    k_cache, v_cache = caches()
    k, v = rand(2, 2, 8), rand(2, 2, 4)
    new_k, new_v = aios.kv_write(k, v, k_cache, v_cache, torch.tensor([3 * 16 + 5, 16]))
    assert torch.equal(new_k[3, :, :, 5], k[0]) and torch.equal(new_k[1, :, :, 0], k[1])
    assert torch.equal(new_v[3, :, 5], v[0]) and torch.equal(new_v[1, :, 0], v[1])
    assert int((new_k != k_cache).sum()) == 2 * 2 * 8
    assert int((new_v != v_cache).sum()) == 2 * 2 * 4
