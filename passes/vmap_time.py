"""A step that `torch.vmap` can batch over time: the second way of `passes/batch_time`, for ops without a rule of their own.

    for t: y[t] = einsum("bij,bjk->bik", a[t], w)      ->      y = vmap(step, in_dims=0)(a)      (traced: one batched matmul)

Time becomes a new leading dim instead of a part of the batch dim, so that the step may do with its batch whatever it likes
(sums over it, views, permutations, attention). What is inlined is what vmap computes, as ATen ops.

Does not fire: writes, regions and surrogates (which cannot be batched as they are), sizes that are not known, ops that vmap
has no rule for.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from snn_compile.errors import Reject
from snn_compile.ir.loop import Loop
from snn_compile.ir.values import example
from snn_compile.passes.autocast_regions import regions, switched_off, under
from snn_compile.passes.inline import Inliner


def vmap_time(gm: fx.GraphModule, call: fx.Node, loop: Loop) -> list[fx.Node]:
    """Time series ``[T, ...]`` of the body's results (next carries, values), inserted before `call`. Raises `Reject`."""
    n = len(loop.carries)
    operands = list(call.args[n:])
    examples = [example(a) for a in operands]
    if any(not isinstance(s, int) for e in examples if isinstance(e, torch.Tensor) for s in e.shape):
        raise Reject("torch.vmap: sizes that are not known")
    if any(node.op == "get_attr" for node in loop.body.graph.nodes):
        raise Reject("torch.vmap: it holds a surrogate or a region")
    in_dims = tuple([0] * len(loop.xs) + [None] * len(loop.consts))

    def step(*values: object) -> Sequence[object]:
        return _MarkingDetached(loop.body).run(*[None] * n, *values)  # type: ignore[no-any-return]

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")  # an op without a batching rule is run step by step, with a warning: no gain
            traced = make_fx(torch.vmap(step, in_dims, randomness="different"))(*examples)
    except Exception as error:  # whatever vmap cannot do stays per step: the ways in which it says so are its own
        raise Reject(f"torch.vmap: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    for node in traced.graph.find_nodes(op="call_function", target=DETACHED):
        node.target = torch.ops.aten.detach.default
    _materialise_written(traced.graph)
    with gm.graph.inserting_before(call):
        where = switched_off(loop.body.graph.nodes)  # (casts are among what was traced)
        results: Sequence[fx.Node] = Inliner(traced, gm, call, where=where).inline(operands)
    return list(results)


#: Ops that copy their first operand and write into the copy.
_WRITING = ("index_add", "index_copy", "index_fill", "index_put", "index_reduce", "masked_scatter", "put", "scatter")


def _materialise_written(graph: fx.Graph) -> None:
    """``index_add(zeros.expand(T, N), ...)``: a copy of its own memory first. Inductor (2.11 to 2.15) lays its copy out like the
    operand, with all steps in one place, and adds all of them there.
    """
    for node in [n for n in graph.nodes if n.op == "call_function"]:
        operand = node.args[0] if node.args else None
        value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
        name = getattr(node.target, "__name__", "").split(".")[0]
        if isinstance(value, torch.Tensor) and name.startswith(_WRITING) and 0 in value.stride():
            with graph.inserting_before(node):
                copy = graph.call_function(torch.ops.aten.clone.default, (operand,), {"memory_format": torch.contiguous_format})
            node.update_arg(0, copy)


# ------------------------------------------------------------------------------------------------------------ detached

# What is traced under vmap is below autograd, where a `detach` is just a view, and has been recorded as one (`aten.alias`, torch
# 2.15): autograd would differentiate through it. It is marked by an op of ours, and is a `detach` again in what was traced.
_NAME = "snn_compile::detached"
torch.library.define(_NAME, "(Tensor x) -> Tensor")
torch.library.impl(_NAME, "CompositeExplicitAutograd", torch.clone)
torch.library.register_fake(_NAME, torch.empty_like)
torch.library.register_vmap(_NAME, lambda info, in_dims, x: (DETACHED(x), in_dims[0]))
DETACHED: torch._ops.OpOverload = torch.ops.snn_compile.detached.default


class _MarkingDetached(fx.Interpreter):
    def run_node(self, n: fx.Node) -> object:
        with under(regions(n)):
            return super().run_node(n)

    def call_method(self, target, args, kwargs):  # type: ignore[no-untyped-def]
        return DETACHED(*args) if target == "detach" else super().call_method(target, args, kwargs)

    def call_function(self, target, args, kwargs):  # type: ignore[no-untyped-def]
        detaches = (torch.detach, torch.Tensor.detach, torch.ops.aten.detach.default)
        return DETACHED(*args) if target in detaches else super().call_function(target, args, kwargs)
