"""C++ text -> a function, through Inductor's cache of compiled C++ (which is what makes a second process warm).

Everything that is private to torch is used here and nowhere else.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import tempfile
from typing import Any

import torch


class _Compiled:
    """`CppCodeCache` for libraries without torch's headers and without a Python binding: `ctypes` calls them, which
    releases the GIL and spares most of the compile time."""

    @staticmethod
    @functools.cache
    def cache() -> Any:
        from torch._inductor.codecache import CppCodeCache

        class KernelCache(CppCodeCache):
            cache: dict[str, Any] = {}  # noqa: RUF012 - as in the base class
            cpp_compile_command_flags = {"include_pytorch": False, "shared": True}  # noqa: RUF012

        return KernelCache


def load(text: str) -> ctypes.CDLL:
    """Compile (once a machine) and load (once a process)."""
    return _Compiled.cache().load(text, extra_flags=flags())


def libtorch() -> ctypes.CDLL | None:
    """The library of torch's CPU ops, where it is a file of its own."""
    libraries = glob.glob(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.*"))
    return ctypes.CDLL(libraries[0]) if libraries else None


def missing() -> str | None:
    """Why nothing can be compiled here, in words."""
    from torch._inductor import exc

    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "no working C++ compiler was found (set CXX, or install g++ or clang++)"
    except Exception as e:  # a wrapper that does not start, a compiler that crashes
        return f"the C++ compiler does not work: {type(e).__name__}: {e}"
    return _unusable_cache()


def _unusable_cache() -> str | None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    directory = ""
    try:
        directory = cache_dir()
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"\0" * (1 << 18))
            probe.flush()
    except OSError as e:
        return f"the cache directory {directory} cannot be written: {e.strerror} (TORCHINDUCTOR_CACHE_DIR sets another)"
    return None


@functools.cache
def flags() -> tuple[str, ...]:
    """Behind Inductor's own: IEEE arithmetic to the letter (eager's bits), no errno and no traps, vectorised loops."""
    from torch._inductor import cpp_builder

    extra = ["-fno-fast-math", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fwrapv", "-g0"]
    if _is_gcc(cpp_builder):
        # (sinking a function into the branch that uses it would keep the loop around it from being vectorised)
        extra += ["-ftree-loop-vectorize", "-fno-tree-sink", *_sleef_flags()]
    return tuple(extra)


def _is_gcc(cpp_builder: Any) -> bool:
    is_gcc = getattr(cpp_builder, "is_gcc", None)
    return bool(is_gcc and is_gcc())


def _sleef_flags() -> list[str]:
    """Whether the vector functions that gcc will call for this instruction set are in libtorch_cpu."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    lanes = {512: "eN16v", 256: "dN8v"}.get(pick_vec_isa().bit_width() if pick_vec_isa() else 0)
    library = libtorch()
    if lanes is None or library is None:
        return []
    needed = [f"_ZGV{lanes}_Sleef_expf_u10", "_ZGVdN8v_Sleef_expf_u10", "Sleef_expf8_u10"]
    wide = ["-mprefer-vector-width=512"] if lanes == "eN16v" else []
    return ["-DSLEEF", *wide] if all(hasattr(library, symbol) for symbol in needed) else wide
