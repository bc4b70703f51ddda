"""What each op of a loop body is: pointwise or not, pure or not.

An op is *pointwise* where its result has the broadcast shape of its operands and everything it dispatches to is a pointwise
ATen op. That is found by running the op alone on fake tensors and recording what it dispatches to, so no list of
torch-level functions is needed and a user's `autograd.Function` is what its forward is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from snn_compile.ir.loop import Loop
from snn_compile.ir.values import example, flat_nodes, hint, is_getitem, shape_hint, storage_key
from snn_compile.passes.autocast_regions import regions, under
from snn_compile.passes.effects import written
from snn_compile.passes.fixed_batch_norm import is_fixed_batch_norm
from snn_compile.passes.trace_step import IDENTITIES

#: Whether a target can hold this ATen overload in a pointwise kernel.
IsPointwiseOp = Callable[[torch._ops.OpOverload], bool]

AUTOGRAD_FUNCTION = torch.ops.higher_order.autograd_function_apply


@dataclass
class OpInfo:
    pointwise: bool = False
    #: may be run once for all iterations, or in another order than the program's
    pure: bool = True
    #: placeholders or nodes of the body that it writes into
    writes: list[fx.Node] = field(default_factory=list)


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[torch._ops.OpOverload] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "aten":  # (prim.device and the like ask, they do not compute)
            self.ops.append(func)
        return func(*args, **(kwargs or {}))


def classify(loop: Loop, is_pointwise_op: IsPointwiseOp) -> dict[fx.Node, OpInfo]:
    """`OpInfo` of every op node of the loop's body."""
    fakes = _Fakes()
    infos: dict[fx.Node, OpInfo] = {}
    for node in loop.body.graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        infos[node] = _classify(loop, node, fakes, infos, is_pointwise_op)
    return infos


def _classify(loop: Loop, node: fx.Node, fakes: _Fakes, infos: dict[fx.Node, OpInfo], is_pointwise_op: IsPointwiseOp) -> OpInfo:
    if is_getitem(node) and node.args[0] in infos and node.args[0].target is AUTOGRAD_FUNCTION:  # type: ignore[index, union-attr]
        return OpInfo(infos[node.args[0]].pointwise)  # type: ignore[index]
    writes = written(node)
    if writes:
        return OpInfo(pure=False, writes=writes)
    if is_fixed_batch_norm(node, loop.placeholders()[len(loop.carries) + len(loop.xs) :]):
        return OpInfo(pointwise=True)  # it can be: `passes/fold_batch_norm`
    if node.op == "call_module" or (
        isinstance(node.target, torch._ops.HigherOrderOperator) and node.target is not AUTOGRAD_FUNCTION
    ):
        return OpInfo(pure=False)
    ops = _dispatched(loop, node, fakes)
    if ops is None:
        return OpInfo(pure=False)
    pure = not any(torch.Tag.nondeterministic_seeded in o.tags or o._schema.is_mutable for o in ops)
    pointwise = pure and _keeps_shape(node) and all(o in IDENTITIES or is_pointwise_op(o) for o in ops)
    return OpInfo(pointwise, pure)


def _dispatched(loop: Loop, node: fx.Node, fakes: _Fakes) -> list[torch._ops.OpOverload] | None:
    """The ATen ops a node dispatches to; None where it cannot be run on fake tensors."""
    record = _Record()
    try:
        with fakes.mode, torch.no_grad(), under(regions(node)):
            args = fx.node.map_arg(node.args, fakes.of)
            kwargs = fx.node.map_arg(node.kwargs, fakes.of)
            with record:
                if node.target is AUTOGRAD_FUNCTION:
                    getattr(loop.body, node.args[0].target)(*args[2:])  # type: ignore[union-attr]
                elif node.op == "call_method":
                    getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # an op that cannot run alone is simply not understood: it stays as it is
        return None
    return record.ops


class _Fakes:
    """Fake stand-ins with concrete sizes for the values of a body, made from the examples Dynamo recorded."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self._made: dict[fx.Node, object] = {}

    def of(self, node: fx.Node) -> object:
        if node not in self._made:
            self._made[node] = None if node.op == "get_attr" else self._make(example(node))
        return self._made[node]

    def _make(self, value: object) -> object:
        if isinstance(value, torch.Tensor):
            return torch.empty(shape_hint(value), dtype=value.dtype, device=value.device)
        if isinstance(value, (tuple, list)):
            return type(value)(self._make(v) for v in value)
        if isinstance(value, torch.SymInt):
            return hint(value)
        return value


def _keeps_shape(node: fx.Node) -> bool:
    """The result has the broadcast shape of the tensor operands, and no other kind of operand decides its value."""
    operands = [example(n) for n in flat_nodes((node.args, node.kwargs)) if n.op != "get_attr"]
    if any(not isinstance(o, torch.Tensor) for o in operands):
        return False
    value = example(node)
    results = [value]
    if isinstance(value, (tuple, list)):  # (torch 2.11 gives what a function computes on the way, too: nobody reads it)
        read = {u.args[1] for u in node.users} if all(is_getitem(u) for u in node.users) else range(len(value))
        results = [value[i] for i in read]  # type: ignore[index]
    if not operands or not all(isinstance(r, torch.Tensor) for r in results):
        return False
    try:
        broadcast = torch.broadcast_shapes(*(shape_hint(o) for o in operands))  # type: ignore[arg-type]
    except RuntimeError:
        return False
    return all(shape_hint(r) == tuple(broadcast) for r in results)


def aliases(nodes: list[fx.Node]) -> dict[int, list[fx.Node]]:
    """Nodes by shared storage."""
    groups: dict[int, list[fx.Node]] = {}
    for node in nodes:
        key = storage_key(node)
        if key is not None:
            groups.setdefault(key, []).append(node)
    return groups
