"""Pages of the KV cache: who holds which, and which are kept for a later hit. Plain data.

A page is free (on the stack), held by one or more sequences (its reference count), cached (nobody
holds it, but the prefix cache may give it out again; the one unused for longest goes first), or
withheld under memory pressure::

    page      0      1      2      3      4       5       6
            trash  seq A  A + B  seq B  free   cached  withheld   A and B are samples of one prompt:
    count     -      1      2      1      0       0       0       2 is shared until one writes it
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from aios_compile.runtime.batch import TRASH_PAGE
from aios_compile.runtime.prefix_cache import PrefixCache


@dataclass
class PagePool:
    """Reference-counted pages 1..num_pages-1; page 0 is the trash page and never given out.

    Entries of TRASH_PAGE in a sequence's pages mean pages that left its window; they are skipped.
    """

    num_pages: int
    cache: PrefixCache | None = None
    free: list[int] = field(default_factory=list)  # a stack: the page freed last is still in cache
    reference_counts: list[int] = field(default_factory=list)
    cached: OrderedDict[int, None] = field(default_factory=OrderedDict)  # least recently used first
    withheld: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.reference_counts:
            self.free = [p for p in range(self.num_pages - 1, -1, -1) if p != TRASH_PAGE]
            self.reference_counts = [0] * self.num_pages

    def copy(self) -> PagePool:
        return PagePool(
            self.num_pages,
            None if self.cache is None else self.cache.copy(),
            list(self.free),
            list(self.reference_counts),
            OrderedDict(self.cached),
            list(self.withheld),
        )

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can give: the free ones, and the cached ones after an eviction."""
        return len(self.free) + len(self.cached)

    def evict(self) -> int:
        """Forget the cached page that was not used for longest; it is free now. Return it."""
        page, _ = self.cached.popitem(last=False)
        assert self.cache is not None
        self.cache.drop(page)
        self.free.append(page)
        return page

    def allocate(self) -> int:
        """Take one free page; the caller has looked at `num_free` and evicted where needed."""
        page = self.free.pop()
        self.reference_counts[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Add one holder to each page, which somebody holds or which is cached."""
        for page in pages:
            if page == TRASH_PAGE:
                continue
            if self.reference_counts[page] == 0:
                assert page in self.cached, f"page {page} is shared but nobody holds it"
                del self.cached[page]
            self.reference_counts[page] += 1

    def touch(self, page: int) -> None:
        """Note that a cached page was used now."""
        if page in self.cached:
            self.cached.move_to_end(page)

    def release(self, pages: Sequence[int]) -> None:
        """Drop one holder of each page; pages without holders are cached or free again.

        From the end: of a cached prefix the last page is evicted first.
        """
        known = self.cache.by_page if self.cache is not None else ()
        for page in reversed(pages):
            if page == TRASH_PAGE:
                continue
            assert self.reference_counts[page] > 0, f"page {page} is released twice"
            self.reference_counts[page] -= 1
            if self.reference_counts[page] == 0:
                if page in known:
                    self.cached[page] = None
                else:
                    self.free.append(page)

    def is_shared(self, page: int) -> bool:
        """Return whether a page must be copied before one of its holders writes it."""
        return self.reference_counts[page] > 1

    def is_indexed(self, page: int) -> bool:
        """Return whether the prefix cache promises what the page holds."""
        return self.cache is not None and page in self.cache.by_page

    def index(
        self, page: int, digest: bytes, tenant: str, parent: int, tokens: tuple[int, ...]
    ) -> int:
        """Let the prefix cache know a held page; return the serial of the entry to chain to."""
        assert self.cache is not None and self.reference_counts[page] > 0
        serial, displaced = self.cache.insert(page, digest, tenant, parent, tokens)
        if displaced is not None and displaced in self.cached:
            del self.cached[displaced]
            self.free.append(displaced)
        return serial

    def check_integrity(self, holders: Iterable[list[int]]) -> None:
        """Assert free + used + cached + withheld = total, and that the counts are the holders'."""
        held: Counter[int] = Counter()
        for pages in holders:
            own = [page for page in pages if page != TRASH_PAGE]
            assert len(set(own)) == len(own), f"a sequence holds a page twice: {pages}"
            held.update(own)
        parts = [set(self.free), set(self.cached), set(self.withheld), set(held)]
        assert len(parts[0]) == len(self.free), "a page is twice on the free stack"
        assert not any(TRASH_PAGE in part for part in parts), "the trash page was given out"
        total = self.num_pages - 1
        assert len(set().union(*parts)) == total, "pages leaked: free + used + cached != total"
        assert sum(map(len, parts)) == total, "a page is both held and free, cached or withheld"
        for page, count in enumerate(self.reference_counts):
            assert count == held[page], f"page {page}: count {count}, holders {held[page]}"
        if self.cache is None:
            assert not self.cached
            return
        self.cache.check_integrity()
        known = set(self.cache.by_page)
        assert parts[1] <= known, "a cached page that cannot be hit"
        assert known <= parts[1] | parts[3], "the prefix cache names a page that is free"
