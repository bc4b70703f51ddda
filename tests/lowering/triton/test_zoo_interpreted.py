"""The whole zoo on Triton kernels: Dynamo, the pipeline, then the rewritten graph around kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch

from snn_compile.config import Config
from snn_compile.lowering import targets
from snn_compile.lowering.triton.target import TritonTarget
from snn_compile.pipeline import run_pipeline
from tests import zoo

#: Divides by Python numbers that are no powers of two: CUDA, and so the kernel, multiplies by their reciprocals.
DIVIDES_BY_NUMBERS = ("izhikevich",)


class _InterpretedTarget(TritonTarget):
    def missing(self) -> str | None:
        return None


def check_case(name: str, steps: int) -> None:
    case, target = zoo.CASES[name], _InterpretedTarget()
    targets._target = lambda kind: target  # type: ignore[assignment]
    torch._dynamo.reset()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    lowered = []

    def backend(gm, inputs, **_):  # type: ignore[no-untyped-def]
        gm, _ = run_pipeline(gm, Config(strict=True))
        lowered.extend(n for n in gm.graph.nodes if "recurrence_" in str(n.target))
        return gm.forward

    inputs = case.inputs(steps)
    expected, expected_gradients = _run(case.function, inputs)
    results, gradients = _run(torch.compile(case.function, backend=backend), inputs)
    assert len(lowered) >= case.recurrences
    tolerance = case.atol or (1e-6 if name in DIVIDES_BY_NUMBERS else 0.0)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=tolerance)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        if reference is None or gradient is None:
            assert not any(g is not None and g.any() for g in (gradient, reference))
            continue
        torch.testing.assert_close(gradient, reference, rtol=2e-5, atol=2e-5 * float(reference.abs().max()))


def _run(function, inputs):  # type: ignore[no-untyped-def]
    leaves = [i.clone().requires_grad_(i.is_floating_point()) for i in inputs]
    results = [o for o in torch.utils._pytree.tree_leaves(function(*leaves)) if isinstance(o, torch.Tensor)]
    wanted = [o for o in results if o.requires_grad]
    weights = [torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view(o.shape) for o in wanted]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    return results, torch.autograd.grad(wanted, leaves, weights, allow_unused=True) if wanted else []


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.CASES)
def test_case(interpreted, name):
    interpreted(check_case, name, 6)
