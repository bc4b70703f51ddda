"""How many lanes, warps and steps a kernel takes at once. Deterministic; never measured at run time.

A kernel streams tensors once, so what matters is wide accesses and enough of them in flight: wide programs with few
registers in the forward pass; in the backward pass, segments whose loads are issued together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: 32-bit registers a thread may spend on the values that a segment holds for all its steps. It spends about as many
#: again on what the two passes over a segment share: with 80, a LIF neuron takes 114 on sm_90, so 512 threads fit.
_SEGMENT_REGISTERS = 80
#: A segment costs one store and one load of every state, so shorter ones are not worth having.
_SEGMENT_LENGTHS = (16, 8, 4)

#: Below this many lanes small programs spread over more of the device.
_FEW_LANES = 1 << 17


def lanes_and_steps(accessed: Sequence[torch.dtype], kept: Sequence[torch.dtype]) -> tuple[int, int]:
    """Lanes of a thread, such that accesses of the widest dtype are 128 bits wide, and steps of a segment.

    No access is wider than a thread's lanes, so a lane belongs to one thread throughout: what it leaves in scratch
    memory it reads itself. Where a segment keeps too much in registers, the thread takes fewer lanes.
    """
    lanes = min(16 // max((d.itemsize for d in accessed), default=4), 4 if kept else 8)
    words = sum(max(1, d.itemsize // 4) for d in kept)
    while True:
        fitting = [k for k in _SEGMENT_LENGTHS if k * words * lanes <= _SEGMENT_REGISTERS]
        if fitting:
            return lanes, fitting[0]
        if lanes == 1:
            return lanes, _SEGMENT_LENGTHS[-1]
        lanes //= 2


def warps(n: int) -> int:
    """Two sizes of program, whatever N: a new N compiles at most one more kernel."""
    return 4 if n >= _FEW_LANES else 1


# ----------------------------------------------------------------------------------------------------- channel by channel

#: ``(lanes of a thread, warps)`` that hold channels in registers: few lanes, so that sums have many threads, then more.
_CHANNEL_LANES = ((4, 16), (8, 32))
#: Tiles of channels that do not fit, by channels of a program: one, or several, whose tensors lie in memory in several ways.
_TILE_LANES = ((8, 16), (4, 16))


@dataclass(frozen=True)
class Tile:
    """How a program that owns channels is compiled; `fits`: one tile holds all of its values."""

    block: int
    warps: int
    fits: bool

    @property
    def registers(self) -> int:
        """Of a thread, so that a program runs on a processor of 64 Ki registers."""
        return min(255, (1 << 16) // (32 * self.warps))


def channel_tile(count: int, channels: int, warp_size: int = 32) -> Tile:
    """`count`: values of a channel; `channels`: of a program."""
    elements = count * channels
    for lanes, most_warps in _CHANNEL_LANES:
        if elements <= lanes * most_warps * 32:
            block = max(1 << (elements - 1).bit_length(), lanes * warp_size)
            return Tile(max(block // channels, 1), block // (lanes * warp_size), True)
    lanes, warps = _TILE_LANES[channels > 1]
    return Tile(lanes * warps * 32 // channels, warps * 32 // warp_size, False)


def fills_device(count: int, programs: int, processors: int, channels: int = 1) -> bool:
    """Whether channels as programs are worth it: where one fits into registers, launches cost more than idle processors."""
    return channel_tile(count, channels).fits or 2 * programs >= processors
