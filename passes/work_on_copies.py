"""What the graph is given and writes into, it works on in a copy, and writes back once.

    for t: self.v.mul_(0.9).add_(x[t]); …      ->      v = keep(self.v); for t: v.mul_(0.9).add_(x[t]); …; self.v.copy_(v)

The copy is of the graph's own making, so its writes become values (`passes/functionalize`), and a state that lies in a buffer is
one like any other. And gradients are right: AOTAutograd may keep the buffer itself for the backward (torch 2.11 to 2.15), or
compute a value from it there once more, when it holds the new state; the result of `keep` is kept.

Does not fire: integers; buffers that want a gradient, or that share memory with another input. Results that lie in the buffer, or
are views of it (``self.v *= 0.9`` makes it one; ``return s, self.state[0]``), are taken from it at the end; a piece of several
(`unbind`), and a view where gradients are switched on and off, cannot be.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

import torch
from torch import Tensor, fx

from snn_compile.ir.values import example, storage_key
from snn_compile.passes.effects import is_grad_switch, is_write, written
from snn_compile.passes.emit import emit, evaluate
from snn_compile.passes.views_of_inputs import taken_anew, views_of_input


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
        sharing[_memory(node)].append(node)
    count = 0
    for given in graph.find_nodes(op="placeholder"):
        names = sharing[storage_key(given)]
        alone = sum(n.op == "placeholder" for n in names) == 1
        if first is not None and alone and _is_buffer(example(given)) and _may_be_copied(given, names, order):
            _copy(graph, given, names, first)
            count += 1
    return count


DETACH = ("detach", torch.detach, torch.Tensor.detach)


def is_copy_of_buffer(node: fx.Node) -> bool:
    return node.target in (KEEP, "clone") and isinstance(given := node.args[0], fx.Node) and given.op == "placeholder"


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


def _memory(node: fx.Node) -> int | None:
    """Where the node's value lies; that of ``self.state.unbind(0)`` is where its pieces do."""
    is_several = isinstance(example(node), (tuple, list))
    return next(map(storage_key, node.users), None) if is_several else storage_key(node)


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
    """Whether something writes into it, the results that lie in it can be taken from it again, and something is gained.

    `names`: all nodes in its memory.
    """
    readers = sorted({u for n in names for u in n.users}, key=order.__getitem__)
    if any(u.op == "output" and not _is_taken_again(n, given) for n in names for u in n.users):
        return False
    reads = [u for u in readers if u.op != "output"]
    first = next((i for i, u in enumerate(reads) if is_write(u) and not set(names).isdisjoint(written(u))), None)
    # without a backward to come, a last write may as well go into the buffer itself
    return first is not None and (torch.is_grad_enabled() or first + 1 < len(reads))


def _is_taken_again(result: fx.Node, given: fx.Node) -> bool:
    """The buffer, or a view of it that can be taken when all is written: ``return s, self.state[0]``."""
    views = [] if result is given else views_of_input(result)
    if views is None or any(v.args[0] is not source for v, source in itertools.pairwise([*views, given])):
        return False
    # (where gradients are switched off, a view has none)
    return all(v.target in DETACH for v in views) or not any(map(is_grad_switch, given.graph.nodes))


def _copy(graph: fx.Graph, given: fx.Node, names: list[fx.Node], first: fx.Node) -> None:
    output = graph.output_node()
    results = {r: views for r in output.all_input_nodes if r in names and (views := views_of_input(r))}
    with graph.inserting_before(first):
        is_kept = torch.is_grad_enabled()
        copy = emit(graph, "call_function" if is_kept else "call_method", KEEP if is_kept else "clone", (given,), {})
    with graph.inserting_before(output):
        back = graph.call_method("copy_", (given, copy))
    back.meta = {"example_value": example(given)}
    for result, views in results.items():
        output.replace_input_with(result, taken_anew(views, output))
    anew = set(itertools.takewhile(lambda n: n is not back, reversed(graph.nodes)))
    given.replace_all_uses_with(copy, delete_user_cb=lambda user: user not in (copy, back) and user not in anew)
    for node in names:
        if node is not given:
            node.meta["example_value"] = example(node.args[0]) if is_write(node) else evaluate(node)
