"""A sum over the lanes becomes what each lane contributes to it.

    grad_w = sum(grad_h * (x - v))   ->   grad_w = grad_h * (x - v)        (the lanes are summed outside the kernel)

The gradient of a 0-d constant is a sum over all lanes, put there by autograd or written by the user (``(ds * x).sum()`` in a
surrogate with a learnable slope). As long as only linear ops follow it, the sum can be taken last: a lane's contribution
goes through them instead. Raises `Reject` where something else uses the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from snn_compile.errors import Reject

aten = torch.ops.aten

SUMS = {aten.sum.default, aten.sum.dim_IntList}
RESHAPES = {aten.view.default, aten.reshape.default, aten.clone.default, aten.detach.default, aten.expand.default}
LINEAR = {aten.neg.default, aten._to_copy.default}
ADDITIVE = {aten.add.Tensor, aten.sub.Tensor}


def split_sums(gm: fx.GraphModule, shape: Sequence[int]) -> None:
    """Rewrite `gm` in place."""
    if not shape:
        return
    sums = [n for n in gm.graph.nodes if _is_lane_sum(n, shape)]
    if not sums:
        return
    partial = set(sums)
    for node in gm.graph.nodes:
        if node.op == "call_function" and any(a in partial for a in node.all_input_nodes):
            if not _is_linear(node, partial):
                raise Reject("a sum over all lanes is used inside the step", node=node.name)
            partial.add(node)
    lanes = sums[0].args[0].meta["val"]  # type: ignore[union-attr]
    for node in list(gm.graph.nodes):
        if node in partial:
            if node in sums or node.target in RESHAPES:
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
            else:
                node.meta["val"] = lanes.new_empty(lanes.shape, dtype=node.meta["val"].dtype)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _is_lane_sum(node: fx.Node, shape: Sequence[int]) -> bool:
    if node.op != "call_function" or node.target not in SUMS or not isinstance(node.args[0], fx.Node):
        return False
    source, result = node.args[0].meta.get("val"), node.meta.get("val")
    return isinstance(source, torch.Tensor) and tuple(source.shape) == tuple(shape) and result.numel() == 1


def _is_linear(node: fx.Node, partial: set[fx.Node]) -> bool:
    """Whether the node's value is a sum over lanes when those of its operands in `partial` are."""
    if node.meta["val"].numel() != 1:
        return False  # the sum is broadcast back over the lanes
    if node.target in RESHAPES or node.target in LINEAR:
        return True
    operands = list(node.args[:2])
    if node.target is aten.where.self:  # the derivative of a clamp: the sum, or nothing
        taken = [o for o in node.args[1:] if not _is_zero(o)]
        return node.args[0] not in partial and partial.issuperset(taken)
    if node.target in ADDITIVE:
        return all(o in partial for o in operands)
    if node.target is aten.mul.Tensor:
        return sum(o in partial for o in operands) == 1
    return node.target is aten.div.Tensor and operands[0] in partial and operands[1] not in partial


def _is_zero(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.scalar_tensor.default and bool(node.args[0] == 0)
