"""Independent recurrences over one time series become one (horizontal loop fusion).

    s, v = lif(v0, x, tau)                     for t: s[t], v = lif(v, x[t], tau)
    y    = trace(r0, x)          ->            for t: y[t], r = trace(r, x[t])
                                               as one loop:  s, y, v = both(v0, r0, x, tau)

The series, for most recurrences half of all that they move, then comes from memory once; in backward, too, where the
gradients that the members have for it are added in registers. It is done on traced steps, so that a recurrence that cannot be
a kernel spoils no other: the members' graphs stand side by side in the new one, each with the arithmetic it had.

What asks for no gradient alone asks for none here: its states and results stay out of the backward step. `x.detach()` is the
same series as x, read without a gradient.

Does not fire: no common series of the full shape; other numbers of steps; another shape or memory layout; one depends on the
other, through whatever ops; a write or a switch of gradients between them; where only one is differentiated and backward would
have to keep tensors for the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import fx

from snn_compile.ir.recurrence import Recurrence
from snn_compile.ir.values import example, hint, shape_hint, size_key
from snn_compile.passes.effects import is_grad_switch, is_write, memory_touched, memory_written
from snn_compile.passes.fuse_consumers import may_write
from snn_compile.passes.merge_recurrences import Fusion, Traced, operand_key, value_key
from snn_compile.passes.views import VIEWS

#: Moving one past other ops changes nothing.
EFFECT_FREE = VIEWS | {torch.full, torch.tensor}

#: States of a recurrence up to which fusing was measured to gain, where it is differentiated and where it is not: each is
#: a row of a block that stays in the innermost cache, beside the series' own.
MOST_STATES = {True: 8, False: 2}


def fuse_recurrences(gm: fx.GraphModule, traced: Sequence[Traced]) -> list[Traced]:
    """Rewrite `gm`; gives what is left of `traced`, which is in the graph's order."""
    reached = gradients_reach(gm.graph)
    calls = [t.call for t in traced]
    kept: list[Traced] = []
    for second in traced:
        partners = [f for f in kept if _gains(f, second)]
        for first in partners:
            pair = _differentiated_alike(first, second, reached)
            if pair is not None and _gather(first.call, second.call, calls):
                first.recurrence = _replace_calls(gm, *pair)
                break
        else:
            kept.append(second)
    return kept


# ---------------------------------------------------------------------------------------------------------- what gains


def _gains(a: Traced, b: Traced) -> bool:
    """Both read a series of the full shape, in the same direction, over the same steps and lanes, laid out alike."""
    lanes = _lanes(a)
    if size_key(a.steps) != size_key(b.steps) or lanes != _lanes(b) or _strides(a, lanes) != _strides(b, lanes):
        return False
    states = len(a.recurrence.carries) + len(b.recurrence.carries)
    if states > MOST_STATES[any(t.recurrence.backward is not None for t in (a, b))]:
        return False
    series = [{key for key, value in _series(t).items() if shape_hint(value)[1:] == lanes} for t in (a, b)]
    return not series[0].isdisjoint(series[1])


def _series(traced: Traced) -> dict[object, torch.Tensor]:
    r = traced.recurrence
    operands = r.split(traced.call.args)[1]
    return {operand_key(x, operand): example(operand) for x, operand in zip(r.xs, operands, strict=True)}


def _lanes(traced: Traced) -> tuple[int, ...]:
    return traced.recurrence.shape_hint([example(a) for a in traced.call.args])


def _strides(traced: Traced, lanes: tuple[int, ...]) -> list[int] | None:
    """The layout that results take over: that of the first operand of the whole shape (`lowering/launch`)."""
    inits, xs, consts = traced.recurrence.split(traced.call.args)
    steps = [example(x)[0] for x in xs]
    values = (*steps, *map(example, (*inits, *consts)))
    return next(([hint(s) for s in v.stride()] for v in values if shape_hint(v) == lanes), None)


# ---------------------------------------------------------------------------------------------------------- gradients


def gradients_reach(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that a gradient may come to: of the graph's outputs, or through a write."""
    reached: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if not node.users or is_write(node) or node in reached:
            reached.update(n for n in node.all_input_nodes if _may_pass(example(n)))
    return reached


def _may_pass(value: object) -> bool:
    return value.requires_grad if isinstance(value, torch.Tensor) else True


def _differentiated_alike(a: Traced, b: Traced, reached: set[fx.Node]) -> list[Traced] | None:
    """Both, the one that no gradient comes to without its backward; None where the other's would keep tensors for it."""
    if all(t.recurrence.backward is None for t in (a, b)):
        return [a, b]
    alone = [t for t in (a, b) if t.recurrence.backward is None or t.call not in reached]
    if len(alone) != 1:
        return [a, b]
    (other,) = alone
    kept = {value_key(o) for t in (a, b) if t is not other for o in t.call.args}
    brought = [example(o) for o in other.call.args if value_key(o) not in kept]
    lanes = torch.Size(_lanes(other)).numel()
    if any(v.dim() > 0 and torch.Size(shape_hint(v)).numel() >= lanes for v in brought):
        return None
    return [replace(t, recurrence=_without_gradients(t.recurrence)) if t is other else t for t in (a, b)]


def _without_gradients(r: Recurrence) -> Recurrence:
    """The forward alone."""
    return replace(
        r,
        carries=tuple(replace(c, differentiable=False, init_needs_grad=False) for c in r.carries),
        xs=tuple(replace(x, needs_grad=False) for x in r.xs),
        consts=tuple(replace(c, needs_grad=False) for c in r.consts),
        ys=tuple(replace(y, differentiable=False) for y in r.ys),
        backward=None,
    )


# ---------------------------------------------------------------------------------------------------------- one place


def _gather(first: fx.Node, second: fx.Node, calls: list[fx.Node]) -> bool:
    """Move ops so that `second` can run where `first` is; False, and nothing moved, where that could change a value.

    What lies between them either depends on `first` or may come before it. One of the two parts must be free of effects,
    as are views and other recurrences, so that all effects (random draws, say) keep their order.
    """
    between = []
    node = first.next
    while node is not second:
        between.append(node)
        node = node.next
    dependent = _dependent_on(first, between)
    if not dependent.isdisjoint(second.all_input_nodes):
        return False
    if any(is_grad_switch(n) or (n not in calls and (may_write(n, first) or may_write(n, second))) for n in between):
        return False
    earlier = [n for n in between if n not in dependent]
    if not (_effect_free(earlier, calls) or _effect_free(dependent, calls)):
        return False
    changed = {key for n in dependent for key in memory_written(n)}
    if any(not changed.isdisjoint(memory_touched(n)) for n in earlier):
        return False
    for n in earlier:
        first.prepend(n)
    return True


def _dependent_on(first: fx.Node, between: Sequence[fx.Node]) -> set[fx.Node]:
    dependent = {first}
    for node in between:
        if not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    return dependent - {first}


def _effect_free(nodes: Iterable[fx.Node], calls: list[fx.Node]) -> bool:
    return all(n.op == "get_attr" or n in calls or n.target in EFFECT_FREE for n in nodes)


def _replace_calls(gm: fx.GraphModule, first: Traced, second: Traced) -> Recurrence:
    """The first call takes the operands and the results of both."""
    fusion = Fusion([first, second])
    a, b = first.recurrence, second.recurrence
    n, m = len(a.ys), len(b.ys)
    for user in list(first.call.users):
        index: int = user.args[1]  # type: ignore[assignment]
        user.update_arg(1, index if index < n else index + m)
    for user in reversed(list(second.call.users)):
        index = user.args[1]  # type: ignore[assignment]
        user.args = (first.call, n + index if index < m else n + len(a.finals) + index)
        first.call.append(user)
    first.call.args = tuple(fusion.operands)
    gm.graph.erase_node(second.call)
    delattr(gm, str(second.call.target))
    return fusion.recurrence()
