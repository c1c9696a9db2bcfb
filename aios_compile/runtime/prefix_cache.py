"""Which pages hold which tokens: a chain of keyed hashes, and the tokens compared on every hit.

An entry stands for one page and all the pages before it::

    root(tenant) <- entry 1 "ROMEO: what" <- entry 2 " light throu" <- entry 3 "gh yonder" (partial)

A page's digest is blake2b(parent's digest + its tokens) under a secret of this process, so nobody
can make pages that collide. A hit is believed only if the entry names the same tenant, the same
tokens and the very parent entry that was hit before it (by its serial number, which is never used
again), so even a hash that always collides costs hits and never gives a wrong page. Entries of full
pages are shared; any entry may also give its first tokens to a page that is a copy of it.

The chain of hashes is vLLM's automatic prefix caching, the partial reuse SGLang's radix cache.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import NamedTuple

ROOT = 0  # the parent serial of a first page
DIGEST_BYTES = 16
# Entries looked at for a partial hit, newest first: pages of one parent that begin with one token.
MAX_PARTIAL_CANDIDATES = 8


class Entry(NamedTuple):
    """One cached page. Immutable; `tokens` are as many as its first positions hold."""

    page: int
    tokens: tuple[int, ...]
    tenant: str
    parent: int  # serial of the entry before it
    serial: int
    digest: bytes


class Hit(NamedTuple):
    """The longest cached prefix: whole pages, then num_partial tokens of a page to copy."""

    entries: list[Entry]
    source: Entry | None
    num_partial: int


@dataclass
class PrefixCache:
    """The index. Who holds which page is the pool's business; see PagePool."""

    key: bytes
    page_size: int
    entries: dict[bytes, Entry] = field(default_factory=dict)
    by_page: dict[int, Entry] = field(default_factory=dict)
    children: dict[tuple[str, int, int], list[int]] = field(default_factory=dict)  # -> pages
    last_serial: int = ROOT

    def copy(self) -> PrefixCache:
        children = {place: list(pages) for place, pages in self.children.items()}
        return replace(
            self, entries=dict(self.entries), by_page=dict(self.by_page), children=children
        )

    def root_digest(self, tenant: str) -> bytes:
        """Return what a tenant's first pages are chained to."""
        return blake2b(tenant.encode(), key=self.key, digest_size=DIGEST_BYTES).digest()

    def digest(self, parent: bytes, tokens: Sequence[int]) -> bytes:
        """Return the digest of a page: keyed, over its parent's digest and its tokens."""
        data = parent + array("q", tokens).tobytes()
        return blake2b(data, key=self.key, digest_size=DIGEST_BYTES).digest()

    def extend_digests(
        self, digests: list[bytes], tenant: str, tokens: Sequence[int], num_pages: int
    ) -> None:
        """Append to the digests of a sequence's first pages until there are num_pages."""
        size = self.page_size
        parent = digests[-1] if digests else self.root_digest(tenant)
        for i in range(len(digests), num_pages):
            parent = self.digest(parent, tokens[i * size : (i + 1) * size])
            digests.append(parent)

    def find(
        self, digest: bytes, tenant: str, parent: int, tokens: tuple[int, ...]
    ) -> Entry | None:
        """Return the entry of a page if it is the one meant, not just one of the same hash."""
        entry = self.entries.get(digest)
        if entry is None or entry.tokens != tokens:
            return None
        return entry if entry.parent == parent and entry.tenant == tenant else None

    def lookup(
        self, tenant: str, tokens: Sequence[int], digests: Sequence[bytes], limit: int
    ) -> Hit:
        """Return the longest cached prefix of the first `limit` tokens."""
        size, serial = self.page_size, ROOT
        found: list[Entry] = []
        for i in range(limit // size):
            own = tuple(tokens[i * size : (i + 1) * size])
            entry = self.find(digests[i], tenant, serial, own)
            if entry is None:
                break
            found.append(entry)
            serial = entry.serial
        start = len(found) * size
        source, num_partial = self._partial(
            tenant, serial, tokens[start : min(limit, start + size)]
        )
        return Hit(found, source, num_partial)

    def _partial(self, tenant: str, parent: int, tokens: Sequence[int]) -> tuple[Entry | None, int]:
        best, most = None, 0
        if len(tokens):
            pages = self.children.get((tenant, parent, tokens[0]), ())
            for page in pages[: -MAX_PARTIAL_CANDIDATES - 1 : -1]:
                entry = self.by_page[page]
                common = _num_common(entry.tokens, tokens)
                if common > most:
                    best, most = entry, common
        return best, most

    def insert(
        self, page: int, digest: bytes, tenant: str, parent: int, tokens: tuple[int, ...]
    ) -> tuple[int, int | None]:
        """Index a page; return (serial of its entry, the page that lost its entry to it if any).

        Where another page holds the same tokens already, that entry stays and its serial is given.
        """
        assert page not in self.by_page, f"page {page} is indexed twice"
        old = self.entries.get(digest)
        if old is not None:
            if (old.tokens, old.tenant, old.parent) == (tokens, tenant, parent):
                return old.serial, None
            self.drop(old.page)  # its parent is gone, or the hashes collide
        self.last_serial += 1
        entry = Entry(page, tokens, tenant, parent, self.last_serial, digest)
        self.entries[digest] = self.by_page[page] = entry
        self.children.setdefault((tenant, parent, tokens[0]), []).append(page)
        return entry.serial, None if old is None else old.page

    def drop(self, page: int) -> None:
        """Forget a page. Entries after it cannot be hit any more and go when they are oldest."""
        entry = self.by_page.pop(page)
        del self.entries[entry.digest]
        place = (entry.tenant, entry.parent, entry.tokens[0])
        pages = self.children[place]
        pages.remove(page)
        if not pages:
            del self.children[place]

    def check_integrity(self) -> None:
        """Assert that the three tables say the same."""
        assert len(self.entries) == len(self.by_page)
        for page, entry in self.by_page.items():
            assert entry.page == page and self.entries[entry.digest] is entry
            assert 1 <= len(entry.tokens) <= self.page_size
            assert page in self.children[entry.tenant, entry.parent, entry.tokens[0]]
        assert sum(map(len, self.children.values())) == len(self.by_page)


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for a, b in zip(one, other):
        if a != b:
            break
        count += 1
    return count
