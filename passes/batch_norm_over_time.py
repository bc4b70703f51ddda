"""T batch norms in training mode, one a step, as one.

    for t: y[t] = batch_norm(x[t], mean, var, w, b, training=True)      ->      y = (x - E[x])/sqrt(Var[x] + eps)*w + b

with a mean and a variance for each step and channel, over batch and space of ``x [T, B, C, …]``. The running statistics are what
T updates ``r <- (1 - m)*r + m*s[t]`` leave: ``r <- (1 - m)^T*r + sum_t m*(1 - m)^(T-1-t)*s[t]``. Results agree with eager to
rounding: the sums are those of another algorithm.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from snn_compile.errors import Reject
from snn_compile.ir.values import example, hint, known_int


def batch_norm_over_time(  # type: ignore[no-untyped-def]
    steps,
    x,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    training=True,
    momentum=0.1,
    eps=1e-5,
):
    """`x [T*B, C, …]` -> normalised, of the same shape; updates the running statistics ``[C]``. Run on proxies."""
    space, count = example(x.node).dim() - 2, _count(x, steps)
    x = x.unflatten(0, (steps, -1))
    var, mean = torch.var_mean(x, (1, *range(3, 3 + space)), correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(var + eps)
    if weight is not None:
        y = y * weight.reshape(-1, *(1,) * space)
    if bias is not None:
        y = y + bias.reshape(-1, *(1,) * space)
    if running_mean is not None:
        share = [momentum * (1.0 - momentum) ** (steps - 1 - t) for t in range(steps)]
        for running, statistic, factor in ((running_mean, mean, 1.0), (running_var, var, count / (count - 1))):
            seen = statistic.detach().reshape(steps, -1) * factor * running.new_tensor([[s] for s in share])
            running.copy_(running * (1.0 - momentum) ** steps + seen.sum(0))
    return y.flatten(0, 1)


def _count(x, steps: int):  # type: ignore[no-untyped-def]
    """How many values ``x [T*B, C, …]`` has for each step and channel: a number, or a node where sizes are symbolic."""
    count = known_int(example(x.node).select(1, 0).numel())
    return (x.select(1, 0).numel() if count is None else count) // steps


def check_batch_norm(node: fx.Node, folded: set[fx.Node]) -> None:
    """Raises `Reject` where the batch norms of the steps cannot be one."""
    value = example(node.args[0])
    names = ("running_mean", "running_var", "weight", "bias")
    rest = [node.args[i + 1] if len(node.args) > i + 1 else node.kwargs.get(n) for i, n in enumerate(names)]
    others = [example(o) for o in rest if isinstance(o, fx.Node)]
    if node.args[0] not in folded or any(o in folded for o in rest) or not isinstance(value, Tensor):
        raise Reject("a batch norm has statistics or weights that change over the steps", node=node.name)
    if any(o.dtype != value.dtype for o in others):
        raise Reject("a batch norm of another dtype than its statistics", node=node.name)
    if hint(value.shape[0]) * (value.numel() // max(1, value.shape[0] * value.shape[1])) < 2:
        raise Reject("a batch norm over a single value", node=node.name)
    for running in rest[:2]:
        if isinstance(running, fx.Node) and len(running.users) > 1:
            raise Reject("running statistics that several batch norms of a step update in turn", node=node.name)
