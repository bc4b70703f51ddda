"""Torch-level step -> pointwise ATen step and its backward step.

    step(v, x): h = v + (x - v)/2; s = Surrogate.apply(h - 1); v = h*(1 - s)

    ->  step:      sub = x - v; div = sub/2; h = v + div; ...; return (v', s)
        backward:  the vector-Jacobian product of the step, from autograd itself

The step is run once under `make_fx` on fake tensors with PyTorch's own autograd switched on, so that a surrogate
gradient, a straight-through `detach`, a `no_grad` region and a learnable threshold all mean what they mean in eager.
Only this O(1) body is ever traced to ATen (design, decision 1).

Every operand is expanded to the recurrence's shape before tracing: then no op broadcasts, no gradient needs a reduction,
and each value of the graphs is one scalar a lane. Gradients of operands that were broadcast are summed over the lanes
outside the kernel. A 0-d constant stays 0-d, because dimensionless tensors take no part in type promotion; its gradient,
which autograd (or a user's backward) sums over the lanes, becomes the contribution of one lane, summed outside like the
others (`passes/split_sums`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx

from snn_compile.errors import Reject
from snn_compile.ir.recurrence import Carry, Const, Output, Recurrence, TimeSeries
from snn_compile.ir.values import base_name
from snn_compile.passes.autocast_regions import regions, under
from snn_compile.passes.representable import is_compared_with_zero, keeps_sign
from snn_compile.passes.split_sums import SUMS, split_sums

aten = torch.ops.aten

#: Ops that hand their first operand on unchanged once every operand has the recurrence's shape.
IDENTITIES = {
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
    aten.expand.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.contiguous.default,
}

Supported = Callable[[fx.Node], bool]


def trace_step(
    body: Callable[..., Sequence[torch.Tensor]],
    *,
    name: str,
    carries: Sequence[Carry],
    xs: Sequence[TimeSeries],
    consts: Sequence[Const],
    ys: Sequence[Output],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    supported: Supported = lambda node: True,
) -> Recurrence:
    """Trace ``body(*carries, *xs, *consts) -> (*next_carries, *ys)`` into a `Recurrence`.

    The dtypes of `ys`, and which carries and outputs are differentiable, are found here; the rest of the signature is the
    caller's. `supported` says whether a target can lower a node; an op that it refuses is decomposed before it is given up.

    Raises `Reject` where the step is not pointwise over `shape`.
    """
    shape = tuple(int(s) for s in shape)
    with FakeTensorMode(allow_non_fake_inputs=True):  # autograd's C++ makes real 0-d constants of its own
        operands = [torch.empty(shape, dtype=o.dtype, device=device) for o in (*carries, *xs)]
        operands += [torch.empty(() if c.is_scalar else shape, dtype=c.dtype, device=device) for c in consts]
    carries, ys, needs_grad = find_differentiable(body, operands, carries, xs, consts, ys)

    def forward(*args: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(body(*args))

    placeholder_names = [o.name for o in (*carries, *xs, *consts)]
    step = _trace(forward, operands, placeholder_names, supported, shape)
    _check_step(step, carries)
    recurrence = Recurrence(name, tuple(carries), tuple(xs), tuple(consts), tuple(ys), step)
    if any(needs_grad):
        recurrence.backward = _trace_backward(body, operands, needs_grad, recurrence, supported, shape)
    return recurrence


def find_differentiable(body, operands, carries, xs, consts, ys):  # type: ignore[no-untyped-def]
    """Fixpoint: a carry is differentiable if its initial value is, or if the step makes it so."""
    n = len(carries)
    flags = [c.init_needs_grad for c in carries]
    fixed = [o.needs_grad for o in (*xs, *consts)]
    while True:
        needs_grad = [*flags, *fixed]
        with torch.enable_grad():
            out = body(*_leaves(operands, needs_grad))
        for value, what in zip(out, (*carries, *ys), strict=True):
            if not isinstance(value, torch.Tensor):
                raise Reject(f"'{what.name}' is a {type(value).__name__} inside the loop, not a tensor")
        new = [f or o.requires_grad for f, o in zip(flags, out, strict=False)]
        if new == flags:
            break
        flags = new
    carries = [replace(c, differentiable=f) for c, f in zip(carries, flags, strict=True)]
    ys = [replace(y, dtype=o.dtype, differentiable=o.requires_grad) for y, o in zip(ys, out[n:], strict=True)]
    return carries, ys, needs_grad


def _leaves(operands: Sequence[torch.Tensor], needs_grad: Sequence[bool]) -> list[torch.Tensor]:
    return [o.detach().requires_grad_() if g else o.detach() for o, g in zip(operands, needs_grad, strict=True)]


def vector_jacobian(body, operands, needs_grad, differentiable):  # type: ignore[no-untyped-def]
    """``backward(*operands, *cotangents) -> gradients`` by autograd, and example cotangents of the differentiable results."""
    n = len(operands)

    def backward(*args: torch.Tensor) -> list[torch.Tensor | None]:
        leaves = _leaves(args[:n], needs_grad)
        with torch.enable_grad():
            out = list(body(*leaves))
        pairs = [(o, c) for o, c in zip((o for o, d in zip(out, differentiable, strict=True) if d), args[n:], strict=True)]
        pairs = [(o, c) for o, c in pairs if o.requires_grad]
        wanted = [leaf for leaf, g in zip(leaves, needs_grad, strict=True) if g]
        with torch.autocast(operands[0].device.type, enabled=False):  # (a backward runs outside of it)
            return list(torch.autograd.grad([o for o, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True))

    with torch.no_grad():
        out = body(*operands)
    return backward, [torch.empty_like(o) for o, d in zip(out, differentiable, strict=True) if d]


def _trace_backward(body, operands, needs_grad, recurrence, supported, shape):  # type: ignore[no-untyped-def]
    results = [*recurrence.carries, *recurrence.ys]
    backward, cotangents = vector_jacobian(body, operands, needs_grad, [r.differentiable for r in results])
    names = [o.name for o in recurrence.operands]
    m = len(recurrence.carries)
    names += [f"grad_{'next_' if i < m else ''}{r.name}" for i, r in enumerate(results) if r.differentiable]
    gm = _trace(backward, [*operands, *cotangents], names, supported, shape)
    first = m + len(recurrence.xs)
    leave_unrounded(gm, gm.graph.find_nodes(op="placeholder")[first : len(operands)])
    return gm


def leave_unrounded(gm: fx.GraphModule, consts: Iterable[fx.Node]) -> None:
    """A backward step in bf16 or fp16 is rounded where its gradients are stored, not after every op: mark its nodes so.

    Eager rounds each; what is left out here is error. A value that decides something - it is compared, or made an integer -
    stays as eager has it, and so does what comes of constants alone, which the forward may share.
    """
    nodes = list(gm.graph.nodes)
    varying = {n for n in nodes if n.op == "placeholder"} - set(consts)
    deciding: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op == "call_function" and (node in deciding or _decides(node)):
            deciding |= {node, *(i for n in node.all_input_nodes for i in _read_rounded(n, node))}
    for node in nodes:
        if node.op == "call_function" and not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
            node.meta["is_rounded"] = node in deciding


def _read_rounded(node: fx.Node, user: fx.Node) -> list[fx.Node]:
    """What `user` needs as eager rounds it, to have eager's value: `node`, but for a difference of which it reads the sign."""
    return node.all_input_nodes if is_compared_with_zero(node, user) and keeps_sign(node) else [node]


def _decides(node: fx.Node) -> bool:
    value = node.meta.get("val")
    is_float = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    return not is_float or getattr(node.target, "overloadpacket", None) in STEPS


#: ops that jump where their operand crosses a number
STEPS = {aten.floor, aten.ceil, aten.trunc, aten.round, aten.sign, aten.sgn, aten.heaviside, aten.fmod, aten.remainder}


# ---------------------------------------------------------------------------------------------------------- tracing


def _trace(function, operands, names, supported, shape) -> fx.GraphModule:  # type: ignore[no-untyped-def]
    """Trace; ops no target knows are decomposed in a second trace."""
    gm = decomposed_graph(function, operands, supported, lambda op: op not in SUMS)
    split_sums(gm, shape)
    for node in gm.graph.nodes:
        if node.op == "call_function" and not supported(node):
            raise Reject(f"the step calls {node.target}, which no pointwise kernel can hold", node=node.name)
    check_pointwise(gm, shape)
    name_nodes(gm, names)
    return gm


def decomposed_graph(  # type: ignore[no-untyped-def]
    function, operands, supported: Supported, may_decompose: Callable[[object], bool]
) -> fx.GraphModule:
    """Trace, and trace again with decompositions for the ops that no target knows and `may_decompose` allows."""
    decompositions: dict[object, Callable] = {}  # type: ignore[type-arg]
    known = core_decompositions()
    while True:
        gm = make_graph(function, operands, decompositions)
        unknown = {n.target for n in gm.graph.nodes if n.op == "call_function" and not supported(n)}
        # what a decomposition brings in may itself need one
        more = {op: known[op] for op in unknown if op in known and may_decompose(op)}
        if not more.keys() - decompositions.keys():
            return gm
        decompositions |= more


@functools.cache
def core_decompositions() -> dict:  # type: ignore[type-arg]
    ours = {
        aten.div.Tensor_mode: _truncating_div,
        aten.index_put.default: _masked_put,
        aten.masked_fill.Scalar: _masked_fill,
        aten.masked_fill.Tensor: _masked_fill,
        aten.fill.Scalar: lambda x, value: torch.full(x.shape, value, dtype=x.dtype, device=x.device),
        aten.lerp.Scalar: _lerp,
        aten.lerp.Tensor: _lerp,
        aten.remainder.Tensor: _remainder,
        aten.remainder.Scalar: _remainder,
        aten.softshrink.default: _softshrink,
        aten.hardshrink_backward.default: _shrink_backward,
        aten.softshrink_backward.default: _shrink_backward,
    }
    return {**get_decompositions(_NOT_CORE), **core_aten_decompositions(), **ours}


#: Pointwise ops that PyTorch decomposes into its core ops, though not with `core_aten_decompositions`.
_NOT_CORE = [
    aten.elu,
    aten.elu_backward,
    aten.leaky_relu,
    aten.leaky_relu_backward,
    aten.gelu,
    aten.gelu_backward,
    aten.hardswish_backward,
    aten.isinf,
]


def _lerp(start: torch.Tensor, end: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """``start + weight*(end - start)``, from the nearer end, in one multiply-add, as ATen computes it (native/Lerp.h)."""
    dtype = start.dtype
    if dtype in (torch.bfloat16, torch.float16):
        start, end = start.float(), end.float()
    weight = weight.to(start.dtype) if isinstance(weight, torch.Tensor) else torch.full_like(start, weight)
    is_small = weight.abs() < 0.5
    base, factor = torch.where(is_small, start, end), torch.where(is_small, weight, weight - 1)
    return torch.addcmul(base, factor, end - start).to(dtype)


def _remainder(a: torch.Tensor, b: torch.Tensor | float) -> torch.Tensor:
    """What is left of a division, with the sign of the divisor, as ATen computes it (native/cpu/BinaryOpsKernel.cpp)."""
    dtype = torch.result_type(a, b)
    if dtype in (torch.bfloat16, torch.float16):
        b = b if isinstance(b, torch.Tensor) else torch.full((), b, device=a.device)
        a, b = a.float(), b.to(dtype).float()
    rest = torch.fmod(a, b)
    is_opposite = (rest < 0) != (b < 0)
    return torch.where((rest != 0) & is_opposite, rest + b, rest).to(dtype)


def _softshrink(x: torch.Tensor, lambd: float = 0.5) -> torch.Tensor:
    """``x`` moved towards zero by ``lambd``, with one rounding."""
    dtype = x.dtype
    if dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    return torch.where(x > lambd, x - lambd, torch.where(x < -lambd, x + lambd, x * 0)).to(dtype)


def _shrink_backward(gradient: torch.Tensor, x: torch.Tensor, lambd: float = 0.5) -> torch.Tensor:
    """The gradient of `hardshrink` and of `softshrink`: none between ``-lambd`` and ``lambd``."""
    return torch.where((x >= -lambd) & (x <= lambd), torch.zeros_like(gradient), gradient)


def _masked_fill(x: torch.Tensor, mask: torch.Tensor, value: float | torch.Tensor) -> torch.Tensor:
    """``masked_fill(x, mask, value) -> where(mask, value, x)``, which is of x's dtype and shape only if the mask is no larger."""
    if torch.broadcast_shapes(x.shape, mask.shape) != x.shape:
        return NotImplemented
    return torch.where(mask, torch.full_like(x, value) if not isinstance(value, torch.Tensor) else value.to(x.dtype), x)


def _masked_put(
    x: torch.Tensor, indices: Sequence[torch.Tensor | None], value: torch.Tensor, accumulate: bool = False
) -> torch.Tensor:
    """``grad[mask] = 0 -> where(mask, 0, grad)``: one mask of x's shape, and one number for all that it picks."""
    (mask, *others) = indices
    if others or accumulate or mask is None or mask.dtype != torch.bool or mask.shape != x.shape or value.dim() > 0:
        return NotImplemented
    return torch.where(mask, value.to(x.dtype), x)


def _truncating_div(a: torch.Tensor, b: torch.Tensor, *, rounding_mode: str | None) -> torch.Tensor:
    """``div(a, b, rounding_mode="trunc") -> trunc(a/b)``, where that is what eager computes bit for bit."""
    if rounding_mode == "trunc" and torch.result_type(a, b) in (torch.float32, torch.float64):
        return torch.trunc(a / b)
    return NotImplemented


def make_graph(function, operands, decompositions) -> fx.GraphModule:  # type: ignore[no-untyped-def]
    try:
        gm = make_fx(function, decomposition_table=decompositions)(*operands)
    except RuntimeError as error:
        raise Reject(f"autograd cannot differentiate one step alone: {str(error).splitlines()[0]}") from error
    if any(_writes(n) for n in gm.graph.nodes):
        gm = _without_writes(gm, operands, decompositions)
    simplify(gm)
    return gm


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _without_writes(gm: fx.GraphModule, operands: Sequence[torch.Tensor], decompositions: dict) -> fx.GraphModule:  # type: ignore[type-arg]
    """``u = 1 + x; u.pow_(2)  ->  u = 1 + x; v = u.pow(2)``: a surrogate's backward, or autograd, may write into its temporaries.

    This is PyTorch's own functionalization, over a graph that autograd is no longer part of.
    """
    function = torch.func.functionalize(_UnwrappingInterpreter(gm).run, remove="mutations")
    new = make_fx(function, decomposition_table=decompositions)(*operands)
    if any(_writes(n) for n in new.graph.nodes):
        raise Reject("the step writes into one of its operands")
    return new


class StepInterpreter(fx.Interpreter):
    """Runs a torch-level step graph under `make_fx` and gives the ATen nodes the user's names."""

    def run_node(self, n: fx.Node):  # type: ignore[no-untyped-def]
        with under(regions(n)):
            result = super().run_node(n)
        if n.op in ("call_function", "call_method"):
            _name_result(result, n)
        return result


class _UnwrappingInterpreter(fx.Interpreter):
    """Runs an ATen graph under functionalization and keeps the names its nodes have."""

    def run_node(self, n: fx.Node):  # type: ignore[no-untyped-def]
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and torch._is_functional_tensor(result):
            torch._sync(result)
            _name_result(torch._from_functional_tensor(result), n)
        return result


def _name_result(result: object, n: fx.Node) -> None:
    mode = get_proxy_mode()
    if mode is None or not isinstance(result, torch.Tensor):
        return
    slot = get_proxy_slot(result, mode.tracer, None)
    if slot is not None:
        node = slot.proxy.node
        node.meta.setdefault("user_name", n.meta.get("user_name") or base_name(n.name))
        node.meta.setdefault("user_trace", n.meta.get("user_trace") or n.meta.get("stack_trace", ""))


def name_nodes(gm: fx.GraphModule, names: Sequence[str]) -> None:
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        node.meta["user_name"] = name


# ----------------------------------------------------------------------------------------------------- simplification


def simplify(gm: fx.GraphModule) -> None:
    """Erase identities, fold repeats (CSE) and dead nodes. Values are never re-associated: arithmetic stays eager's."""
    for node in list(gm.graph.nodes):
        if node.op == "get_attr":
            _inline_constant(gm, node)
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
        elif _is_identity(node):
            source = node.args[0]
            source.meta.setdefault("user_name", node.meta.get("user_name")) if node.meta.get("user_name") else None
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
    _fold_repeats(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _inline_constant(gm: fx.GraphModule, node: fx.Node) -> None:
    """A 0-d tensor constant (autograd's ``where(mask, grad, 0.)``) -> ``full([], 0.)``"""
    value = getattr(gm, str(node.target), None)
    if not isinstance(value, torch.Tensor) or value.dim() != 0 or value.dtype.is_complex:
        return
    with gm.graph.inserting_before(node):
        options = {"dtype": value.dtype, "device": value.device}
        new = gm.graph.call_function(aten.full.default, ([], value.item()), options)
    new.meta = {**node.meta, "val": value}
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _is_identity(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    source, result = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(source, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    if source.shape != result.shape or source.dtype != result.dtype:
        return False
    return node.target in IDENTITIES or node.target is aten._to_copy.default


def _fold_repeats(graph: fx.Graph) -> None:
    seen: dict[object, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        # repr, because 1, 1.0 and True are equal as keys and 0.0 equals -0.0
        key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


# -------------------------------------------------------------------------------------------------------- verification


def check_pointwise(gm: fx.GraphModule, shape: Sequence[int]) -> None:
    """Every value has the recurrence's shape, or is a 0-d constant."""
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            raise Reject("the step holds a tensor constant of its own", node=node.name)
        value = node.meta.get("val")
        if node.op == "call_function":
            if not isinstance(value, torch.Tensor):
                raise Reject(f"{node.target} does not give a tensor", node=node.name)
            if tuple(value.shape) not in (tuple(shape), ()):
                raise Reject(
                    f"{node.target} gives a value of shape {tuple(value.shape)} in a loop over {tuple(shape)}: "
                    "it is not pointwise",
                    node=node.name,
                )
            if value.dtype.is_complex:
                raise Reject(f"complex dtype {value.dtype} has no kernel", node=node.name)


def _check_step(step: fx.GraphModule, carries: Sequence[Carry]) -> None:
    results = next(iter(reversed(step.graph.nodes))).args[0]
    for result, carry in zip(results, carries, strict=False):
        value = result.meta["val"]
        if value.dtype != carry.dtype:
            raise Reject(
                f"state '{carry.name}' enters the step as {carry.dtype} and leaves it as {value.dtype}",
                hint=f"give '{carry.name}' its final dtype before the loop",
            )
