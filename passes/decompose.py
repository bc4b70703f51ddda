"""An opaque neuron op becomes the loop it stands for (`snn_compile.register_decomposition`).

    s, v, h = sj_lif.forward(x, v, tau, …)  ->  h0 = v + (x[0] - v)/tau; s0 = spike(h0 - 1); v0 = …; s = stack([s0, …])

The registered function is captured by Dynamo on the op's own examples, so that what is inlined has the form of every other
graph, surrogate gradients included. A step taken alone, ``op(x.unsqueeze(0))[0]``, is unwrapped by `passes/unwrap_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from snn_compile.capture import capture
from snn_compile.decompositions import CELLS as CELL_NAMES
from snn_compile.decompositions import Decomposition, decomposition_of
from snn_compile.errors import Reject, Rejection
from snn_compile.ir.values import example, is_getitem, known_layout, user_location
from snn_compile.passes.effects import sweeping
from snn_compile.passes.emit import replace_by_results
from snn_compile.passes.inline import Inliner
from snn_compile.passes.specialize import specialize_sizes

#: PyTorch's cells in a Dynamo graph are functions, not ops.
CELLS = {getattr(torch, name) for name in CELL_NAMES}


@dataclass(frozen=True)
class _Captured:
    """The graph of a decomposition for one signature; `inputs`: which tensors of the call its placeholders are."""

    graph: fx.GraphModule
    inputs: tuple[int, ...]
    #: for each result: its place among the graph's outputs, or (negative, minus one) among the tensors of the call
    results: tuple[int, ...]


def decompose(gm: fx.GraphModule) -> tuple[int, list[Rejection]]:
    """Inline the decomposition of every op that has one; gives how many were, and why others were not."""
    count, rejections, captured = 0, [], dict[object, _Captured | None]()
    with sweeping(gm.graph):
        for node in [n for n in gm.graph.nodes if n.op == "call_function"]:
            function = _decomposition(node)
            if function is None:
                continue
            try:
                count += _inline(gm, node, function, captured)
            except Reject as reject:
                rejections.append(reject.rejection)
    if count:
        gm.recompile()
    return count, rejections


def _decomposition(node: fx.Node) -> Decomposition | None:
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return decomposition_of(node.target)
    if node.target in CELLS:
        return decomposition_of(f"aten::{node.target.__name__}")  # type: ignore[union-attr]
    return None


def _inline(gm: fx.GraphModule, node: fx.Node, function: Decomposition, captured: dict[object, _Captured | None]) -> bool:
    leaves = tree_leaves((node.args, node.kwargs))
    nodes = [a for a in leaves if isinstance(a, fx.Node)]
    specialize_sizes(map(example, nodes))
    if any(known_layout(v) is None for v in map(example, nodes) if isinstance(v, Tensor)):
        hint = "compile without dynamic=True: the first few sizes of a batch are compiled one by one"
        raise Reject(f"{node.target} has sizes that are not known", node=node, location=user_location(node), hint=hint)
    key = (function, tuple(_signature(example(a)) for a in leaves), tuple(node.kwargs))
    if key not in captured:
        captured[key] = _capture(node, function)
    found = captured[key]
    if found is None:
        return False
    with gm.graph.inserting_before(node):
        outputs = Inliner(found.graph, gm, node).inline([nodes[i] for i in found.inputs])
    results = [outputs[r] if r >= 0 else nodes[-1 - r] for r in found.results]
    if isinstance(example(node), Tensor):
        node.replace_all_uses_with(results[0])
    if not all(is_getitem(user) for user in node.users):
        raise Reject(f"the results of {node.target} are used as one tuple", node=node, location=user_location(node))
    replace_by_results(node, results)
    return True


def _signature(value: object) -> object:
    if not isinstance(value, Tensor):
        return (type(value), value)
    return (repr(known_layout(value)), value.dtype, value.device, value.requires_grad)


# ------------------------------------------------------------------------------------------------------------- capturing


def _capture(node: fx.Node, function: Decomposition) -> _Captured | None:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _of_known_size(example(n)))  # type: ignore[return-value]
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    with torch._dynamo.config.patch(specialize_float=True):
        found = capture(_fresh(function), *args, **kwargs)
    if found is None or found.result is NotImplemented:
        return None
    results = [found.result] if isinstance(found.result, Tensor) else found.result
    places = tuple(next(i for i, a in enumerate(tensors) if a is given) for given in found.inputs)
    return _Captured(found.graph, places, tuple(_place(r, found.outputs, tensors) for r in results))


def _of_known_size(value: object) -> object:
    """An example whose sizes are numbers: those that guards have pinned down are symbols still."""
    if not isinstance(value, Tensor) or all(isinstance(s, int) for s in (*value.shape, *value.stride())):
        return value
    layout = known_layout(value)
    assert layout is not None  # (`_inline` has asked)
    with value.fake_mode:  # type: ignore[attr-defined]
        new = torch.empty_strided(*layout, dtype=value.dtype, device=value.device)
    return new.requires_grad_(value.requires_grad)


def _fresh(function: Decomposition) -> Callable[..., Any]:
    """A function Dynamo has never seen: it keeps what it compiled by code object, and gives up after eight signatures."""

    def decomposition(*args: object, **kwargs: object) -> object:
        return function(*args, **kwargs)

    code = decomposition.__code__
    return FunctionType(code.replace(), globals(), code.co_name, None, decomposition.__closure__)


def _place(result: object, outputs: Sequence[object], tensors: Sequence[Tensor]) -> int:
    for i, output in enumerate(outputs):
        if output is result:
            return i
    return -1 - next(i for i, a in enumerate(tensors) if a is result)
