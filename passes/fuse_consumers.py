"""A pointwise op on the whole output of a loop moves into the loop (consumer fusion).

    s = loop(x); y = s + skip            ->      y = loop'(x, skip)        where loop' stacks s[t] + skip[t]

The residual sum of a block, a mask, a scale or an affine after a neuron then costs no pass over memory of its own, and its
result has the layout of the neuron's output: a sum of 5-D tensors is left to nobody who might lay it out anew before the next
convolution.

Does not fire: where the loop's output is read by anything else, for ops that are not pointwise or stretch the output, operands
that are neither time series of the same length nor of fewer dims, outputs that are stacked along another dim or backwards, writes
between the loop and the op.
"""

from __future__ import annotations

import torch
from torch import fx

from snn_compile.ir.loop import Loop, LoopConst, LoopInput
from snn_compile.ir.values import base_name, example, is_getitem, shape_key, size_key
from snn_compile.passes.classify import IsPointwiseOp, classify
from snn_compile.passes.effects import is_write, memory_touched, memory_written


def fuse_consumers(gm: fx.GraphModule, call: fx.Node, loop: Loop, is_pointwise_op: IsPointwiseOp) -> int:
    """Rewrite `gm` and `loop` in place; gives how many ops moved in."""
    count = 0
    while any(_fuse(gm, call, loop, output, is_pointwise_op) for output in [u for u in call.users if is_getitem(u)]):
        count += 1
    return count


def _fuse(gm: fx.GraphModule, call: fx.Node, loop: Loop, output: fx.Node, is_pointwise_op: IsPointwiseOp) -> bool:
    """Move the only reader of `output` into the loop, if that is sound."""
    index: int = output.args[1]  # type: ignore[assignment]
    if len(output.users) != 1 or index >= len(loop.ys) or loop.ys[index].dim or loop.ys[index].reverse:
        return False
    (consumer,) = output.users
    others = [n for n in consumer.all_input_nodes if n is not output]
    if consumer.op not in ("call_function", "call_method") or is_write(consumer) or any(o.op == "get_attr" for o in others):
        return False
    if not _is_step_by_step(consumer, output, others, loop.length) or not _may_move(gm.graph, call, consumer, others):
        return False
    if not _move_in(call, loop, output, consumer, others, is_pointwise_op):
        return False
    consumer.prepend(call)
    for user in call.users:
        call.append(user)
    consumer.replace_all_uses_with(output)
    output.meta["example_value"] = example(consumer)
    gm.graph.erase_node(consumer)
    return True


def _is_step_by_step(consumer: fx.Node, output: fx.Node, others: list[fx.Node], length: int | torch.SymInt) -> bool:
    """Step t of the result is the op on step t of its operands, or on operands that have no time dim."""
    value, result = example(output), example(consumer)
    if not isinstance(result, torch.Tensor) or shape_key(result) != shape_key(value) or value.dim() < 2:
        return False
    examples = [example(o) for o in others]
    if any(not isinstance(e, torch.Tensor) or e.device != value.device for e in examples):
        return False
    steps = size_key(length)
    return all((e.dim() == value.dim() and shape_key(e)[0] == steps) or e.dim() < value.dim() for e in examples)


def _may_move(graph: fx.Graph, call: fx.Node, consumer: fx.Node, others: list[fx.Node]) -> bool:
    """All of the loop's readers come after `consumer`, so that the loop can run there; none of its operands is the loop's."""
    if any(is_getitem(o) and o.args[0] is call for o in others):
        return False
    order = {n: i for i, n in enumerate(graph.nodes)}
    readers = [r for output in call.users for r in output.users if r is not consumer]
    between = [n for n in order if order[call] < order[n] < order[consumer]]
    if any(order[r] < order[consumer] for r in readers):
        return False
    changed = memory_written(call)
    return not any(may_write(n, call) or not changed.isdisjoint(memory_touched(n)) for n in between)


def may_write(node: fx.Node, call: fx.Node) -> bool:
    """Whether it might change an operand of the loop."""
    return is_write(node) or not memory_written(node).isdisjoint(memory_touched(call))


def _move_in(
    call: fx.Node, loop: Loop, output: fx.Node, consumer: fx.Node, others: list[fx.Node], is_pointwise_op: IsPointwiseOp
) -> bool:
    """The op on one step's values, in the body; False, and nothing done, where it is not pointwise."""
    body, index, n = loop.body.graph, int(output.args[1]), len(loop.carries)  # type: ignore[arg-type, call-overload]
    operands = {output: loop.results()[1][index]}
    added = []
    for operand in others:
        placeholder = _placeholder_of(call, loop, operand)
        if placeholder is None:
            placeholder = add_operand(call, loop, operand, example(operand).dim() == example(output).dim())
            added.append(operand)
        operands[operand] = placeholder
    with body.inserting_before(body.output_node()):
        node = body.node_copy(consumer, operands.__getitem__)
    node.meta = {**consumer.meta, "example_value": example(consumer)[0]}
    if not classify(loop, is_pointwise_op)[node].pointwise:
        body.erase_node(node)
        for operand in reversed(added):
            _remove(call, loop, operands[operand])
        return False
    results = list(body.output_node().args[0])  # type: ignore[arg-type]
    results[n + index] = node
    body.output_node().args = (tuple(results),)
    loop.ys[index].example = node.meta["example_value"]
    loop.body.recompile()
    return True


def _placeholder_of(call: fx.Node, loop: Loop, operand: fx.Node) -> fx.Node | None:
    """Where the body reads `operand`, if the loop has it already: step by step from the first on, or as a constant."""
    reversed_xs = {i for i, x in enumerate(loop.xs, len(loop.carries)) if x.reverse}
    for i, (given, placeholder) in enumerate(zip(call.args, loop.placeholders(), strict=True)):
        if given is operand and i >= len(loop.carries) and i not in reversed_xs:
            return placeholder
    return None


def add_operand(call: fx.Node, loop: Loop, operand: fx.Node, is_series: bool) -> fx.Node:
    """A new time series, or a new constant, of the loop; gives its placeholder in the body."""
    placeholders, name, value = loop.placeholders(), base_name(operand.name), example(operand)
    place = len(loop.carries) + len(loop.xs) if is_series else len(placeholders)
    with loop.body.graph.inserting_after(placeholders[place - 1]):
        new = loop.body.graph.placeholder(f"{'x' if is_series else 'const'}_{name}")
    new.target = new.name
    new.meta = {"example_value": value[0] if is_series else value}
    if is_series:
        loop.xs.append(LoopInput(name, value[0]))
    else:
        loop.consts.append(LoopConst(name, value))
    call.args = (*call.args[:place], operand, *call.args[place:])
    return new


def _remove(call: fx.Node, loop: Loop, placeholder: fx.Node) -> None:
    place = loop.placeholders().index(placeholder)
    (loop.xs if place < len(loop.carries) + len(loop.xs) else loop.consts).pop()
    loop.body.graph.erase_node(placeholder)
    call.args = (*call.args[:place], *call.args[place + 1 :])
