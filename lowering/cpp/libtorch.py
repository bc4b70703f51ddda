"""What libtorch offers to C: functions on tensors, and the numbers of dtypes.

Inductor's ahead-of-time code and PyTorch's stable ABI for extensions are made of it. It needs no headers of torch, which take
longer to compile than all of ours. (Tested on 2.11, 2.13 and 2.15.)
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from snn_compile.lowering.cpp import compiler


class LibTorch:
    """An `AttributeError` where this version lacks something."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        if library.aoti_torch_device_type_cpu() != 0:
            raise AttributeError("device_type_cpu")

    def address(self, name: str) -> int:
        return ctypes.cast(getattr(self.library, name), ctypes.c_void_p).value or 0

    def table(self, *names: str) -> ctypes.Array[ctypes.c_void_p]:
        """A C struct of pointers to functions."""
        return (ctypes.c_void_p * len(names))(*map(self.address, names))

    def dtype(self, dtype: torch.dtype) -> int:
        function: Any = getattr(self.library, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")
        return int(function())


@functools.cache
def libtorch() -> LibTorch | None:
    """None where it is no file of its own, or an unknown one."""
    try:
        library = compiler.libtorch()
        return LibTorch(library) if library is not None else None
    except (OSError, AttributeError):
        return None
