"""Eager reference of `aios::sample`: the definition that the generated samplers are tested against.

A row's steps, in vLLM's order: raw log-probabilities (log-softmax of the raw logits, in float32);
the allowed ids; biases (added); repetition penalty (of every listed id); frequency and presence
penalty (of ids with a count above 0); then greedy (temperature 0, the lowest id wins ties), or
temperature, min_p, top_k, top_p and one draw. Descending order is by value, the lowest id first
among equals, so top_k keeps exactly k tokens and a rank is unique. top_p keeps the smallest prefix
of that order whose mass reaches top_p of the mass left after min_p and top_k; masses are exp(s) cut
to 40 binary digits, whose sums are exact in any order. The draw is a Gumbel-max over the kept
tokens with one Philox4x32-10 number for each (seed, position, token id): independent of batch and
of the order of evaluation. Ids outside the vocabulary are ignored in lists and clamped in
`given_ids`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_LOGPROBS = 20
MASS_ONE = 2.0**40
WORD = 0xFFFFFFFF
LOW, HALF = np.uint64(WORD), np.uint64(32)
HIGHEST = torch.finfo(torch.float32).max


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    sample_positions: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
    penalty_starts: Tensor,
    penalty_ids: Tensor,
    penalty_counts: Tensor,
    bias_starts: Tensor,
    bias_ids: Tensor,
    bias_values: Tensor,
    allowed_starts: Tensor,
    allowed_ids: Tensor,
    logprob_counts: Tensor,
    given_ids: Tensor,
    has_given: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (sampled ids i64[R], logprobs f32[R], ranks i64[R] from 1, top ids i64[R, 20],
    top logprobs f32[R, 20], finite i64[R]).

    A row with a NaN or infinite logit has finite 0, id 0, logprob 0 and rank 0. Top entries beyond
    `logprob_counts` (or the vocabulary) are id 0 with logprob -inf. A row whose tokens are all
    banned gives id 0.
    """
    rows, vocabulary = logits.shape
    device = logits.device
    ids = torch.zeros(rows, dtype=torch.int64, device=device)
    logprobs = torch.zeros(rows, dtype=torch.float32, device=device)
    ranks, finite = torch.zeros_like(ids), torch.zeros_like(ids)
    top_ids = torch.zeros(rows, MAX_LOGPROBS, dtype=torch.int64, device=device)
    top_logprobs = torch.full((rows, MAX_LOGPROBS), float("-inf"), device=device)
    for r in range(rows):
        raw = logits[r].float()
        if not bool(raw.isfinite().all()):
            continue
        finite[r] = 1
        order = torch.sort(raw, descending=True, stable=True).indices
        normal = torch.log_softmax(raw, -1)
        count = min(int(logprob_counts[r]), MAX_LOGPROBS, vocabulary)
        top_ids[r, :count] = order[:count]
        top_logprobs[r, :count] = normal[order[:count]]
        if int(has_given[r]):
            chosen = min(max(int(given_ids[r]), 0), vocabulary - 1)
        else:
            z = raw.clone()
            allow(z, _row(allowed_ids, allowed_starts, r))
            add_bias(z, _row(bias_ids, bias_starts, r), _row(bias_values, bias_starts, r))
            listed = _row(penalty_ids, penalty_starts, r)
            counts = _row(penalty_counts, penalty_starts, r)
            penalize(
                z, listed, counts, repetition_penalty[r], frequency_penalty[r], presence_penalty[r]
            )
            z.clamp_(max=HIGHEST)
            if float(temperature[r]) <= 0.0 or not bool((z > float("-inf")).any()):
                chosen = int(torch.argmax((z == z.max()).int()))
            else:
                s = keep(z, temperature[r], int(top_k[r]), float(top_p[r]), float(min_p[r]))
                chosen = draw(s, int(seeds[r]), int(sample_positions[r]))
        ids[r], logprobs[r] = chosen, normal[chosen]
        ranks[r] = (order == chosen).nonzero()[0, 0] + 1
    return ids, logprobs, ranks, top_ids, top_logprobs, finite


def _row(values: Tensor, starts: Tensor, r: int) -> Tensor:
    return values[int(starts[r]) : int(starts[r + 1])]


def _known(ids: Tensor, z: Tensor) -> Tensor:
    return (ids >= 0) & (ids < z.shape[0])


def allow(z: Tensor, ids: Tensor) -> None:
    """Ban, in place, every token that is not listed; an empty list allows all."""
    if len(ids):
        banned = torch.ones_like(z, dtype=torch.bool)
        banned[ids[_known(ids, z)]] = False
        z[banned] = float("-inf")


def add_bias(z: Tensor, ids: Tensor, values: Tensor) -> None:
    """Add each listed value to its token, in place and in list order; -inf bans."""
    for token, value in zip(ids.tolist(), values):
        if 0 <= token < z.shape[0]:
            z[token] += value


def penalize(
    z: Tensor, ids: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> None:
    """Apply the three penalties in place."""
    known = _known(ids, z)
    ids, counts = ids[known], counts[known]
    values = z[ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    seen = counts > 0
    values = torch.where(seen, values - frequency * counts.float(), values)
    z[ids] = torch.where(seen, values - presence, values)


def keep(z: Tensor, temperature: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Return s[V]: (z - max z) / temperature for the kept tokens, -inf for the others."""
    s = (z - z.max()) / temperature
    mass = torch.exp(s)
    s[mass < min_p] = float("-inf")
    sorted_s, order = torch.sort(s, descending=True, stable=True)
    kept = int((sorted_s > float("-inf")).sum())
    if 0 < top_k < kept:
        kept = top_k
    if top_p < 1.0:
        masses = (mass[order[:kept]] * MASS_ONE).to(torch.int64).cumsum(0)
        enough = masses.double() >= top_p * masses[-1].double()
        kept = int(torch.argmax(enough.int())) + 1
    s[order[kept:]] = float("-inf")
    return s


def draw(s: Tensor, seed: int, position: int) -> int:
    """Return argmax of s + Gumbel noise; the lowest id wins ties."""
    noisy = s + gumbel(torch.arange(s.shape[0], device=s.device), seed, position)
    return int(torch.argmax((noisy == noisy.max()).int()))


def gumbel(ids: Tensor, seed: int, position: int) -> Tensor:
    """Return standard Gumbel noise f32 for (seed, position, token id).

    u = (word + 1/2) / 2^32 in float32, at most 1 - 2^-24; the noise is -log(-log(1 - u)), which
    keeps full precision where it is large.
    """
    zeros = torch.zeros_like(ids)
    counter = (ids & WORD, zeros + (position & WORD), zeros, zeros)
    word = philox(counter, (seed & WORD, (seed >> 32) & WORD))[0]
    u = (word.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp(max=1.0 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four 32-bit words (int64) of Philox4x32-10 (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = (c.cpu().numpy().astype(np.uint64) for c in counter)  # torch has no uint64
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (second >> HALF) ^ c1 ^ np.uint64(k0), second & LOW
        c2, c3 = (first >> HALF) ^ c3 ^ np.uint64(k1), first & LOW
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    words = (torch.from_numpy(np.asarray(c, np.int64)) for c in (c0, c1, c2, c3))
    return tuple(word.to(counter[0].device) for word in words)
