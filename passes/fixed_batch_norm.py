"""Batch norm with fixed statistics as one multiply-add: what it takes, and whether eager computes it so.

batch_norm(x, mean, var, w, b, training=False) = x*scale + shift,   scale = w/sqrt(var + eps), shift = b - mean*scale
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from snn_compile.ir.values import example, known_int

_PARAMETERS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node that calls `F.batch_norm`, by name."""
    return {**_DEFAULTS, **dict(zip(_PARAMETERS, node.args, strict=False)), **node.kwargs}


def is_fixed_batch_norm(node: fx.Node, invariant: Collection[fx.Node]) -> bool:
    """A batch norm in evaluation mode whose statistics and weights are among `invariant`, that eager runs as a multiply-add."""
    if node.target is not F.batch_norm:
        return False
    given = arguments(node)
    x = example(given["input"])
    rest = [given[name] for name in ("running_mean", "running_var", "weight", "bias") if given[name] is not None]
    if given["training"] is not False or type(given["eps"]) is not float or not isinstance(x, Tensor) or x.dim() < 2:
        return False
    if any(r not in invariant or not isinstance(example(r), Tensor) for r in rest) or given["running_mean"] is None:
        return False
    if any(example(r).dtype != x.dtype for r in rest):
        return False
    return _is_gapless(x) and eager_multiplies_and_adds(x.device, x.dtype)


def _is_gapless(x: Tensor) -> bool:
    """Contiguous or channels-last: eager's batch norm takes other values through another loop."""
    orders = [tuple(range(x.dim()))] + ([(0, *range(2, x.dim()), 1)] if x.dim() in (4, 5) else [])
    return any(_has_order(x, order) for order in orders)


def _has_order(x: Tensor, order: tuple[int, ...]) -> bool:
    """Dim ``order[-1]`` has stride 1, and so on upwards; nothing is guarded on."""
    expected: int | torch.SymInt = 1
    for dim in reversed(order):
        if known_int(x.shape[dim]) != 1 and not _same(x.stride(dim), expected):
            return False
        expected = expected * x.shape[dim]
    return True


def _same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    known = known_int(a), known_int(b)
    if None not in known:
        return known[0] == known[1]
    return isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and a.node.expr == b.node.expr


@functools.cache
def eager_multiplies_and_adds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether eager's batch norm is ``addcmul(shift, x, scale)`` bit for bit on this device: tried out once a process."""
    if dtype not in (torch.float32, torch.float64) or device.type == "meta":
        return False
    make = torch.Generator().manual_seed(0)
    channels, eps = 1021, 1e-5  # (whole vectors, and a rest)
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        x, mean, weight, bias = (
            torch.randn(n, channels, generator=make, dtype=dtype, device="cpu").to(device).squeeze(0) for n in (64, 1, 1, 1)
        )
        var = mean.abs() + 0.1
        scale, shift = scale_and_shift(_compute, mean, var, weight, bias, eps)
        return torch.equal(F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), torch.addcmul(shift, x, scale))


def scale_and_shift(call: Callable[..., Any], mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> tuple[Any, Any]:
    """``w/sqrt(var + eps), b - mean*scale``. ``call(function, *args, name=…, **kwargs)`` computes an op or adds it to a graph."""
    invstd = call(torch.rsqrt, call(torch.add, var, eps, name="var_eps"), name="scale" if weight is None else "invstd")
    scale = invstd if weight is None else call(torch.mul, invstd, weight, name="scale")
    start = call(torch.zeros_like, mean, name="shift") if bias is None else bias
    return scale, call(torch.addcmul, start, mean, scale, value=-1, name="shift")


def _compute(function: Callable[..., Tensor], *args: object, name: str, **kwargs: object) -> Tensor:
    return function(*args, **kwargs)
