"""Large CPU results are backed by huge pages.

A fresh result of a hundred megabytes costs tens of thousands of page faults, more time than the kernel that fills it. Linux
backs a range by 2 MiB pages where it is told to before the first touch; PyTorch does so only under an environment variable
(`THP_MEM_ALLOC_ENABLE`). Where the advice is not available nothing changes.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

HUGE_PAGE = 2 << 20
#: Results smaller than this are not worth a system call.
THRESHOLD = 4 * HUGE_PAGE
MADV_HUGEPAGE = 14  # <linux/mman.h>


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


def advise(tensor: Tensor) -> Tensor:
    """Ask for huge pages under a fresh CPU tensor; gives the tensor back."""
    if tensor.device.type != "cpu" or isinstance(tensor, FakeTensor):
        return tensor
    size = tensor.untyped_storage().nbytes()
    if size < THRESHOLD or (madvise := _madvise()) is None:
        return tensor
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    stop = (tensor.data_ptr() + size) // HUGE_PAGE * HUGE_PAGE
    madvise(start, stop - start, MADV_HUGEPAGE)  # (a refusal costs speed, not correctness)
    return tensor
