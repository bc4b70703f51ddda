"""What a kernel keeps for its backward is not written into after it.

    s = kernel(x, threshold)                       s = kernel(x, keep(threshold))
    threshold.clamp_(max=1)              ->        threshold.clamp_(max=1)

Eager keeps what each op needs, and ``v - threshold`` needs nothing; a kernel keeps its operands, of which its backward makes the
steps' values again. Autograd refuses values that were written into since: such operands are copied (`passes/work_on_copies`).

Does not fire: without gradients; where no write comes after the kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from snn_compile.ir.values import storage_key
from snn_compile.passes.effects import written
from snn_compile.passes.emit import emit
from snn_compile.passes.work_on_copies import KEEP


def separate_saved(graph: fx.Graph, saved_operands: Callable[[fx.Node], list[fx.Node]]) -> int:
    """Rewrite `graph` in place; gives how many operands were copied. `saved_operands`: what autograd keeps of a node's."""
    if not torch.is_grad_enabled():
        return 0
    later: set[int | None] = set()  # the memory that is written into after a node
    copied = 0
    for node in reversed(list(graph.nodes)):
        for operand in dict.fromkeys(saved_operands(node)):
            if storage_key(operand) is not None and storage_key(operand) in later:
                with graph.inserting_before(node):
                    node.replace_input_with(operand, emit(graph, "call_function", KEEP, (operand,), {}))
                copied += 1
        later.update(storage_key(n) for n in written(node))
    return copied
