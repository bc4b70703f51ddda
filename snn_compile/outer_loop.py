"""One warning where the time loop lies outside of the compiled function, so that there is no loop to compile."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from snn_compile.errors import Rejection

#: So many calls in a row must hand a result of the last call back in; that many calls are looked at.
FEEDBACKS, CALLS = 3, 64
STEPS = {"ge", "gt", "le", "lt", "heaviside", "autograd_function_apply"}

_warned = False


def holds_no_loop(loops: Sequence[object], rejections: Sequence[Rejection]) -> bool:
    """No loop was found, nor anything that repeats like the steps of one that was refused."""
    repeats = [re.match(r"(\d+) look-alike", r.reason) for r in rejections]
    return not loops and all(m is not None and int(m[1]) < 3 for m in repeats)


def feeds_back(gm: fx.GraphModule) -> bool:
    """Whether an input becomes a result of its shape through ops that keep the shape, a threshold among them."""
    outputs = set(gm.graph.output_node().all_input_nodes)
    return any(_is_state(n, outputs) for n in gm.graph.nodes if n.op == "placeholder")


def _is_state(start: fx.Node, outputs: set[fx.Node]) -> bool:
    shape = _shape(start)
    if not shape or isinstance(start.meta.get("example_value"), torch.nn.Parameter):
        return False
    found, frontier, fires = {start}, [start], False
    while frontier:
        for user in frontier.pop().users:
            if user not in found and (_shape(user) == shape or _fires(user)):
                found.add(user)
                frontier.append(user)
                fires |= _fires(user)
    return fires and bool((found - {start}) & outputs)


def _shape(node: fx.Node) -> tuple[object, ...] | None:
    value = node.meta.get("example_value")
    return tuple(map(str, value.shape)) if isinstance(value, Tensor) else None


def _fires(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    is_step = name in STEPS or "autograd" in name or name.endswith("_spike")
    return is_step and node.op in ("call_function", "call_method")


class OuterLoopWatch:
    """Calls `compiled`; warns once a process when its results keep coming back as its inputs."""

    def __init__(self, compiled: Callable[..., object]) -> None:
        self.compiled = compiled
        self.calls = self.feedbacks = 0
        self.last: list[weakref.ref[Tensor]] = []

    def __call__(self, *args: object) -> object:
        if self.calls >= CALLS or _warned:
            return self.compiled(*args)
        self.calls += 1
        last = [t for t in (r() for r in self.last) if t is not None]
        again = any(i is t for i in args for t in last)
        self.feedbacks = self.feedbacks + 1 if again else 0
        if self.feedbacks >= FEEDBACKS:
            _warn()
        out = self.compiled(*args)
        results = out if isinstance(out, (tuple, list)) else (out,)
        self.last = [weakref.ref(o) for o in results if isinstance(o, Tensor)]
        return out


def _warn() -> None:
    global _warned
    _warned = True
    warnings.warn(
        "snn_compile: the compiled function is called once per time step and gets its own state back, so it holds no "
        "time loop to compile. Compile the function that contains the loop: def run(x): for t in range(len(x)): "
        "s, v = step(x[t], v); ... and torch.compile(run, backend='snn').",
        stacklevel=3,
    )
