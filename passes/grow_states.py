"""A state that starts smaller than it goes on is expanded before the loop.

    v = zeros(()); for t: v = 0.9*v + x[t] + linear(s)      ->      v = zeros(()).expand(4, 20); for t: …

Only where every reader of the state is pointwise: broadcasting then happens either way, here or in the first step. (In a
pointwise recurrence nothing needs to be done: a lane reads the one number through a stride of zero.)
"""

from __future__ import annotations

import torch
from torch import fx

from snn_compile.ir.loop import Loop
from snn_compile.ir.values import example
from snn_compile.passes.classify import OpInfo
from snn_compile.passes.emit import size_before


def grow_states(gm: fx.GraphModule, call: fx.Node, loop: Loop, infos: dict[fx.Node, OpInfo]) -> None:
    """Rewrite the initial values of `call` in place."""
    for i, (carry, placeholder) in enumerate(zip(loop.carries, loop.placeholders(), strict=False)):
        init, wanted = call.args[i], carry.example.shape
        value = example(init)
        if not isinstance(value, torch.Tensor) or value.shape == wanted or not _broadcasts(value.shape, wanted):
            continue
        if all(u in infos and infos[u].pointwise for u in placeholder.users):
            sizes = [size_before(call, size) for size in wanted]
            with gm.graph.inserting_before(call):
                grown = gm.graph.call_method("expand", (init, *sizes))
            grown.meta = {"example_value": value.expand(wanted)}
            call.args = (*call.args[:i], grown, *call.args[i + 1 :])


def _broadcasts(small: torch.Size, large: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(small, large) == large
    except RuntimeError:
        return False
