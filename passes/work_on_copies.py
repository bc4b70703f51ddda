"""What the graph is given and writes into, it works on in a copy, and writes back once.

    for t: self.v.mul_(0.9).add_(x[t]); …      ->      v = keep(self.v); for t: v.mul_(0.9).add_(x[t]); …; self.v.copy_(v)

The copy is of the graph's own making, so its writes become values (`passes/functionalize`), and a state that lies in a buffer is
one like any other. And gradients are right: AOTAutograd may keep the buffer itself for the backward (torch 2.11 to 2.15), or
compute a value from it there once more, when it holds the new state; the result of `keep` is kept.

Does not fire: integers; buffers that want a gradient, that share memory with another input, or a view of which is a result, but
for the buffer itself (``self.v *= 0.9`` makes it one) and ``self.v.detach()``.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, fx

from snn_compile.ir.values import example, storage_key
from snn_compile.passes.effects import is_write, written
from snn_compile.passes.emit import emit, evaluate


@torch.library.custom_op("snn_compile_memory::keep", mutates_args=())
def keep(x: Tensor) -> Tensor:
    """A copy; an op of its own, since a backward may not make it again from what lies in `x` by then."""
    return x.clone()


@keep.register_fake
def _(x: Tensor) -> Tensor:
    return x.clone()


keep.register_autograd(lambda ctx, gradient: gradient)
KEEP = torch.ops.snn_compile_memory.keep.default


def work_on_copies(graph: fx.Graph) -> int:
    """Rewrite `graph` (torch-level, with examples) in place; gives how many inputs are copied."""
    _name_once(graph)
    first = next((n for n in graph.nodes if n.op not in ("placeholder", "get_attr")), None)
    order = {n: i for i, n in enumerate(graph.nodes)}
    sharing: dict[int | None, list[fx.Node]] = defaultdict(list)
    for node in order:
        sharing[storage_key(node)].append(node)
    count = 0
    for given in graph.find_nodes(op="placeholder"):
        names = sharing[storage_key(given)]
        alone = sum(n.op == "placeholder" for n in names) == 1
        if first is not None and alone and _is_buffer(example(given)) and _may_be_copied(given, names, order):
            _copy(graph, given, names, first)
            count += 1
    return count


def _name_once(graph: fx.Graph) -> None:
    """What an op in place gives is what it was given; of memory from outside, a carried name would look like a value.

    c_1 = c += 1; c_2 = c_1 += 1; return c_2      ->      c += 1; c += 1; return c
    """
    outside = {storage_key(n) for n in graph.nodes if n.op in ("placeholder", "get_attr")} - {None}
    for node in graph.nodes:
        if is_write(node) and storage_key(node) in outside:
            operands = written(node)
            if len(operands) == 1 and _is_same_tensor(node, operands[0]):
                node.replace_all_uses_with(operands[0])


def _is_same_tensor(node: fx.Node, other: fx.Node) -> bool:
    a, b = example(node), example(other)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or storage_key(node) != storage_key(other):
        return False
    return a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()


def _is_buffer(value: object) -> bool:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        return False
    return not (value.is_leaf and value.requires_grad and torch.is_grad_enabled())


def _may_be_copied(given: fx.Node, names: list[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Whether something writes into it, no result of the graph is a view of it, and something is gained.

    `names`: all nodes in its memory.
    """
    readers = sorted({u for n in names for u in n.users}, key=order.__getitem__)
    if any(u.op == "output" for n in names if n is not given and not _is_detached(n, given) for u in n.users):
        return False
    reads = [u for u in readers if u.op != "output"]
    first = next((i for i, u in enumerate(reads) if is_write(u) and not set(names).isdisjoint(written(u))), None)
    # without a backward to come, a last write may as well go into the buffer itself
    return first is not None and (torch.is_grad_enabled() or first + 1 < len(reads))


def _is_detached(node: fx.Node, given: fx.Node) -> bool:
    """``self.v = self.v.detach()``"""
    return node.target in ("detach", torch.detach, torch.Tensor.detach) and node.args[0] is given


def _copy(graph: fx.Graph, given: fx.Node, names: list[fx.Node], first: fx.Node) -> None:
    output = graph.output_node()
    detached = [n for n in output.all_input_nodes if _is_detached(n, given)]
    with graph.inserting_before(first):
        is_kept = torch.is_grad_enabled()
        copy = emit(graph, "call_function" if is_kept else "call_method", KEEP if is_kept else "clone", (given,), {})
    given.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy and user is not output)
    for node in names:
        if node is not given:
            node.meta["example_value"] = example(node.args[0]) if is_write(node) else evaluate(node)
    with graph.inserting_before(output):
        graph.call_method("copy_", (given, copy)).meta = {"example_value": example(given)}
        for result in detached:
            output.replace_input_with(result, emit(graph, "call_method", "detach", (given,), {}))
