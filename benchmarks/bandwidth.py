"""Print the plain read bandwidth of this machine: the floor that decode is compared with."""

from __future__ import annotations

from aios_compile.study.bandwidth import BandwidthProbe, read_bandwidth

__all__ = ["BandwidthProbe", "read_bandwidth"]

if __name__ == "__main__":
    for threads in (1, 2):
        print(f"{threads} threads: {read_bandwidth(threads) / 1e9:.1f} GB/s")
