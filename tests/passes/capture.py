"""Dynamo's graph of a function, and the one check of a pass: the graph means the same before and after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from snn_compile.errors import Rejection
from snn_compile.ir.loop import Loop, loop_calls, verify
from snn_compile.lowering.candidates import is_pointwise_op
from snn_compile.passes.classify import classify
from snn_compile.passes.functionalize import functionalize
from snn_compile.passes.hoist_creations import hoist_creations
from snn_compile.passes.reroll import reroll


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad / (1.0 + u.abs()).square()


@dataclass
class Captured:
    gm: fx.GraphModule
    inputs: Sequence[object]

    def targets(self) -> list[object]:
        return [n.target for n in self.gm.graph.nodes if n.op in ("call_function", "call_method", "call_module")]

    def loops(self) -> list[tuple[fx.Node, Loop]]:
        return loop_calls(self.gm)

    def run(self) -> tuple[list[object], list[Tensor | None], list[object]]:
        """Outputs, gradients of the inputs, and the inputs as the graph leaves them."""
        leaves = [_leaf(i) for i in self.inputs]
        # a leaf that wants a gradient may not be written into: the graph gets a value of it
        given = [x.clone() if isinstance(x, Tensor) and x.requires_grad else x for x in leaves]
        outputs = list(self.gm(*given))
        wanted = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        sources = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        gradients: list[Tensor | None] = []
        if wanted and sources:
            weights = [torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view(o.shape) for o in wanted]
            gradients = list(torch.autograd.grad(wanted, sources, weights, allow_unused=True))
        return outputs, gradients, given

    def check(self, rewrite: Callable[[fx.GraphModule], object], rtol: float = 0.0) -> object:
        """Apply `rewrite`; outputs and written inputs are equal (to `rtol`), gradients to rounding."""
        before = self.run()
        result = rewrite(self.gm)
        self.gm.graph.lint()
        self.gm.recompile()
        for _, loop in self.loops():
            verify(loop)
        after = self.run()
        for which, tolerance in ((0, rtol), (2, rtol), (1, max(rtol, 1e-5))):
            for a, b in zip(before[which], after[which], strict=True):
                if isinstance(a, Tensor) and isinstance(b, Tensor):
                    torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, equal_nan=True)
                elif a is None or b is None:  # no gradient is one of zeros
                    assert all(not v.any() for v in (a, b) if v is not None)
                else:
                    assert a == b
        return result


def _leaf(value: object) -> object:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def capture(function: Callable[..., object], *inputs: object, dynamic: bool = False) -> Captured:
    """What a backend gets for ``function(*inputs)``."""
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, _: object) -> Callable[..., object]:
        def run(*given: object) -> object:
            found.append(Captured(gm, given))
            return gm.forward(*given)

        return run

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    (captured,) = found
    return captured


def reroll_all(gm: fx.GraphModule, min_steps: int = 2) -> tuple[list[Loop], list[Rejection]]:
    """What comes before `reroll`, and `reroll` with every loop accepted."""
    functionalize(gm)
    hoist_creations(gm)
    return reroll(gm, lambda loop: None, min_steps)


def rerolled(function: Callable[..., object], *inputs: object) -> Captured:
    captured = capture(function, *inputs)
    loops, rejections = captured.check(reroll_all)
    assert loops, [str(r) for r in rejections]
    return captured


def infos(loop: Loop):
    return classify(loop, is_pointwise_op)


def x(steps: int = 6, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(steps)
    return (torch.randn(steps, *(shape or (3, 5)), generator=generator) + 0.5).requires_grad_()
