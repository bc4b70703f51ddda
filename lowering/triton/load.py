"""Kernel text -> module. Triton reads a kernel's source from its file, so the text must lie in one."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType


def load_module(source: str) -> ModuleType:
    """Through Inductor's cache of Python modules; without one that can be written to, through a temporary folder."""
    try:
        from torch._inductor.codecache import PyCodeCache

        return PyCodeCache.load(source)
    except (ImportError, AttributeError, OSError):
        return _load_from_temporary_file(source)


def _load_from_temporary_file(source: str) -> ModuleType:
    name = f"snn_compile_kernel_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    path = Path(tempfile.mkdtemp(prefix="snn_compile_")) / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
