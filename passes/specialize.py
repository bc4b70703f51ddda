"""What ``dynamic=True`` made symbolic without need becomes plain again: module floats, and sizes nobody reads.

    tau = l_self_tau.item(); h = v + x/tau   ->   h = v + x/2.0        (with a guard: tau is 2.0)

A time constant or a threshold is a constant of the model. The guard makes Dynamo trace again when it changes.

    n = state.size(); n0 = n[0]; ok = n0 == 3; s = x.view(n0, -1)   ->   s = x.view(3, -1)

A check of shapes in Python (`if state.shape != x.shape: raise`) leaves its arithmetic between the ops of the first step, and
``if not mem == None`` a comparison in each.

    autograd_function_apply(fwd, bwd, s0, s1, x)   ->   autograd_function_apply(fwd', bwd', x)

Dynamo hands the symbolic sizes of a surrogate's operands to its bodies, whether they read them or not.

    x [s0, 8] of a step with calls   ->   x [32, 8]      (with a guard: for the first few sizes)

    trampoline_1(u); trampoline_2(w)   ->   trampoline_1(u); trampoline_1(w)      (`torch.compiler.allow_in_graph`)
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx
from torch._guards import CompileContext
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from snn_compile.ir.values import example, known_int
from snn_compile.passes.emit import copy_of

COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)


def specialize_floats(gm: fx.GraphModule) -> None:
    """Replace every SymFloat value of `gm` by its number, except what is read from data (`.item()`)."""
    for node in list(gm.graph.nodes):
        value = example(node)
        if not isinstance(value, torch.SymFloat) or node.op == "placeholder" or free_unbacked_symbols(value):
            continue
        number = value.node.guard_float("", 0)
        replace_by_number(node, number)
        if not node.users:
            gm.graph.erase_node(node)


#: Of all times that Dynamo may trace one function (`recompile_limit`), those left for sizes that stay symbolic: with and without
#: gradients. Before, each trace is for one size of batch: the steps as a program, where symbolic ones are unrolled.
SYMBOLIC_TRACES = 2


def specialize_sizes(values: Iterable[object]) -> None:
    """Fix the sizes of `values`, with a guard, where they are symbolic only because an earlier call had others.

    A step with calls is traced for its sizes, and so is the next size of the batch: a training set has two, the last one being
    smaller. Sizes that the caller declared dynamic, or that change all the time, stay symbolic.
    """
    identity = CompileContext.current_compile_id()
    traces = identity.frame_compile_id if identity is not None else None
    most = torch._dynamo.config.recompile_limit - SYMBOLIC_TRACES
    if traces is None or traces >= most or not torch._dynamo.config.assume_static_by_default:
        return
    for value in values:
        sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else ()
        for size in sizes:
            if isinstance(size, torch.SymInt) and not _is_declared_dynamic(size):
                int(size)


def specialize_length(length: int | torch.SymInt) -> int | None:
    """The number of steps, fixed with a guard where it is symbolic only because an earlier call had another.

    None where the caller declared it dynamic. (Not only for the first few lengths, as sizes are: what cannot be unrolled
    cannot be compiled, and a function that is traced too often runs in eager.)
    """
    known = known_int(length)
    if known is None and torch._dynamo.config.assume_static_by_default and not _is_declared_dynamic(length):  # type: ignore[arg-type]
        return int(length)
    return known


def _is_declared_dynamic(size: torch.SymInt) -> bool:
    """`torch._dynamo.mark_dynamic`, which a guard on one size would contradict."""
    environment, symbols = size.node.shape_env, size.node.expr.free_symbols
    for tracked in environment.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        for own, constraint in zip(getattr(tracked.fake, "shape", ()), constraints, strict=False):
            declared = constraint is not None and not constraint.warn_only
            if declared and isinstance(own, torch.SymInt) and own.node.expr.free_symbols & symbols:
                return True
    return any(environment.is_unbacked_symint(s) for s in symbols)


def name_allowed_functions(gm: fx.GraphModule) -> None:
    """Give every call of one `autograd.Function` that was allowed in the graph one and the same target.

    Dynamo (torch 2.11 to 2.15) makes a new closure ``trampoline(*args) = cls.apply(*args)`` for each call, so that no two calls
    look alike. The first one stands for all: FX has no name for ``cls.apply`` itself (torch 2.15).
    """
    first: dict[type[torch.autograd.Function], fx.node.Target] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and (cls := _allowed_function(node.target)) is not None:
            node.target = first.setdefault(cls, node.target)


def _allowed_function(target: object) -> type[torch.autograd.Function] | None:
    if getattr(target, "__name__", "") != "trampoline_autograd_apply":
        return None
    cells = [c.cell_contents for c in getattr(target, "__closure__", None) or ()]
    return cells[0] if len(cells) == 1 and issubclass(cells[0], torch.autograd.Function) else None


def fold_sizes(gm: fx.GraphModule) -> None:
    """Replace arithmetic on sizes by its number where that is known, and erase what nothing reads."""
    arithmetic = dict.fromkeys(n for n in gm.graph.nodes if _is_size_arithmetic(n))
    for node in arithmetic:
        number = known_int(example(node))
        if number is not None:
            replace_by_number(node, number)
    for node in reversed([n for n in gm.graph.nodes if n in arithmetic or n.target in COMPARISONS]):
        if not node.users:
            gm.graph.erase_node(node)


def _is_size_arithmetic(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "stride")
    is_operator = node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator"
    return is_operator and not any(isinstance(example(n), torch.Tensor) for n in (node, *node.all_input_nodes))


def replace_by_number(node: fx.Node, number: float) -> None:
    """Its readers get the number; the node stays."""
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: number if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: number if n is node else n)


def drop_unread_sizes(gm: fx.GraphModule) -> None:
    """Take symbolic sizes out of the operands of `autograd_function_apply` where neither body reads them."""
    for node in gm.graph.nodes:
        if node.target is not torch.ops.higher_order.autograd_function_apply:
            continue
        operands = node.args[2:]
        sizes = [i for i, a in enumerate(operands) if isinstance(example(a), (int, torch.SymInt))]
        forward, backward = (getattr(gm, n.target) for n in node.args[:2])
        if sizes and (dropped := _without(forward, backward, sizes)) is not None:
            (new_forward, new_backward), saved = dropped
            setattr(gm, node.args[0].target, new_forward)
            setattr(gm, node.args[1].target, new_backward)
            kept = [a for i, a in enumerate(operands) if i not in sizes]
            node.args = (*node.args[:2], *kept)
            index = node.kwargs.get("saved_for_backward_idx", ())
            node.kwargs = {**node.kwargs, "saved_for_backward_idx": [saved[i] for i in index]}


def _without(forward: fx.GraphModule, backward: fx.GraphModule, sizes: list[int]):  # type: ignore[no-untyped-def]
    """Copies of both bodies without the operands `sizes`, and where each saved value went; None where one is read."""
    forward, backward = copy_of(forward), copy_of(backward)
    output = forward.graph.output_node()
    outs, saved = output.args[0]  # type: ignore[misc]
    inputs = [n for n in forward.graph.nodes if n.op == "placeholder"]
    gone = {inputs[i] for i in sizes}
    if any(u is not output for n in gone for u in n.users) or any(o in gone for o in outs):
        return None
    received = [n for n in backward.graph.nodes if n.op == "placeholder"]
    unread = [received[len(outs) + j] for j, s in enumerate(saved) if s in gone]
    grads = backward.graph.output_node().args[0]
    if any(n.users for n in unread) or any(grads[i] is not None for i in sizes):  # type: ignore[index]
        return None
    moved = {j: k for k, j in enumerate(j for j, s in enumerate(saved) if s not in gone)}
    output.args = ((outs, tuple(s for s in saved if s not in gone)),)
    backward.graph.output_node().args = (tuple(g for i, g in enumerate(grads) if i not in sizes),)  # type: ignore[arg-type]
    for graph, nodes in ((forward.graph, gone), (backward.graph, unread)):
        for n in nodes:
            graph.erase_node(n)
    forward.recompile()
    backward.recompile()
    return (forward, backward), moved
