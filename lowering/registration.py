"""One custom op a recurrence, with the ops of its forward and backward kernels, named by content.

    snn_compile::recurrence_<hash>(inits, xs, consts, steps) -> (ys, finals)

It stands in the graph that AOTAutograd gets, which replaces it by ``recurrence_<hash>_forward`` and differentiates it with
``recurrence_<hash>_backward``: what a compiled function calls are these two, without a layer of autograd in between.

PyTorch's FX-graph and AOTAutograd caches key on the *name* of an op, so the name holds a hash of the step, its backward, the
signature and the version of the generator: a changed surrogate formula is another op. One library fragment lives as long as
the process, because a cached overload must never outlive its library.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, fx

from snn_compile.ir.recurrence import Recurrence, Signature
from snn_compile.lowering.launch import (
    Direct,
    DirectCalls,
    Target,
    allocate_gradients,
    allocate_results,
    run_backward,
    run_forward,
)

NAMESPACE = "snn_compile"
#: Bump when generated code or the layout of results changes meaning: part of every op name, which caches go by.
GENERATOR_VERSION = 11

TargetFor = Callable[[torch.device], Target]
#: What an op does on tensors.
Op = Callable[..., Any]
#: ``setup_context, backward`` of a `torch.autograd.Function`
Derivative = tuple[Callable[..., Any], Callable[..., Any]]

library = torch.library.Library(NAMESPACE, "FRAGMENT")
_registered: dict[str, Recurrence] = {}
_defined: set[str] = set()
_lock = threading.Lock()


def content_hash(recurrence: Recurrence) -> str:
    """Hash of everything that decides what the op computes - not of names, places or shapes."""

    parts = [str(GENERATOR_VERSION), *signature_texts(recurrence)]
    parts.append(canonical_text(recurrence.step))
    parts.append(canonical_text(recurrence.backward) if recurrence.backward is not None else "")
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def signature_texts(signature: Signature) -> list[str]:
    """Everything of a signature but names."""

    def spec(item: object) -> str:
        return repr([(f.name, getattr(item, f.name)) for f in fields(item) if f.name != "name"])  # type: ignore[arg-type]

    return [";".join(map(spec, items)) for items in (signature.carries, signature.xs, signature.consts, signature.ys)]


def canonical_text(gm: fx.GraphModule) -> str:
    """The graph with numbered values, so that equal computations have equal text."""
    numbers: dict[fx.Node, str] = {}
    lines = []
    for n in gm.graph.nodes:
        numbers[n] = f"%{len(numbers)}"
        args = fx.node.map_arg((n.args, tuple(sorted(n.kwargs.items()))), numbers.__getitem__)
        dtype = getattr(n.meta.get("val"), "dtype", "")
        lines.append(f"{numbers[n]}:{dtype}={n.op}:{'' if n.op == 'placeholder' else n.target}{args}")
    return "\n".join(lines)


def register(recurrence: Recurrence, target_for: TargetFor) -> torch._ops.OpOverload:
    """Define the op once per process and give its overload."""
    name = f"recurrence_{content_hash(recurrence)}"

    def define() -> None:
        _define(name, recurrence, target_for)
        _registered[name] = recurrence

    return define_once(name, define)


def define_once(name: str, define: Callable[[], None]) -> torch._ops.OpOverload:
    """Run `define` where this process has no op of that name, and give the overload."""
    with _lock:
        if name not in _defined:
            define()
            _defined.add(name)
    return overload(name)


def registered() -> dict[str, Recurrence]:
    """All recurrences of this process by op name."""
    return dict(_registered)


def _define(name: str, recurrence: Recurrence, target_for: TargetFor) -> None:
    n_operands = len(recurrence.carries) + len(recurrence.xs) + len(recurrence.consts)
    n_results = len(recurrence.ys) + len(recurrence.finals)
    operands = ", ".join(f"Tensor a{i}" for i in range(n_operands))
    schema = f"({operands}, SymInt steps) -> ({', '.join(['Tensor'] * n_results)})"

    def run(*a: Any) -> Tensor | tuple[Tensor, ...]:
        return one_or_tuple(run_forward(recurrence, target_for(a[0].device), a[:-1], a[-1]))

    def fake(*a: Any) -> Tensor | tuple[Tensor, ...]:
        return one_or_tuple(allocate_results(recurrence, a[:-1], a[-1]))

    direct = target_for(recurrence.meta["device"]).direct(NAMESPACE) if "device" in recurrence.meta else None
    if recurrence.backward is None:
        recurrence.direct["forward"] = define_op(name, schema, run, fake, direct)
        return
    n_cts = len(recurrence.differentiable_ys) + sum(c.differentiable for c in recurrence.finals)
    n_grads = sum(recurrence.needs_grad)
    cts = "".join(f", Tensor? g{i}" for i in range(n_cts))
    recurrence.direct["backward"] = define_op(
        f"{name}_backward",
        f"({operands}{cts}, SymInt steps) -> ({', '.join(['Tensor'] * n_grads)})",
        lambda *a: one_or_tuple(run_backward(recurrence, target_for(a[0].device), a[:n_operands], a[n_operands:-1], a[-1])),
        lambda *a: one_or_tuple(allocate_gradients(recurrence, a[:n_operands], a[-1])),
        direct,
    )
    derivative = _derivative(name, recurrence)
    recurrence.direct["forward"] = define_differentiable(name, schema, run, fake, derivative, direct)
    kept_operands[name] = (True,) * n_operands


def is_kernel(node: fx.Node) -> bool:
    """Whether a node of a torch-level graph calls an op of ours."""
    return getattr(node.target, "namespace", "") == NAMESPACE


#: By op of this process that has a backward: which operands are kept for it.
kept_operands: dict[str, Sequence[bool]] = {}


def saved_operands(node: fx.Node) -> list[fx.Node]:
    """The operands of a kernel's call that autograd keeps."""
    name = node.target._schema.name.split("::")[1] if is_kernel(node) else ""  # type: ignore[union-attr]
    return [a for a, is_kept in zip(node.args, kept_operands.get(name, ()), strict=False) if is_kept and isinstance(a, fx.Node)]


_TAGS = [torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides]


def define_op(name: str, schema: str, run: Op, fake: Op, direct: Direct | None = None) -> DirectCalls | None:
    """An op of a compiled graph: no gradient passes it. Of tensors and a number of steps: `direct` answers what it can."""
    library.define(name + schema, tags=_TAGS)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    if direct is None:
        return None
    *tensors, _ = overload(name)._schema.arguments
    in_python = f"{name}_in_python"
    define_op(in_python, schema, direct.in_python(run, fake, len(overload(name)._schema.returns)), fake)
    return direct.define(name, f"{NAMESPACE}::{in_python}", [isinstance(a.type, torch.OptionalType) for a in tensors])


def define_differentiable(
    name: str, schema: str, run: Op, fake: Op, derivative: Derivative, direct: Direct | None = None
) -> DirectCalls | None:
    """An op for the graph that AOTAutograd gets, which replaces it by the op ``name_forward`` and what `derivative` calls.

    `torch.library.register_autograd` would leave its layer of Python in the compiled graph: 10 us a call.
    """
    calls = define_op(f"{name}_forward", schema, run, fake, direct)
    op = overload(f"{name}_forward")

    class Differentiable(torch.autograd.Function):
        forward = staticmethod(op)
        setup_context, backward = map(staticmethod, derivative)

    def decomposed(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return Differentiable.apply(*args)
        return op(*args)

    library.define(name + schema, tags=_TAGS)
    library.impl(name, decomposed, "CompositeImplicitAutograd")
    return calls


def overload(name: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def one_or_tuple(tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _derivative(name: str, recurrence: Recurrence) -> Derivative:
    needs_grad = recurrence.needs_grad
    is_series = [len(recurrence.carries) <= i < len(recurrence.carries) + len(recurrence.xs) for i in range(len(needs_grad))]
    differentiable = recurrence.differentiable
    backward_op = overload(f"{name}_backward")

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        ctx.save_for_backward(*inputs[:-1])
        ctx.steps = inputs[-1]
        ctx.set_materialize_grads(False)
        fixed = [o for o, d in zip(outputs, differentiable, strict=True) if not d]
        if fixed:
            ctx.mark_non_differentiable(*fixed)

    def backward(ctx, *cotangents):  # type: ignore[no-untyped-def]
        operands = ctx.saved_tensors
        wanted = [c for c, d in zip(cotangents, differentiable, strict=True) if d]
        if all(c is None for c in wanted):
            return (*(None,) * len(operands), None)
        gradients = backward_op(*operands, *wanted, ctx.steps)
        rest = iter(gradients if isinstance(gradients, (tuple, list)) else (gradients,))
        summed = [
            sum_to(next(rest), o, timed) if needed else None
            for o, needed, timed in zip(operands, needs_grad, is_series, strict=True)
        ]
        return (*summed, None)

    return setup_context, backward


def sum_to(gradient: Tensor, operand: Tensor, is_series: bool) -> Tensor:
    """Sum over the dims in which the operand was broadcast, and cast to its dtype.

    Operands are aligned at the right; of a time series the leading dim is time, and missing dims lie behind it.
    """
    missing = gradient.dim() - operand.dim()
    if missing:
        first = 1 if is_series else 0
        gradient = gradient.sum(list(range(first, first + missing)))
    dims = [d for d, (g, s) in enumerate(zip(gradient.shape, operand.shape, strict=True)) if s == 1 and g != 1]
    if dims:
        gradient = gradient.sum(dims, keepdim=True)
    return gradient.to(operand.dtype)
