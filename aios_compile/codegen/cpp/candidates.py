"""What may be chosen for a linear of the C++ target: prefetches, and how many tokens go together.

The structs of tiles.h, and where each can differ from the standard way (the cost model that comes
before any clock): a step of one token is bound by the weights' bytes, so it may matter how they are
fetched; full tiles may do without prefetches; a larger chunk of tokens reads the weights less often
but only where it makes fewer chunks. Small matrices stay in caches: nothing is tried for them.
"""

from __future__ import annotations

from aios_compile.codegen.source import Candidate

LEAST_BYTES = 1 << 20  # of a packed matrix
CHUNK_BYTES = 393216  # Standard::L2_BYTES of tiles.h
ANY = 1 << 20  # tokens: no step has more


def candidates_of(weight_bytes: int, token_bytes: int) -> tuple[Candidate, ...]:
    """Return the candidates for a matrix of so many bytes, whose prepared tokens take so many."""
    if weight_bytes < LEAST_BYTES:
        return ()
    one_chunk = max(1, CHUNK_BYTES // token_bytes)
    return (
        Candidate("into_l2", "IntoL2", 1, 1, "weights prefetched into L2, 2 KiB ahead"),
        Candidate("unfetched", "Unfetched", 1, ANY, "no prefetch but the hardware's"),
        Candidate("wide", "Wide", one_chunk + 1, ANY, "chunks of tokens of 768 KiB"),
    )
