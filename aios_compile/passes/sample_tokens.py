"""Draw the next token of each row inside the compiled step.

Pays once a step: only ids and a few log-probabilities leave the step instead of R x V logits, and
sampling is planned, generated and parallel like everything else. Penalties, masks, temperature,
top-k, top-p, min-p and the seeded draw are one op (ir/sample_op.py); its parameters are arrays over
the rows, so that requests with different settings share a batch.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from aios_compile.ir import sample_op
from aios_compile.ir.module import outputs
from aios_compile.ir.symbols import new_size
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.graph_pass import graph_pass

aios = torch.ops.aios
RESULTS = ("sampled_ids", "logprobs", "ranks", "top_ids", "top_logprobs", "finite")


def _match(graph: fx.Graph, context: PassContext) -> fx.Node | Refusal | None:
    if RESULTS[0] in context.module.outputs:
        return None
    logits = outputs(graph)[0]
    if not isinstance(logits, fx.Node):
        return Refusal("the first output is not a tensor")
    shape = logits.meta["val"].shape
    rows = new_size(context.module.mode, "R").node.expr
    if len(shape) != 2 or isinstance(shape[0], int) or shape[0].node.expr != rows:
        return Refusal(f"the first output has shape {tuple(shape)}, expected logits [R, V]")
    return logits


@graph_pass(numerics="exact", required=True)
def sample_tokens(graph: fx.Graph, context: PassContext) -> int:
    """Append the sampler behind the logits and return what it found.

    Before::

        def f(logits: "f32[R, 101]"):
            return logits

    After::

        def f(logits: "f32[R, 101]", temperature: "input f32[R]", top_k: "input i64[R]",
              top_p: "input f32[R]", min_p: "input f32[R]", seeds: "input i64[R]",
              sample_positions: "input i64[R]", repetition_penalty: "input f32[R]",
              presence_penalty: "input f32[R]", frequency_penalty: "input f32[R]",
              penalty_starts: "input i64[R+1]", penalty_ids: "input i64[NP]",
              penalty_counts: "input i64[NP]", bias_starts: "input i64[R+1]",
              bias_ids: "input i64[NB]", bias_values: "input f32[NB]",
              allowed_starts: "input i64[R+1]", allowed_ids: "input i64[NA]",
              logprob_counts: "input i64[R]", given_ids: "input i64[R]",
              has_given: "input i64[R]"):
            s = aios.sample.default(
                logits, temperature, top_k, top_p, min_p, seeds, sample_positions,
                repetition_penalty, presence_penalty, frequency_penalty, penalty_starts,
                penalty_ids, penalty_counts, bias_starts, bias_ids, bias_values,
                allowed_starts, allowed_ids, logprob_counts, given_ids, has_given)
            return logits, s[0], s[1], s[2], s[3], s[4], s[5]
    """
    if context.region:
        return 0
    logits = _match(graph, context)
    if isinstance(logits, Refusal):
        context.refuse(logits)
    if not isinstance(logits, fx.Node):
        return 0
    _rewrite(graph, logits, context)
    return 1


def _rewrite(graph: fx.Graph, logits: fx.Node, context: PassContext) -> None:
    module = context.module
    inputs = [
        context.add_input(graph, name, (_size(size, context),), dtype)
        for name, (dtype, size) in sample_op.INPUTS.items()
    ]
    output = graph.output_node()
    with graph.inserting_before(output):
        sample = context.call(graph, aios.sample.default, logits, *inputs, source=[logits])
        results = [
            context.call(graph, operator.getitem, sample, i, source=[logits])
            for i in range(len(RESULTS))
        ]
    values, named = outputs(graph), len(module.outputs)
    output.args = ((*values[:named], *results, *values[named:]),)
    module.outputs = (*module.outputs, *RESULTS)
    module.states = {name: index + len(RESULTS) for name, index in module.states.items()}


def _size(size: str, context: PassContext) -> Any:
    name, _, extra = size.partition("+")
    return new_size(context.module.mode, name) + int(extra or 0)
