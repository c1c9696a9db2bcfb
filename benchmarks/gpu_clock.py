"""Times on a device: CUDA events, or a clock where kernels are interpreted (nothing to learn)."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

SLEEP_CYCLES = 1_000_000  # about half a millisecond, in which the host asks for what is timed


class Clock:
    """`device` as in CompileOptions ("cuda" or "interpreter"); repeats: of each measurement."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.cuda = device != "interpreter"
        self.torch_device = device if self.cuda else "cpu"
        self.jobs = os.cpu_count() or 1

    def median_us(self, run: Callable[[], object]) -> float:
        """Return the median microseconds of `run`, after three runs that do not count."""
        if not self.cuda:
            begin = time.perf_counter()
            run()
            return (time.perf_counter() - begin) * 1e6
        import torch

        times = []
        for _ in range(self.repeats + 3):
            begin_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP_CYCLES)  # else the host's way to the card is timed too
            begin_event.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin_event.elapsed_time(end) * 1e3)
        return statistics.median(times[3:])

    @cached_property
    def _bytes_per_us(self) -> float:
        import torch

        data = torch.rand(1 << (30 if self.cuda else 16), device=self.torch_device)
        found = 4 * data.numel() / self.median_us(partial(torch.sum, data))
        del data
        if self.cuda:
            torch.cuda.empty_cache()  # a model's plan counts what the card has free
        return found

    def bytes_per_us(self) -> float:
        """Return the read bandwidth: a sum over 4 GiB of random float32, once in a run."""
        return self._bytes_per_us

    @cached_property
    def flops_per_us(self) -> float:
        """Return the rate of a large bf16 matrix product of the library."""
        import torch

        size = 8192 if self.cuda else 32
        a, b = (torch.randn(size, size, device=self.torch_device).bfloat16() for _ in range(2))
        return 2.0 * size**3 / self.median_us(lambda: discard(torch.mm(a, b)))

    @cached_property
    def fp8_flops_per_us(self) -> float | None:
        """Return the rate of a large e4m3 product of the library; None if there is none here."""
        import torch

        if not self.cuda or torch.cuda.get_device_capability(self.torch_device) < (8, 9):
            return None
        size = 8192
        values = torch.randn(size, size, device=self.torch_device).to(torch.float8_e4m3fn)
        one = torch.ones((), device=self.torch_device)
        product: Any = torch._scaled_mm
        us = self.median_us(
            lambda: discard(
                product(values, values.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
            )
        )
        return 2.0 * size**3 / us


def discard(value: Any) -> None:
    """Drop a result: reading its value would wait for the GPU."""
