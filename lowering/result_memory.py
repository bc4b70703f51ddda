"""Memory of large CPU results: kept and used again, backed by huge pages.

A fresh result of a hundred megabytes costs tens of thousands of page faults and the kernel's zeroing, more time than the kernel
that fills it; a training loop asks for the same sizes again and again. As PyTorch's CUDA allocator does, a large block that
nobody refers to any more is given out again. A block is known to be free by its reference count, which every view, saved tensor
and NumPy array on it raises. Blocks that are not asked for again soon go back to the system, so what is held idle is what the
last step held anyway.

On Linux a block is advised to be backed by 2 MiB pages before its first touch; PyTorch does so only under an environment variable
(`THP_MEM_ALLOC_ENABLE`).
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor

HUGE_PAGE = 2 << 20
#: Results smaller than this are left to the system's allocator, which keeps them by itself.
THRESHOLD = 4 * HUGE_PAGE
#: A free block is dropped when this many large results were asked for without using it.
PATIENCE = 8
MADV_HUGEPAGE = 14  # <linux/mman.h>


class _Blocks:
    """Storages given out, with the age of their last use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[tuple[UntypedStorage, int]] = []
        self._clock = 0

    def take(self, size: int) -> UntypedStorage | None:
        """A free block of this size, or None; forgets blocks that have been idle for long."""
        with self._lock:
            self._clock += 1
            self._blocks = [b for b in self._blocks if self._clock - b[1] <= PATIENCE]
            for i, (storage, _) in enumerate(self._blocks):
                if storage.nbytes() == size and _is_free(storage):
                    self._blocks[i] = (storage, self._clock)
                    return storage
        return None

    def add(self, storage: UntypedStorage) -> None:
        with self._lock:
            self._blocks.append((storage, self._clock))

    def clear(self) -> None:
        """Forget all blocks: free ones go back to the system now, the others with their tensors."""
        with self._lock:
            self._blocks = []

    def __len__(self) -> int:
        return len(self._blocks)


blocks = _Blocks()


def _is_free(storage: UntypedStorage) -> bool:
    """Only our own reference is left, here and in other processes (the count is private to PyTorch; tested on 2.13)."""
    return not storage.is_shared() and torch._C._storage_Use_Count(storage._cdata) == 1


@functools.cache
def _can_reuse() -> bool:
    return hasattr(torch._C, "_storage_Use_Count")


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


def settle(tensor: Tensor) -> Tensor:
    """Give a fresh, untouched tensor its memory: a block used before, or new memory in huge pages."""
    if tensor.device.type != "cpu" or isinstance(tensor, FakeTensor):
        return tensor
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if size < THRESHOLD:
        return tensor
    if _can_reuse():
        block = blocks.take(size)
        if block is not None:
            return tensor.set_(block, 0, tensor.size(), tensor.stride())  # type: ignore[call-overload]
        blocks.add(storage)
    _advise(storage.data_ptr(), size)
    return tensor


def allocate(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty, contiguous tensor in settled memory."""
    return settle(torch.empty(tuple(size), dtype=dtype, device=device))


def _advise(address: int, size: int) -> None:
    if (madvise := _madvise()) is not None:
        start, stop = -(-address // HUGE_PAGE) * HUGE_PAGE, (address + size) // HUGE_PAGE * HUGE_PAGE
        madvise(start, stop - start, MADV_HUGEPAGE)  # (a refusal costs speed, not correctness)
