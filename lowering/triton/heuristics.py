"""How many lanes, warps and steps a kernel takes at once. Deterministic; never measured at run time.

A kernel streams tensors once, so what matters is wide accesses and enough of them in flight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: 32-bit registers a thread may spend on the values that a segment keeps for all its steps.
_SEGMENT_REGISTERS = 64
_SEGMENT_LENGTHS = (16, 8, 4, 2)

#: Below this many lanes small programs spread over more of the device.
_FEW_LANES = 1 << 17


def lanes_per_thread(dtypes: Sequence[torch.dtype], *, segmented: bool) -> int:
    """Accesses of the widest dtype become 128 bits wide; the registers of a segment allow no more than four lanes."""
    widest = max((d.itemsize for d in dtypes), default=4)
    return min(16 // widest, 4 if segmented else 8)


def segment_length(kept: Sequence[torch.dtype], lanes: int) -> int:
    """Steps of a segment, from what it keeps in registers for every lane and step."""
    registers = lanes * sum(max(1, d.itemsize // 4) for d in kept)
    return next((k for k in _SEGMENT_LENGTHS if k * registers <= _SEGMENT_REGISTERS), _SEGMENT_LENGTHS[-1])


def warps(n: int) -> int:
    """Two sizes of program, whatever N: a new N compiles at most one more kernel."""
    return 4 if n >= _FEW_LANES else 1
