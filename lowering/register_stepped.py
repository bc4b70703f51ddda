"""The custom ops of a `SteppedRecurrence`, named by content like those of `lowering/registration.py`.

    snn_compile::stepped_<hash>(inits, xs, consts, steps) -> (ys, finals, history, residuals)
    snn_compile::stepped_<hash>_backward(inits, xs, consts, history, residuals, cotangents, steps) -> gradients

`history` (states after each step) and `residuals` (results of calls) are there where a gradient is wanted, for the backward
op alone. Sizes are part of the name: the step's graph holds them.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, fx

from snn_compile.ir.stepped import SteppedRecurrence
from snn_compile.lowering.by_channel import runs_by_channel
from snn_compile.lowering.channels_last import is_channels_last
from snn_compile.lowering.launch import Direct
from snn_compile.lowering.registration import (
    GENERATOR_VERSION,
    NAMESPACE,
    Derivative,
    TargetFor,
    canonical_text,
    define_differentiable,
    define_once,
    define_op,
    kept_operands,
    one_or_tuple,
    overload,
    signature_texts,
)
from snn_compile.lowering.stepped import (
    allocate_stepped,
    allocate_stepped_gradients,
    device_of,
    kept_for_backward,
    kept_results,
    run_stepped,
    run_stepped_backward,
)


def register_stepped(r: SteppedRecurrence, target_for: TargetFor) -> torch._ops.OpOverload:
    """Define the op once per process and give its overload."""
    name = f"stepped_{content_hash(r)}"
    return define_once(name, lambda: _define(name, r, target_for))


def content_hash(r: SteppedRecurrence) -> str:
    parts = [str(GENERATOR_VERSION), *signature_texts(r)]
    parts += [canonical_text(g) + _shapes(g) for g in (r.step, r.step_backward) if g is not None]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _shapes(gm: fx.GraphModule) -> str:
    """And the order of channels: batch norms add up by it."""
    values = [n.meta["val"] for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return repr([(tuple(v.shape), v.dim() > 1 and is_channels_last(v)) for v in values])


def _define(name: str, r: SteppedRecurrence, target_for: TargetFor) -> None:
    n_operands = len(r.carries) + len(r.xs) + len(r.consts)
    n_results = len(r.ys) + len(r.finals)
    n_kept = len(r.history) + r.n_residuals
    n_given = n_results + len(kept_results(r))
    operands = ", ".join(f"Tensor a{i}" for i in range(n_operands))

    schema = f"({operands}, SymInt steps) -> ({', '.join(['Tensor'] * n_given)})"

    def run(*a: Any) -> Tensor | tuple[Tensor, ...]:
        return one_or_tuple(run_stepped(r, target_for(a[0].device), a[:-1], a[-1]))

    def fake(*a: Any) -> Tensor | tuple[Tensor, ...]:
        return one_or_tuple(allocate_stepped(r, a[:-1], a[-1]))

    direct = _direct(r, target_for)
    if r.backward is None:
        r.direct["forward"] = define_op(name, schema, run, fake, direct)
        return
    n_cts = sum(r.differentiable)
    n_saved = n_operands + n_kept
    n_grads = sum(r.needs_grad)
    optional = ", ".join(f"Tensor? a{i}" for i in range(n_operands))
    kept = "".join(f", Tensor k{i}" for i in range(n_kept))
    cts = "".join(f", Tensor? g{i}" for i in range(n_cts))

    def run_backward(*a: Any) -> Tensor | tuple[Tensor, ...]:
        target = target_for(device_of(a))
        return one_or_tuple(run_stepped_backward(r, target, a[:n_operands], a[n_operands:n_saved], a[n_saved:-1], a[-1]))

    r.direct["backward"] = define_op(
        f"{name}_backward",
        f"({optional}{kept}{cts}, SymInt steps) -> ({', '.join(['Tensor'] * n_grads)})",
        run_backward,
        lambda *a: one_or_tuple(allocate_stepped_gradients(r, a[:n_operands], a[n_operands:n_saved], a[-1])),
        direct,
    )
    r.direct["forward"] = define_differentiable(name, schema, run, fake, _derivative(name, r, n_results), direct)
    kept_operands[name] = r.reads


def _direct(r: SteppedRecurrence, target_for: TargetFor) -> Direct | None:
    """What answers calls that run channel by channel; others have more to do in a call."""
    target = target_for(r.meta["device"])
    return target.direct(NAMESPACE) if runs_by_channel(r.forward, target) else None


def _derivative(name: str, r: SteppedRecurrence, n_results: int) -> Derivative:
    needs_grad, differentiable = r.needs_grad, r.differentiable
    backward_op = overload(f"{name}_backward")

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        output = output if isinstance(output, (tuple, list)) else (output,)
        operands = [o if read else None for o, read in zip(inputs, r.reads, strict=False)]
        ctx.save_for_backward(*operands, *kept_for_backward(r, output))
        ctx.steps = inputs[-1]
        ctx.set_materialize_grads(False)
        fixed = [o for o, d in zip(output, differentiable, strict=False) if not d]
        ctx.mark_non_differentiable(*fixed, *output[n_results:])

    def backward(ctx, *cotangents):  # type: ignore[no-untyped-def]
        wanted = [c for c, d in zip(cotangents, differentiable, strict=False) if d]
        if all(c is None for c in wanted):
            return (*(None,) * len(needs_grad), None)
        gradients = backward_op(*ctx.saved_tensors, *wanted, ctx.steps)
        rest = iter(gradients if isinstance(gradients, (tuple, list)) else (gradients,))
        return (*(next(rest) if needed else None for needed in needs_grad), None)

    return setup_context, backward
