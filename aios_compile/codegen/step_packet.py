"""The inputs of one step as one run of 32-bit words: what the host sends, and a kernel unfolds.

    [header: tokens, sequences, rows, begin of each section, in words] [section] [section] ...

Only what the host alone knows is sent: a token's position, slot and page are worked out on the
device from its sequence, and so is all that pads a bucket. Page tables are sent ragged, as long as
the sequences are. The order of the sections is fixed; their begins depend on the batch. Torch-free.

A token id that the host does not know yet, because the step before has not ended, is sent as
-1 - row: what that row of the step before has sampled.
"""

from __future__ import annotations

from collections.abc import Iterable

HEADER = 64  # words: three counts, then the begin of each section
COUNTS = 3

# What is made from the sections below, for each token.
TOKEN_INPUTS = ("token_ids", "positions", "sequence_lengths", "slots")
SEQUENCE_INPUTS = ("query_starts", "context_lengths", "page_tables")
ROW_INPUTS = {
    "logit_rows": 0, "temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "seeds": 0,
    "sample_positions": 0, "repetition_penalty": 1, "presence_penalty": 0,
    "frequency_penalty": 0, "logprob_counts": 0, "given_ids": 0, "has_given": 0,
}  # fmt: skip
"""An input of each logit row and the neutral value of a padded one."""
LISTS = {
    "penalty": ("penalty_starts", "penalty_ids", "penalty_counts"),
    "bias": ("bias_starts", "bias_ids", "bias_values"),
    "allowed": ("allowed_starts", "allowed_ids"),
}
"""Lists of different lengths a row: their starts [R+1], then their columns."""

SECTIONS = (
    "token_ids", "query_starts", "context_lengths", "first_lengths", "table_starts", "pages",
    *ROW_INPUTS, *(name for names in LISTS.values() for name in names),
)  # fmt: skip
assert COUNTS + len(SECTIONS) <= HEADER, "the header holds the begin of each section"
WORDS = {"seeds": 2}  # of an item; 1 of all others


def header_word(section: str) -> int:
    """Return the word of the header that holds a section's begin."""
    return COUNTS + SECTIONS.index(section)


def known_inputs() -> Iterable[str]:
    """Return the names of all inputs of a step that can be made from a packet."""
    yield from (*TOKEN_INPUTS, *SEQUENCE_INPUTS, *ROW_INPUTS)
    for names in LISTS.values():
        yield from names


def most_words(tokens: int, sequences: int, rows: int, pages: int, lists: dict[str, int]) -> int:
    """Return the words of the largest packet; pages: of all sequences, lists: entries of each."""
    size = HEADER + tokens + (sequences + 1) * 4 + pages
    size += sum(WORDS.get(name, 1) for name in ROW_INPUTS) * rows
    for kind, names in LISTS.items():
        size += rows + 1 + (len(names) - 1) * lists[kind]
    return size
