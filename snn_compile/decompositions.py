"""Plain loops for opaque neuron ops.

A library may hide a neuron in a registered custom op, where no compiler can see its loop. `register_decomposition` says what
the op computes, as the loop a person would write; `backend="snn"` then finds that loop like any other, fuses it with its
neighbours and generates its kernel for every target:

    @register_decomposition("my_ops::leaky")
    def leaky(x, v, tau):
        spikes = []
        for t in range(x.shape[0]):
            v = v + (x[t] - v) / tau
            spikes.append(spike(v - 1.0))
        return torch.stack(spikes), v

Loops for the ops of SpikingJelly 2.0 come with this package (`snn_compile/compat/spikingjelly.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["decomposition_of", "register_decomposition"]

Decomposition = Callable[..., Any]

#: PyTorch's own cells, which Dynamo leaves whole.
CELLS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")

#: Modules that register the loops of a namespace, or of one op, when it is met; the library itself is never imported.
SHIPPED = dict.fromkeys(
    ("sj_if", "sj_lif", "sj_plif", "sj_ilif", "sj_qif", "sj_eif", "sj_izhikevich"), "snn_compile.compat.spikingjelly"
) | dict.fromkeys((f"aten::{cell}" for cell in CELLS), "snn_compile.compat.torch_cells")

_registered: dict[str, Decomposition] = {}


def register_decomposition(
    op: str | torch._ops.OpOverload | torch._ops.OpOverloadPacket, fn: Decomposition | None = None
) -> Callable[..., Any]:
    """Say what a custom op computes: ``op(*args) = fn(*args)``; also a decorator.

    Args:
        op: the op, or its name ``"namespace::name"`` (the default overload) or ``"namespace::name.overload"``.
        fn: a function with the op's signature, in plain PyTorch with a loop over time, that returns as many tensors as the
            op. Its results must equal the op's, its gradients the gradients registered for the op. `NotImplemented` leaves
            a call as it is.

    The loop replaces the op where the loop becomes a kernel; elsewhere the op is called as before. A later registration
    takes the place of an earlier one.

    Raises: TypeError where `op` is no op and no qualified name.
    """

    def register(function: Decomposition) -> Decomposition:
        _registered[_qualified_name(op)] = function
        return function

    return register if fn is None else register(fn)


def decomposition_of(op: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> Decomposition | None:
    """The loop registered for this op, or None."""
    name = _qualified_name(op)
    module = SHIPPED.get(name) or SHIPPED.get(name.split("::")[0])
    if name not in _registered and module is not None:
        importlib.import_module(module)
    return _registered.get(name)


def _qualified_name(op: object) -> str:
    if isinstance(op, torch._ops.OpOverload):
        return op.name().removesuffix(".default")
    if isinstance(op, torch._ops.OpOverloadPacket):
        return op._qualified_op_name
    if isinstance(op, str) and "::" in op:
        return op.removesuffix(".default")
    raise TypeError(f"op must be a torch.ops overload or a name like 'namespace::name', but is {op!r}")
