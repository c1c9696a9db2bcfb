"""The table of contents: every pass, in order. Each line says why it stands where it stands."""

from __future__ import annotations

from aios_compile.ir.module import Level
from aios_compile.passes.copy_strided_inputs import copy_strided_inputs
from aios_compile.passes.eliminate_common_subexpressions import eliminate_common_subexpressions
from aios_compile.passes.eliminate_views import eliminate_views
from aios_compile.passes.fold_constants import fold_constants
from aios_compile.passes.form_kernels import form_kernels
from aios_compile.passes.fuse_add_rms_norm import fuse_add_rms_norm
from aios_compile.passes.fuse_kv_write_into_attention import fuse_kv_write_into_attention
from aios_compile.passes.fuse_linear_epilogue import fuse_linear_epilogue
from aios_compile.passes.fuse_norm_into_linear import fuse_norm_into_linear
from aios_compile.passes.fuse_pointwise import fuse_pointwise
from aios_compile.passes.fuse_qk_norm_rope_kv_write import fuse_qk_norm_rope_kv_write
from aios_compile.passes.gather_last_tokens import gather_last_tokens
from aios_compile.passes.keep_quantized_weights import keep_quantized_weights
from aios_compile.passes.merge_gate_up import merge_gate_up
from aios_compile.passes.merge_qkv import merge_qkv
from aios_compile.passes.own_outputs import own_outputs
from aios_compile.passes.page_attention import page_attention
from aios_compile.passes.quantize_kv import quantize_kv
from aios_compile.passes.quantize_weights import quantize_weights
from aios_compile.passes.raise_attention import raise_attention
from aios_compile.passes.raise_expert_linear import raise_expert_linear
from aios_compile.passes.raise_gated_mlp import raise_gated_mlp
from aios_compile.passes.raise_layer_norm import raise_layer_norm
from aios_compile.passes.raise_linear import raise_linear
from aios_compile.passes.raise_positions import raise_positions
from aios_compile.passes.raise_rms_norm import raise_rms_norm
from aios_compile.passes.raise_rope import raise_rope
from aios_compile.passes.raise_sequence_lengths import raise_sequence_lengths
from aios_compile.passes.round_activations import round_activations
from aios_compile.passes.runner import Stage
from aios_compile.passes.sample_tokens import sample_tokens
from aios_compile.passes.token_mixing import note_token_mixing
from aios_compile.passes.widen_activations import widen_activations

RAISE = Stage(
    Level.SEMANTIC,
    (
        widen_activations,  # first: casts would stand between the nodes of every later pattern
        fold_constants,
        eliminate_common_subexpressions,
        raise_linear,
        raise_expert_linear,
        raise_rms_norm,
        raise_layer_norm,
        raise_rope,
        raise_attention,  # after rope: what is left between rope and scores is layout
        raise_gated_mlp,
        raise_sequence_lengths,
        raise_positions,  # after attention, whose masks count tokens too
        eliminate_views,  # last: the raised ops dictate the layouts, most transposes cancel
    ),
    note_token_mixing,  # now that attention is one op: what else mixes tokens
)
REWRITE = Stage(
    Level.SEMANTIC,
    (
        page_attention,
        quantize_kv,  # at once: later passes see one kind of cache
        gather_last_tokens,  # before sampling: it cuts the head to the rows that are needed
        sample_tokens,
        keep_quantized_weights,  # before the merges: rows of one format are merged, others not
        merge_qkv,
        merge_gate_up,
        quantize_weights,  # after the merges: they concatenate floats
        round_activations,  # what stayed bf16
    ),
)
FUSE = Stage(
    Level.KERNELS,
    (
        own_outputs,
        copy_strided_inputs,
        fuse_kv_write_into_attention,
        fuse_qk_norm_rope_kv_write,  # where the attention is another kernel
        fuse_norm_into_linear,  # before fuse_add_rms_norm, which would take the norm
        fuse_add_rms_norm,  # before the epilogue, which would take the add
        fuse_linear_epilogue,
        fuse_pointwise,  # what no template took
        form_kernels,
    ),
)
STAGES = (RAISE, REWRITE, FUSE)
PIPELINE = tuple(p for stage in STAGES for p in stage.passes)
