"""Pages of the KV cache: who holds which. Plain data, no tensors.

A page is free (on the stack), or held by one or more sequences (its reference count)::

    page      0      1      2      3      4      5
            trash  seq A  A + B  seq B  free   free         A and B are samples of one prompt:
    count     -      1      2      1      0      0          page 2 is shared until one writes it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from aios_compile.runtime.batch import TRASH_PAGE


@dataclass
class PagePool:
    """Reference-counted pages 1..num_pages-1; page 0 is the trash page and never given out."""

    num_pages: int
    free: list[int] = field(default_factory=list)  # a stack: the page freed last is still in cache
    reference_counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.reference_counts:
            self.free = [p for p in range(self.num_pages - 1, -1, -1) if p != TRASH_PAGE]
            self.reference_counts = [0] * self.num_pages

    def copy(self) -> PagePool:
        return PagePool(self.num_pages, list(self.free), list(self.reference_counts))

    @property
    def num_free(self) -> int:
        return len(self.free)

    def allocate(self) -> int:
        """Take one free page; the caller has looked at `num_free`."""
        page = self.free.pop()
        self.reference_counts[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Add one holder to each page."""
        for page in pages:
            assert self.reference_counts[page] > 0, f"page {page} is shared but nobody holds it"
            self.reference_counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one holder of each page; pages without holders are free again."""
        for page in pages:
            assert self.reference_counts[page] > 0, f"page {page} is released twice"
            self.reference_counts[page] -= 1
            if self.reference_counts[page] == 0:
                self.free.append(page)

    def is_shared(self, page: int) -> bool:
        return self.reference_counts[page] > 1

    def check_integrity(self, holders: Iterable[list[int]]) -> None:
        """Assert free + used = total and that the counts are exactly the holders' pages."""
        held: Counter[int] = Counter()
        for pages in holders:
            assert len(set(pages)) == len(pages), f"a sequence holds a page twice: {pages}"
            held.update(pages)
        free = set(self.free)
        assert len(free) == len(self.free), "a page is twice on the free stack"
        assert TRASH_PAGE not in free and TRASH_PAGE not in held, "the trash page was given out"
        assert not free & set(held), f"pages both free and held: {free & set(held)}"
        assert len(free) + len(held) == self.num_pages - 1, "pages leaked: free + used != total"
        for page, count in enumerate(self.reference_counts):
            assert count == held[page], f"page {page}: count {count}, holders {held[page]}"
