"""The run-time numbers of a call: how the lanes are cut into blocks, the steps of a segment, how many threads work.

None of them is compiled in: a new T or N runs the same kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from snn_compile.lowering.cpp.writer import KernelSource

#: Scratch memory of one thread in backward: the states before each step of one segment. About an L2 cache.
SCRATCH_BYTES = 1 << 20
#: Lane steps below which a second thread costs more than it brings.
SERIAL_WORK = 1 << 15
#: Bytes of results from which on they are stored past the caches.
STREAM_BYTES = 1 << 22
#: Bytes of a cache line.
LINE = 64
#: Fewest lanes of a block whose backward would rather have short segments than fewer lanes.
FEWEST_LANES = 512


@dataclass(frozen=True)
class Plan:
    threads: int
    block_lanes: int
    block_rows: int
    segment: int
    scratch_bytes: int


def plan(source: KernelSource, sizes: tuple[int, ...], steps: int, threads: int) -> Plan:
    lanes = rows = 1
    for size in sizes[:-1]:
        rows *= size
    if rows * sizes[-1] * steps < SERIAL_WORK:
        threads = 1
    most = _most_lanes(source, steps)
    lanes = _even(sizes[-1], most, threads if rows == 1 else 1)
    block_rows = 1
    if len(sizes) > 1 and sizes[-1] <= most:
        outer = rows // sizes[-2] if sizes[-2] else 1
        wanted = max(1, threads // outer) if outer else 1
        block_rows = max(1, min(most // lanes, _ceil(sizes[-2], wanted)))
    capacity = lanes * block_rows
    segment = steps
    if source.record_bytes:
        segment = max(1, min(steps, SCRATCH_BYTES // (capacity * source.record_bytes)))
    segments = _ceil(steps, segment) if steps else 0
    scratch = capacity * (segment * source.record_bytes + segments * source.checkpoint_bytes)
    return Plan(threads, lanes, block_rows, max(1, segment), _ceil(scratch, 64) * 64)


def is_streamed(results: int, row: int) -> bool:
    """Whether results of so many bytes are stored past the caches, in rows of so many bytes. Where the end of a row and the start
    of the next share a cache line, that line is read again: the more of them, the less is gained (measured: nothing at 784)."""
    return results >= STREAM_BYTES and (row >= 1024 or (row >= 2 * LINE and row % LINE == 0))


def _most_lanes(source: KernelSource, steps: int) -> int:
    """As many as the arrays hold; fewer where the whole trajectory fits the scratch then."""
    most = source.lanes
    if source.record_bytes and steps:
        fitting = SCRATCH_BYTES // (source.record_bytes * steps) // 16 * 16
        most = min(most, max(FEWEST_LANES, fitting))
    return most


def _even(size: int, most: int, threads: int) -> int:
    """Lanes of a block: equal blocks, a whole number of them a thread, multiples of 16."""
    blocks = _ceil(max(1, _ceil(size, most)), threads) * threads
    return min(most, max(16, _ceil(_ceil(size, blocks), 16) * 16))


def _ceil(a: int, b: int) -> int:
    return (a + b - 1) // b
