"""A region lies in huge pages where that was asked for, and only there."""

import numpy as np
import pytest

from aios_compile.codegen.aligned_map import HUGE_PAGE
from aios_compile.runtime import huge_pages
from aios_compile.runtime.memory import Region


@pytest.mark.skipif(not huge_pages.allowed(), reason="the system gives no huge pages")
def test_huge_pages_lie_where_they_were_asked_for() -> None:
    size, short = 6 * HUGE_PAGE, HUGE_PAGE // 4
    for huge, asked in ((True, (0, size)), (False, (size, size)), (False, (short, size - 1))):
        region = Region(size, huge=huge)
        region.ask_for_huge_pages(*asked)
        array = region.array()
        array[::HUGE_PAGE] = 1
        first = -(-region.address // HUGE_PAGE) * HUGE_PAGE
        last = (region.address + size) // HUGE_PAGE * HUGE_PAGE
        found = huge_pages.find(first, last)
        if found is None:
            pytest.skip("this kernel does not say where huge pages are")
        begin, end = (region.address + at for at in asked)
        want = [x for x in range(first, last, HUGE_PAGE) if begin <= x and x + HUGE_PAGE <= end]
        assert [x for a, b in found for x in range(a, b, HUGE_PAGE)] == want
        assert bool(want) == (asked[0] < size)
        assert np.count_nonzero(array) == 6
        region.close()
