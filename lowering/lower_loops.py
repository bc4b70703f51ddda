"""A pointwise recurrent `Loop` becomes one custom op.

y, v = loop(v0, x, w)   ->   y, v = torch.ops.snn_compile.recurrence_<hash>(v0, x, w, T)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from snn_compile.errors import Reject
from snn_compile.ir.loop import Loop
from snn_compile.ir.recurrence import Carry, Const, Output, Recurrence, TimeSeries
from snn_compile.ir.stepped import SteppedRecurrence
from snn_compile.ir.values import example, is_getitem, known_layout, shape_hint, shape_key
from snn_compile.lowering import ops
from snn_compile.lowering.registration import is_kernel
from snn_compile.passes.emit import emit, number_of_steps
from snn_compile.passes.hoist_creations import inline_creations, number_of
from snn_compile.passes.loop_results import laid_out
from snn_compile.passes.trace_step import StepInterpreter, trace_step
from snn_compile.passes.trace_stepped import trace_stepped


def make_recurrence(call: fx.Node, loop: Loop, grad_enabled: bool) -> Recurrence:
    """Trace and differentiate the loop's body; raises `Reject` where it cannot be a kernel."""
    move_numbers(call)
    _check_dtypes(call, loop)
    _inline_constants(call, loop)
    _drop_reshapes(loop)
    _shrink_initial_states(call, loop)
    shape = _lanes(call, loop)
    _check_promotion(loop, shape)
    device = _device(call, loop)
    recurrence = trace_step(
        _runner(loop),
        name=loop.name,
        **_signature(call, loop, grad_enabled),
        shape=shape,
        device=device,
        supported=ops.is_supported,
    )
    for traced, wanted in zip(recurrence.ys, loop.ys, strict=True):
        if traced.dtype != wanted.example.dtype:
            raise Reject(f"'{wanted.name}' is {wanted.example.dtype} in the loop and {traced.dtype} in its trace")
    recurrence.meta["device"] = device
    recurrence.location = loop.location
    return recurrence


def make_stepped(call: fx.Node, loop: Loop, grad_enabled: bool, is_by_channel: bool = False) -> SteppedRecurrence:
    """Trace and differentiate the loop's body as a program of kernels and calls; raises `Reject` where that cannot be."""
    move_numbers(call)
    _check_dtypes(call, loop)
    examples = [_of_one_step(a, i, loop) for i, a in enumerate(call.args)]
    if is_by_channel:
        _shrink_initial_states(call, loop)
    device = _device(call, loop)
    signature = _signature(call, loop, grad_enabled)
    stepped = trace_stepped(_runner(loop), examples, name=loop.name, **signature, supported=ops.is_supported)
    stepped.meta["device"] = device
    stepped.location = loop.location
    return stepped


def _signature(call: fx.Node, loop: Loop, grad_enabled: bool) -> dict[str, Any]:
    """``carries, xs, consts, ys`` of the recurrence that the loop is."""
    inits, xs, consts = loop.split(call.args)

    def needs_grad(node: object) -> bool:
        value = example(node)
        return grad_enabled and isinstance(value, torch.Tensor) and value.requires_grad

    return {
        "carries": [
            Carry(c.name, c.example.dtype, init_needs_grad=needs_grad(i), is_result=c.is_result)
            for c, i in zip(loop.carries, inits, strict=True)
        ],
        "xs": [TimeSeries(x.name, x.example.dtype, needs_grad(o), x.reverse) for x, o in zip(loop.xs, xs, strict=True)],
        "consts": [_const(c.name, example(o), needs_grad(o)) for c, o in zip(loop.consts, consts, strict=True)],
        "ys": [Output(y.name, y.example.dtype, y.dim, reverse=y.reverse) for y in loop.ys],
    }


def _of_one_step(operand: object, i: int, loop: Loop) -> torch.Tensor:
    """An operand's size, strides and dtype as one step sees it."""
    value = example(operand)
    if not isinstance(value, torch.Tensor):
        raise Reject(f"the loop reads '{operand}', which is not a tensor", location=loop.location)
    if len(loop.carries) <= i < len(loop.carries) + len(loop.xs):
        value = value.select(0, 0)
    if (layout := known_layout(value)) is None:
        raise Reject("a step with calls needs sizes that are known when it is compiled", location=loop.location)
    with FakeTensorMode():
        return torch.empty_strided(*layout, dtype=value.dtype, device=value.device)


def lower_loop(gm: fx.GraphModule, call: fx.Node, loop: Loop, op: torch._ops.OpOverload, is_differentiable: bool) -> fx.Node:
    """Replace the call of `loop` by a call of `op`, whose first results are the loop's."""
    graph = gm.graph
    with graph.inserting_before(call):
        operands: list[Any] = [a if is_differentiable else _detached(graph, a) for a in call.args]
        new = graph.call_function(op, (*operands, number_of_steps(call, loop)))
        new.meta = dict(call.meta)
        results = op._schema.returns
        users = list(call.users)
        for user in users:
            index = user.args[1]
            assert isinstance(index, int)
            result = new if len(results) == 1 else graph.call_function(operator.getitem, (new, index))
            if result is not new:
                result.meta = dict(user.meta)
            user.replace_all_uses_with(_state_laid_out(graph, loop, index, result, example(user)))
            graph.erase_node(user)
        if len(results) == 1 and users:
            new.meta["example_value"] = users[0].meta.get("example_value")
    graph.erase_node(call)
    delattr(gm, str(call.target))
    return new


def _state_laid_out(graph: fx.Graph, loop: Loop, index: int, result: fx.Node, like: object) -> fx.Node:
    """A kernel lays a last state out as its series are; eager, in doubt, as the state before: a `view` may follow."""
    is_state = index >= len(loop.ys) and isinstance(like, torch.Tensor)
    if not is_state or all(x.example.is_contiguous() for x in loop.xs):
        return result
    return laid_out(graph, result, like)


def _check_dtypes(call: fx.Node, loop: Loop) -> None:
    for operand in call.args:
        value = example(operand)
        if isinstance(value, torch.Tensor) and value.dtype.is_complex:
            raise Reject(f"complex dtype {value.dtype} has no kernel", node=str(operand), location=loop.location)


def _detached(graph: fx.Graph, operand: object) -> object:
    """No gradient passes the recurrence: say so, or autograd warns that the op has no derivative."""
    value = example(operand)
    if not isinstance(operand, fx.Node) or not isinstance(value, torch.Tensor):
        return operand
    if not value.requires_grad and not _is_result_of_a_recurrence(operand):
        return operand
    detached = graph.call_method("detach", (operand,))
    detached.meta = {**operand.meta, "example_value": value.detach()}
    return detached


def _is_result_of_a_recurrence(node: fx.Node) -> bool:
    """It may want a gradient where eager's does not: what needs one may come too late in the loop to reach it."""
    source = node.args[0] if is_getitem(node) else node
    return isinstance(source, fx.Node) and is_kernel(source)


def _inline_constants(call: fx.Node, loop: Loop) -> None:
    """Tensors of one number are not read from memory, where what is read has their shape."""
    placeholders = loop.placeholders()
    first = len(loop.carries) + len(loop.xs)
    operands = dict(zip(placeholders, call.args, strict=True))
    carried = dict.fromkeys(placeholders[: len(loop.carries)])
    lanes = {shape_key(v) for v in map(example, call.args[: len(loop.carries)]) if isinstance(v, torch.Tensor)}
    lanes |= {shape_key(x.example) for x in loop.xs}
    consts = {p: operands[p] for p in placeholders[first:] if shape_key(example(p)) in lanes}  # type: ignore[arg-type]
    for placeholder in inline_creations(loop.body, {**carried, **consts}):
        at = placeholders.index(placeholder)
        loop.body.graph.erase_node(placeholder)
        del loop.consts[at - first]
        del placeholders[at]
        call.args = (*call.args[:at], *call.args[at + 1 :])
    loop.body.recompile()


def _shrink_initial_states(call: fx.Node, loop: Loop) -> None:
    """``full([4, 8], 0.)`` that a state starts from is passed as ``full([], 0.)``: nothing to fill, to read or to save.

    A size that is not known (``zeros_like(x[0])`` under `dynamic=True`) is compared as the expression that it is.
    """
    lanes = {shape_key(v)[1:] for v in map(example, loop.split(call.args)[1]) if isinstance(v, torch.Tensor)}
    for i, init in enumerate(call.args[: len(loop.carries)]):
        value = example(init)
        if not isinstance(init, fx.Node) or (number := number_of(init)) is None or shape_key(value) not in lanes:
            continue
        with call.graph.inserting_before(call):
            new = call.graph.call_function(torch.full, ((), number), {"dtype": value.dtype, "device": value.device})
        new.meta = {**init.meta, "example_value": value.new_full((), number)}
        call.update_arg(i, new)
        if not init.users:
            call.graph.erase_node(init)


_RESHAPES = ("view", "reshape", "flatten", "unflatten", "expand", "view_as", "reshape_as", "expand_as", "broadcast_to")


def _drop_reshapes(loop: Loop) -> None:
    """``w.view(-1)`` of a ``w [C]`` is ``w``: stretched over the lanes, as in the trace, it would have another shape."""
    for node in list(loop.body.graph.nodes):
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.op not in ("call_method", "call_function") or name not in _RESHAPES or not isinstance(node.args[0], fx.Node):
            continue
        before, after = example(node.args[0]), example(node)
        if isinstance(before, torch.Tensor) and shape_hint(before) == shape_hint(after) and before.dtype == after.dtype:
            node.replace_all_uses_with(node.args[0])
            loop.body.graph.erase_node(node)
    loop.body.recompile()


def _runner(loop: Loop):  # type: ignore[no-untyped-def]
    def run(*args: torch.Tensor) -> list[torch.Tensor]:
        return list(StepInterpreter(loop.body).run(*args))

    return run


def _lanes(call: fx.Node, loop: Loop) -> tuple[int, ...]:
    """The recurrence's shape, which must be the shape of each of its values."""
    inits, xs, consts = loop.split(call.args)
    shapes = [shape_hint(v)[1:] for v in map(example, xs)]  # type: ignore[arg-type]
    for operand in (*inits, *consts):
        value = example(operand)
        if not isinstance(value, torch.Tensor):
            raise Reject(f"the loop reads '{operand}', which is not a tensor", location=loop.location)
        shapes.append(shape_hint(value))
    try:
        shape = tuple(torch.broadcast_shapes(*shapes)) if shapes else ()
    except RuntimeError:
        raise Reject(f"values of sizes that do not go together: {', '.join(map(str, shapes))}", location=loop.location) from None
    next_carries, values = loop.results()
    for node in (*next_carries, *values):
        value = example(node)
        if isinstance(value, torch.Tensor) and shape_hint(value) != shape:
            raise Reject(f"'{node.name}' has shape {shape_hint(value)} in a loop over {shape}", location=loop.location)
    return shape


def move_numbers(call: fx.Node) -> None:
    """A 0-d tensor on CPU, which eager lets meet tensors on a GPU (Norse's parameters), goes there once, before the loop."""
    tensors = [(i, v) for i, v in enumerate(map(example, call.args)) if isinstance(v, torch.Tensor)]
    elsewhere = {v.device for _, v in tensors if v.device.type != "cpu"}
    if len(elsewhere) != 1:
        return
    with call.graph.inserting_before(call):
        for i, value in tensors:
            if value.dim() == 0 and value.device.type == "cpu":
                call.update_arg(i, emit(call.graph, "call_method", "to", (call.args[i], next(iter(elsewhere))), {}))


def _device(call: fx.Node, loop: Loop) -> torch.device:
    devices = {v.device for v in map(example, call.args) if isinstance(v, torch.Tensor)}
    if len(devices) != 1:
        raise Reject(
            f"its operands lie on {', '.join(sorted(map(str, devices))) or 'no device'}",
            location=loop.location,
            hint="move all of them to one device",
        )
    return devices.pop()


def _const(name: str, value: object, needs_grad: bool) -> Const:
    assert isinstance(value, torch.Tensor)
    return Const(name, value.dtype, needs_grad, is_scalar=value.dim() == 0)


def _check_promotion(loop: Loop, shape: tuple[int, ...]) -> None:
    """A 0-d operand that the trace widens must have the dtype of the others: 0-d tensors do not promote them."""
    examples = [c.example for c in loop.carries] + [x.example for x in loop.xs]
    whole = {v.dtype for v in examples if v.dim() > 0 and v.dtype.is_floating_point}
    for value in examples:
        if shape and value.dim() == 0 and whole and value.dtype not in whole | {torch.bool}:
            raise Reject(
                f"a 0-d tensor of {value.dtype} meets tensors of {', '.join(map(str, whole))} in the loop",
                location=loop.location,
                hint="convert it to their dtype before the loop",
            )
