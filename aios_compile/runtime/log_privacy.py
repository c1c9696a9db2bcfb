"""Prompts never go into the log: tokens become pseudonyms that keep every decision the same.

The scheduler looks at token values only to find equal prefixes. So position k of a sequence is
written as a keyed hash of its tenant and its first k + 1 tokens: equal exactly where the whole
prefix is, and telling nothing else. The key lives in this process and is never written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

PSEUDONYM_BYTES = 6  # JSON readers keep integers of 53 bits


class Pseudonyms:
    """The running hash of every live sequence. Owner: the decision log."""

    def __init__(self) -> None:
        self._key = os.urandom(32)
        self._hashes: dict[int, Any] = {}

    def arrive(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the record of an arrival without its tokens and its tenant's name."""
        tenant = record["tenant"].encode()
        prefix = blake2b(tenant, key=self._key, digest_size=PSEUDONYM_BYTES)
        name = prefix.hexdigest() if tenant else ""
        values = _extend(prefix, record["tokens"])
        if values:
            first = record["sequence_id"]
            for i in range(record["num_sequences"]):
                self._hashes[first + i] = prefix.copy()
        return {**record, "tokens": values, "tenant": name}

    def commit(self, record: dict[str, Any], sequence_ids: Sequence[int]) -> dict[str, Any]:
        """Return the record of a commit; sequence_ids are those of the step's chunks."""
        sampled = [
            _extend(self._hashes[number], tokens) if number in self._hashes else [0] * len(tokens)
            for number, tokens in zip(sequence_ids, record["sampled"])
        ]
        return {**record, "sampled": sampled}

    def forget(self, sequence_ids: Iterable[int]) -> None:
        """Drop sequences that have ended."""
        for number in sequence_ids:
            self._hashes.pop(number, None)


def _extend(prefix: Any, tokens: Sequence[int]) -> list[int]:
    values = []
    for token in tokens:
        prefix.update(int(token).to_bytes(8, "little", signed=True))
        values.append(int.from_bytes(prefix.digest(), "little"))
    return values


def without_tokens(
    record: Mapping[str, Any], pseudonyms: Pseudonyms, sequence_ids: Sequence[int]
) -> dict[str, Any]:
    """Return an event's record as it may be written."""
    if record["type"] == "Arrive":
        return pseudonyms.arrive(dict(record))
    if record["type"] == "Commit":
        return pseudonyms.commit(dict(record), sequence_ids)
    return dict(record)
