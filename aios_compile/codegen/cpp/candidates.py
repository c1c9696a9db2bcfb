"""What may be chosen for a linear of the C++ target: how its weights are fetched.

The structs of tiles.h, and where each can differ from the standard way (the cost model that comes
before any clock): a step of one token is bound by the weights' bytes, so it matters how they are
fetched. Tiles of several tokens are slower without prefetches (0.64-0.99x, but for the head), and
no other way of theirs was. Small matrices stay in caches: nothing is tried for them.
"""

from __future__ import annotations

from aios_compile.codegen.source import Candidate

LEAST_BYTES = 1 << 20  # of a packed matrix


def candidates_of(weight_bytes: int) -> tuple[Candidate, ...]:
    """Return the candidates for a matrix of so many bytes."""
    if weight_bytes < LEAST_BYTES:
        return ()
    return (
        Candidate("into_l2", "IntoL2", 1, 1, "weights prefetched into L2, 1 KiB ahead"),
        Candidate("unfetched", "Unfetched", 1, 1, "no prefetch but the hardware's"),
    )
