"""T equal iterations become one `Loop` (loop rerolling).

    h0 = v + (x[0] - v)/2; s0 = h0 >= 1; v0 = h0*(1 - s0)          s, v = loop(v, x)
    h1 = v0 + (x[1] - v0)/2; s1 = h1 >= 1; v1 = h1*(1 - s1)   ->       body(v, x_t): h = v + (x_t - v)/2
    …                                                                        …; return v', s_t
    s = stack([s0, s1, …])

The traced iterations of a Python loop are a tandem repeat of ops. A repeat becomes a loop only when every operand of every
iteration is proven to be one of

- the same value in all iterations (an invariant),
- a value of the same iteration, or of the iteration d before (a carry; d > 1 makes a chain of carries),
- slice t of one tensor, read forwards or backwards (a time series), or a value of its own made before the loop,
- a Python number, the same in all iterations - or, where no loop is found so, another one in each (`passes/number_series`).

Iterations at either end that do not fit are peeled: they stay as they are. A last iteration that lacks its dead tail is
taken in. A step may write into what it has made itself, and into memory from outside of the loop; not into what an earlier step
has made, since what is collected of that is collected behind the loop. Nothing is recognised by name; equality of
`autograd_function_apply` bodies is equality of their content.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor, fx

from snn_compile.errors import Reject, Rejection
from snn_compile.ir.loop import Loop
from snn_compile.ir.values import example, known_int, user_line, user_location
from snn_compile.passes.drop_unread import drop_unread
from snn_compile.passes.effects import is_write
from snn_compile.passes.emit import delete_unused_children
from snn_compile.passes.find_repeats import Repeat, find_repeats
from snn_compile.passes.loop_operands import TimeSlices
from snn_compile.passes.loop_window import Window
from snn_compile.passes.move_own_layers import MOVED
from snn_compile.passes.plan_loop import LoopPlan
from snn_compile.passes.relate_iterations import Graph, Run
from snn_compile.passes.replace_loop import replace_by_loop
from snn_compile.passes.views import VIEWS

Accept = Callable[[Loop], "Rejection | None"]

#: Look-alikes that are no loops are given up after this many, so that rerolling stays cheap beside tracing; fewer where their
#: numbers may change: there, what covers most is a loop, or nothing is.
MAX_REJECTIONS = {False: 64, True: 8}

#: Of a row of reads: the results of one call, or ``y[0], y[1], …``.
ONLY_READS = "its iterations only read values"

#: Where a look-alike begins, its period, and whether its numbers may change from step to step.
Key = tuple[str, int, bool]


def reroll(
    gm: fx.GraphModule, accept: Accept, min_length: int = 2, accept_layers: Accept | None = None
) -> tuple[list[Loop], list[Rejection]]:
    """Replace loops of `gm` by `Loop` submodules; `accept` says why a verified loop should stay unrolled (or None).

    `accept_layers` is asked about what is left: loops over slices of tensors; those of views alone are among them, since the
    layers behind them read slices then.
    """
    loops: list[Loop] = []
    rejections: dict[Key, Rejection] = {}
    while (found := _first_loop(gm, accept, min_length, f"loop_{len(loops)}", rejections)) is not None:
        loops.append(found)
    if loops and accept_layers is not None:
        refused: dict[Key, Rejection] = {}
        search = partial(_first_loop, gm, accept_layers, min_length, rejections=refused, are_layers=True)
        while (found := search(name=f"loop_{len(loops)}")) is not None:
            loops.append(found)
            rejections = {key: r for key, r in rejections.items() if not r.location or r.location != found.location}
            refused.clear()  # (what read this one's values reads slices now)
    if loops:
        _drop_unused_bodies(gm)
        gm.graph.lint()
        gm.recompile()
    return loops, list(rejections.values())


def _drop_unused_bodies(gm: fx.GraphModule) -> None:
    """The bodies of the surrogate calls that went into a loop; each of them would be recompiled with `gm`."""
    for node in [n for n in gm.graph.nodes if n.op == "get_attr" and not n.users]:
        gm.graph.erase_node(node)
    delete_unused_children(gm)


def _first_loop(
    gm: fx.GraphModule,
    accept: Accept,
    min_length: int,
    name: str,
    rejections: dict[Key, Rejection],
    are_layers: bool = False,
) -> Loop | None:
    """The repeat that covers most of the graph and is a loop, replaced in the graph; what was refused is remembered."""
    view = Graph(gm)
    repeats = find_repeats(view.tokens)
    changing = ((r, True) for r in repeats if view.numbers_change(r))  # (looked for only where all else is refused)
    for repeat, may_numbers_change in itertools.chain(((r, False) for r in repeats), changing):
        key = (view.nodes[repeat.start].name, repeat.period, may_numbers_change)
        if key in rejections or sum(k[2] == may_numbers_change for k in rejections) >= MAX_REJECTIONS[may_numbers_change]:
            continue
        if not are_layers and any(n.meta.get(MOVED) for n in view.nodes[repeat.start : repeat.start + repeat.period]):
            continue
        if not are_layers and all(n.target in VIEWS for n in view.nodes[repeat.start : repeat.start + repeat.period]):
            rejections[key] = Rejection(ONLY_READS, location=user_location(view.nodes[repeat.start]), ops=repeat.covered)
            continue
        try:
            plan = LoopPlan(_window(view, repeat, view.relate(repeat, may_numbers_change), min_length), name)
        except Reject as r:
            rejections[key] = replace(r.rejection, ops=repeat.covered)
            continue
        reason = _why_empty(plan.loop) or (_why_copied(plan) if are_layers else None) or accept(plan.loop)
        if reason is not None:
            rejections[key] = replace(reason, ops=repeat.covered, steps=known_int(plan.loop.length) or 0)
            continue
        drop_unread(replace_by_loop(plan), plan.loop)
        return plan.loop
    return None


def _why_empty(loop: Loop) -> Rejection | None:
    """A row of reads, ``y[0], y[1], …``, rolled, is such a row again: rolling it would never end."""
    if any(n.op not in ("placeholder", "get_attr", "output") for n in loop.body.graph.nodes):
        return None
    return Rejection(ONLY_READS, loop.name, loop.location)


def _why_copied(plan: LoopPlan) -> Rejection | None:
    """Layers gain nothing where their inputs have to be stacked first."""
    if all(isinstance(source, TimeSlices) for _, source, _ in plan.body.inputs):
        return None
    return Rejection("it reads values that would have to be copied together", plan.loop.name, plan.loop.location)


def _window(view: Graph, repeat: Repeat, run: Run, min_length: int) -> Window:
    if run.stop - run.start < min_length * run.period:
        node = view.nodes[repeat.start]
        raise Reject(
            f"{repeat.count} look-alike groups of {repeat.period} ops are not iterations of one loop: {_why(view, repeat, run)}",
            node=node,
            location=user_location(node),
        )
    return _best_rotation(view, run, min_length)


def _why(view: Graph, repeat: Repeat, run: Run) -> str:
    """The operand that broke the pattern, in words."""
    position = min(max(run.stop, repeat.start), repeat.stop - 1)
    node = view.nodes[position]
    if any(is_write(u) and u.args[:1] == (leaf,) for leaf in node.all_input_nodes[:1] for u in leaf.users):
        return f"'{user_line(node) or node.name}' uses a tensor that is written into"
    numbers = [v for v in view.slots[position].leaves if not isinstance(v, fx.Node)]
    before = view.slots[max(position - repeat.period, 0)].leaves
    changed = [v for v, b in zip(view.slots[position].leaves, before, strict=False) if v is not b]
    if numbers and any(not isinstance(c, fx.Node) for c in changed):
        return f"a Python number changes from step to step in '{user_line(node) or node.format_node()}'"
    return f"operands of '{user_line(node) or node.name}' do not follow one rule over the steps"


def _best_rotation(view: Graph, run: Run, min_length: int) -> Window:
    """Where an iteration begins: only tensors are carried, as many iterations, then as few carries as possible, then early."""
    crossings = [_crossing(run, first) for first in range(run.period)]
    windows = []
    for offset in range(run.period):
        count = (run.stop - run.start - offset) // run.period
        if count < min_length:
            break
        window = Window(view, run, run.start + offset, count)
        window.absorb_tail()
        carried = crossings[(window.start - run.origin) % run.period]
        are_tensors = all(isinstance(example(view.nodes[run.origin + residue]), Tensor) for residue in carried)
        windows.append((not are_tensors, -window.count, sum(carried.values()), offset, window))
    return min(windows, key=lambda w: w[:4])[4]  # (the caller saw `min_length` whole iterations)


def _crossing(run: Run, first: int) -> dict[int, int]:
    """With residue `first` as the first of an iteration: which values are handed to a later one, and over how many."""
    p = run.period
    carried: dict[int, int] = {}
    for residue in range(p):
        for column in run.columns[residue]:
            if column.kind != "distance":
                continue
            place = (residue - first) % p
            producer = place - column.distance
            iterations_back = -(producer // p)
            if iterations_back > 0:
                key = (producer + first) % p
                carried[key] = max(carried.get(key, 0), iterations_back)
    return carried
