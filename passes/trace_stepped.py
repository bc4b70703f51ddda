"""A `Loop` whose step is more than pointwise -> a `SteppedRecurrence`: its step and the step's backward as programs.

    r = linear(s, w); h = 0.9*v + x + r; s = H(h - 1); v = h - s

    ->  forward:   r = addmm(...); s, v = region(v, x, r)
        backward:  grad_h, grad_v = region(v, x, r, grad_s, grad_v'); grad_s = mm(grad_h, w)       (r is kept, not run again)
                   grad_w = sum_t grad_h[t].T @ s[t-1]                                              (one product at the end)

As in `trace_step`, the backward is autograd's own, traced over one step. A value the forward program computed by a call is
handed over; pointwise values are computed again, in registers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from snn_compile.errors import Reject
from snn_compile.ir.recurrence import Carry, Const, Output, TimeSeries
from snn_compile.ir.stepped import Reduced, SteppedRecurrence
from snn_compile.ir.values import is_getitem
from snn_compile.passes.emit import emit
from snn_compile.passes.split_step import Supported, is_number, is_pointwise, split_step
from snn_compile.passes.trace_step import (
    decomposed_graph,
    find_differentiable,
    leave_unrounded,
    name_nodes,
    simplify,
    vector_jacobian,
)

aten = torch.ops.aten

TRANSPOSES = {aten.t.default, aten.numpy_T.default}
RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.squeeze.dim, aten.unsqueeze.default}


def trace_stepped(
    body: Callable[..., Sequence[torch.Tensor]],
    examples: Sequence[torch.Tensor],
    *,
    name: str,
    carries: Sequence[Carry],
    xs: Sequence[TimeSeries],
    consts: Sequence[Const],
    ys: Sequence[Output],
    supported: Supported,
) -> SteppedRecurrence:
    """Trace ``body(*carries, *xs, *consts) -> (*next_carries, *ys)``; `examples` have the operands' sizes (of one step).

    Raises `Reject` where the step cannot run alone, draws random numbers, or changes the shape of a state.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        operands = [torch.empty_strided(e.shape, e.stride(), dtype=e.dtype, device=e.device) for e in examples]
    try:
        carries, ys, needs_grad = find_differentiable(body, operands, carries, xs, consts, ys)
    except RuntimeError as error:  # an op without a fake implementation, or one whose sizes depend on numbers
        raise Reject(f"one step cannot be traced alone: {type(error).__name__}: {str(error).splitlines()[0]}") from error

    def forward(*args: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(body(*args))

    step = _trace(forward, operands, supported)
    names = [o.name for o in (*carries, *xs, *consts)]
    name_nodes(step, names)
    _check(step, carries, operands)
    if any(needs_grad):
        differentiable = [c.differentiable for c in carries] + [y.differentiable for y in ys]
        function, cotangents = vector_jacobian(body, operands, needs_grad, differentiable)
        joint = _trace(function, [*operands, *cotangents], supported)
        results = [(f"grad_next_{c.name}", c) for c in carries] + [(f"grad_{y.name}", y) for y in ys]  # type: ignore[list-item]
        name_nodes(joint, names + [name for name, r in results if r.differentiable])
        _check_calls(joint)
        first = len(carries) + len(xs)
        leave_unrounded(joint, joint.graph.find_nodes(op="placeholder")[first : len(operands)])
    else:
        joint = None
    signature = (name, tuple(carries), tuple(xs), tuple(consts), tuple(ys))
    return _Builder(signature, step, joint, needs_grad, supported).build()


def _trace(function: Callable[..., object], operands: Sequence[torch.Tensor], supported: Supported) -> fx.GraphModule:
    """Trace; pointwise ops that no target knows are decomposed in a second trace, all others are calls."""
    gm = decomposed_graph(function, operands, supported, lambda op: torch.Tag.pointwise in getattr(op, "tags", ()))
    _fold_reshapes(gm)
    return gm


def _fold_reshapes(gm: fx.GraphModule) -> None:
    """``view(view(x, a), b) -> view(x, b)``, and ``x`` where that is its shape: each would be a call, in every step."""
    for node in list(gm.graph.nodes):
        if node.target not in RESHAPES or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if source.target in RESHAPES:
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(aten.reshape.default, (source.args[0], list(node.meta["val"].shape)))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            node, source = new, source.args[0]  # type: ignore[assignment]
        if source.meta["val"].shape == node.meta["val"].shape:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _check(step: fx.GraphModule, carries: Sequence[Carry], operands: Sequence[torch.Tensor]) -> None:
    results = step.graph.output_node().args[0]
    for result, carry, operand in zip(results, carries, operands, strict=False):  # type: ignore[arg-type]
        if not isinstance(result, fx.Node):
            raise Reject(f"state '{carry.name}' is a number after a step")
        value = result.meta["val"]
        if value.dtype != carry.dtype or value.shape != operand.shape:
            raise Reject(
                f"state '{carry.name}' enters the step as {_type(operand)} and leaves it as {_type(value)}",
                hint=f"give '{carry.name}' its final shape and dtype before the loop",
            )
    _check_calls(step)


def _type(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _check_calls(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            raise Reject("the step holds a tensor constant of its own", node=node.name)
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise Reject(f"the step draws random numbers ({node.target})", node=node.name)
        if torch.Tag.data_dependent_output in node.target.tags or torch.Tag.dynamic_output_shape in node.target.tags:
            raise Reject(f"the shape of a value depends on numbers ({node.target})", node=node.name)
        values = [n.meta["val"] for n in node.all_input_nodes]
        dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.dtype.is_floating_point}
        if len(node.target._schema.returns) > 1 and len(dtypes) > 1:
            # on fake tensors, the statistics that a norm saves have another dtype than on real ones
            raise Reject(f"{node.target} mixes {' and '.join(sorted(map(str, dtypes)))}", node=node.name)


# ------------------------------------------------------------------------------------------------------------- building


@dataclass
class _Builder:
    signature: tuple[str, tuple[Carry, ...], tuple[TimeSeries, ...], tuple[Const, ...], tuple[Output, ...]]
    step: fx.GraphModule
    joint: fx.GraphModule | None
    needs_grad: Sequence[bool]
    supported: Supported

    def build(self) -> SteppedRecurrence:
        _, carries, xs, consts, _ = self.signature
        n = len(carries) + len(xs) + len(consts)
        results: list[fx.Node] = list(self.step.graph.output_node().args[0])  # type: ignore[arg-type]
        residuals = self._keep_results_of_calls(n) if self.joint is not None else []
        results += residuals
        inputs = self.step.graph.find_nodes(op="placeholder")
        invariant = set(inputs[len(carries) + len(xs) :])
        stepped = SteppedRecurrence(*self.signature, forward=split_step(self.step, results, invariant, self.supported))
        stepped.results = tuple((tuple(r.meta["val"].shape), r.meta["val"].dtype) for r in results)
        stepped.n_residuals, stepped.step, stepped.step_backward = len(residuals), self.step, self.joint
        if self.joint is not None:
            self._backward(stepped)
        return stepped

    def _keep_results_of_calls(self, n: int) -> list[fx.Node]:
        """Replace what the backward graph would run again by new placeholders; gives the forward nodes that they hold.

        Equal nodes are found by content: the same op on the same operands.
        """
        assert self.joint is not None
        _recompute_normalised(self.joint)
        numbers: dict[object, int] = {}
        known = {_number(node, numbers, i): node for i, node in enumerate(self.step.graph.nodes)}
        kept: list[fx.Node] = []
        invariant = _invariant(self.step, set(self.step.graph.find_nodes(op="placeholder")[n - len(self.signature[3]) :]))
        last = self.joint.graph.find_nodes(op="placeholder")[n - 1]
        for i, node in enumerate(list(self.joint.graph.nodes)):
            same = known.get(_number(node, numbers, i if i < n else -1 - i)) or self._part_of_known(node, known)
            if node.op != "call_function" or same is None or same in invariant or not self._is_worth_keeping(node):
                continue
            with self.joint.graph.inserting_after(last):
                last = self.joint.graph.placeholder(f"kept_{node.name}")
            last.meta = dict(node.meta)
            node.replace_all_uses_with(last)
            kept.append(same)
        self.joint.graph.eliminate_dead_code()
        used = [p for p in self.joint.graph.find_nodes(op="placeholder") if p.name.startswith("kept_")]
        held = [(p, node) for p, node in zip(used, kept, strict=True) if p.users]
        for p in used:
            if not p.users:
                self.joint.graph.erase_node(p)
        return [node for _, node in held]

    def _part_of_known(self, node: fx.Node, known: dict[int, fx.Node]) -> fx.Node | None:
        """A result of a call that the forward step makes and does not read: saved statistics, an index."""
        source = known.get(node.args[0].meta["number"]) if is_getitem(node) else None  # type: ignore[union-attr]
        if source is None:
            return None
        with self.step.graph.inserting_after(source):
            part = self.step.graph.call_function(node.target, (source, *node.args[1:]))  # type: ignore[arg-type]
        part.meta = dict(node.meta)
        known[node.meta["number"]] = part
        return part

    def _is_worth_keeping(self, node: fx.Node) -> bool:
        """The result of a call that does work: no view, nothing that runs once, a tensor."""
        if is_pointwise(node, self.supported) or is_number(node) or not isinstance(node.meta.get("val"), torch.Tensor):
            return False
        return node.meta["val"].untyped_storage()._cdata not in {
            o.meta["val"].untyped_storage()._cdata for o in node.all_input_nodes if isinstance(o.meta["val"], torch.Tensor)
        }

    def _backward(self, stepped: SteppedRecurrence) -> None:
        joint = self.joint
        assert joint is not None
        n_carries, n_xs = len(stepped.carries), len(stepped.xs)
        grads = iter(joint.graph.output_node().args[0])  # type: ignore[arg-type]
        needed = self.needs_grad
        carried = [next(grads) for _ in range(sum(needed[:n_carries]))]
        series = [next(grads) for _ in range(sum(needed[n_carries : n_carries + n_xs]))]
        whole = list(grads)
        inputs = joint.graph.find_nodes(op="placeholder")
        invariant = set(inputs[n_carries + n_xs : n_carries + n_xs + len(stepped.consts)])
        ways = [_way(g) for g in whole]
        extra = list(dict.fromkeys(n for w in ways if w is not None for n in w[1:]))
        joint.graph.output_node().args = ([*carried, *series, *extra],)
        joint.graph.eliminate_dead_code()
        stepped.backward = split_step(joint, [*carried, *series, *extra], invariant, self.supported)
        slots = {n: stepped.backward.outputs[len(carried) + len(series) + i] for i, n in enumerate(extra)}
        stepped.reduced = tuple(None if w is None else Reduced(w[0], *(slots[n] for n in w[1:])) for w in ways)  # type: ignore[misc]
        at_end = dict.fromkeys(n for w in ways if w is not None and w[0] != "sum" for n in w[1:])
        stepped.rows = {slots[n]: (tuple(n.meta["val"].shape), n.meta["val"].dtype) for n in at_end}  # type: ignore[misc]
        read = [bool(i.users) or i in extra or needs for i, needs in zip(inputs, self.needs_grad, strict=False)]
        stepped.reads = tuple(read)
        stepped.history = tuple(i for i in range(n_carries) if inputs[i].users or inputs[i] in extra)


def _recompute_normalised(joint: fx.GraphModule) -> None:
    """``batch_norm(h)`` -> ``h*scale + shift`` with the statistics that the forward saves, so that they are all that is kept."""
    for node in [n for n in joint.graph.nodes if n.target is aten.native_batch_norm.default and n.args[5] is True]:
        for y in [u for u in node.users if is_getitem(u) and u.args[1] == 0]:
            h, weight, bias = node.args[:3]
            with joint.graph.inserting_before(y):
                mean, invstd = (_call(joint.graph, operator.getitem, node, i) for i in (1, 2))
                scale = invstd if weight is None else _call(joint.graph, aten.mul.Tensor, invstd, weight)
                # (the bits of the forward: a spike that came out another way would have another gradient)
                minus = _call(joint.graph, aten.neg.default, mean)
                shift = (
                    _call(joint.graph, aten.mul.Tensor, minus, scale)
                    if bias is None
                    else _call(joint.graph, aten.addcmul.default, bias, minus, scale)
                )
                space = [1] * (h.meta["val"].dim() - 2)
                if space:
                    scale, shift = (_call(joint.graph, aten.view.default, n, [-1, *space]) for n in (scale, shift))
                new = _call(joint.graph, aten.addcmul.default, shift, h, scale)
            y.replace_all_uses_with(new)
            joint.graph.erase_node(y)
    simplify(joint)


def _call(graph: fx.Graph, target: Callable[..., object], *args: object, **kwargs: object) -> fx.Node:
    """A node with its example, as nodes of ATen graphs hold it."""
    node = emit(graph, "call_function", target, args, kwargs)
    node.meta = {"val": node.meta["example_value"]}
    return node


def _invariant(gm: fx.GraphModule, found: set[fx.Node]) -> set[fx.Node]:
    for node in gm.graph.nodes:
        if node.op == "call_function" and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _number(node: fx.Node, numbers: dict[object, int], position: int) -> int:
    """Equal numbers are equal values; `numbers` is shared by the graphs compared."""
    if node.op == "placeholder":
        key: object = ("placeholder", position)
    else:
        args = fx.node.map_arg((node.args, tuple(sorted(node.kwargs.items()))), lambda n: f"%{n.meta['number']}")
        key = (node.op, str(node.target), repr(args))
    node.meta["number"] = numbers.setdefault(key, len(numbers))
    return node.meta["number"]  # type: ignore[no-any-return]


def _way(gradient: fx.Node | None):  # type: ignore[no-untyped-def]
    """How one step's gradient of an invariant operand adds up: ``(kind, nodes)``, see `Reduced`."""
    if gradient is None:
        return None
    source = gradient
    transposed = False
    while source.target in TRANSPOSES:
        source, transposed = source.args[0], not transposed  # type: ignore[assignment]
    if source.target is aten.mm.default:
        a, b = source.args
        if isinstance(a, fx.Node) and a.target in TRANSPOSES:  # (a.T b).T = b.T a
            return ("matmul", b, a.args[0]) if transposed else ("matmul", a.args[0], b)
    rows = source
    while rows.target in RESHAPES:
        rows = rows.args[0]  # type: ignore[assignment]
    if rows.target is aten.sum.dim_IntList and rows.args[1] == [0] and rows.args[0].meta["val"].dim() == 2:  # type: ignore[union-attr]
        return ("rows", rows.args[0])
    return ("sum", gradient)
