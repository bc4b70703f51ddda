"""Module floats that ``dynamic=True`` made symbolic become numbers again.

    tau = l_self_tau.item(); h = v + x/tau   ->   h = v + x/2.0        (with a guard: tau is 2.0)

A time constant or a threshold is a constant of the model. The guard makes Dynamo trace again when it changes.
"""

from __future__ import annotations

import torch
from torch import fx

from snn_compile.ir.values import example


def specialize_floats(gm: fx.GraphModule) -> None:
    """Replace every SymFloat value of `gm` by its number."""
    for node in list(gm.graph.nodes):
        value = example(node)
        if not isinstance(value, torch.SymFloat) or node.op == "placeholder":
            continue
        number = value.node.guard_float("", 0)
        for user in list(node.users):
            user.args = fx.node.map_arg(user.args, lambda n, node=node, number=number: number if n is node else n)
            user.kwargs = fx.node.map_arg(user.kwargs, lambda n, node=node, number=number: number if n is node else n)
        if not node.users:
            gm.graph.erase_node(node)
