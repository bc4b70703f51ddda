"""Which target serves which device."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import fx

from snn_compile.errors import Reject
from snn_compile.ir.values import example
from snn_compile.lowering.launch import Target


@functools.cache
def _target(kind: str) -> Target | None:
    if kind == "cpu":
        from snn_compile.lowering.cpp.target import CppTarget

        return CppTarget()
    if kind == "cuda":
        from snn_compile.lowering.triton.target import TritonTarget

        return TritonTarget()
    return None


def for_device(device: torch.device) -> Target:
    """The target of a device that `for_operands` has accepted."""
    target = _target(device.type)
    if target is None:
        raise RuntimeError(f"no kernels for device {device}")
    return target


def for_operands(call: fx.Node, location: str) -> Target:
    """The target for the loop's operands; `Reject` (and one warning a process) where the machine lacks something."""
    device = next(v.device for v in map(example, call.args) if isinstance(v, torch.Tensor))
    target = _target(device.type)
    if target is None:
        raise Reject(f"there are no kernels for device type '{device.type}'", location=location)
    missing = _is_kept() or target.missing()
    if missing is not None:
        _warn_once(missing)
        raise Reject(missing, location=location)
    return target


def _is_kept() -> str | None:
    """Ops are defined where a graph is compiled: code that is loaded and not compiled would look for them in vain.

    The first is what `aot_compile` sets (private; tested on 2.11 to 2.15).
    """
    is_saved = getattr(torch._functorch.config, "strict_autograd_cache", False)
    if is_saved or getattr(torch._dynamo.config, "caching_precompile", False):
        return "the compiled code is kept for other processes (aot_compile, caching_precompile), which lack this one's kernels"
    return None


@functools.cache
def _warn_once(missing: str) -> None:
    warnings.warn(f"snn_compile: {missing}; time loops run through Inductor, unrolled, as without backend='snn'", stacklevel=2)
