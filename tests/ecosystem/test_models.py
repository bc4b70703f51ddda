"""Other people's code, unmodified: equal to eager, forward bit for bit, and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from snn_compile.backend import snn
from snn_compile.explain import explain
from tests.ecosystem.models import Model, models

FOUND = {str(m): m for m in models()}


def results(module: nn.Module, x: torch.Tensor, run):  # type: ignore[no-untyped-def]
    out = run(x)
    out = out if isinstance(out, tuple) else (out,)
    wanted = [o for o in out if o.requires_grad]
    weights = [torch.linspace(0.5, 1.5, o.numel()).view(o.shape) for o in wanted]
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return out, torch.autograd.grad(wanted, leaves, weights, allow_unused=True)


def both(model: Model):  # type: ignore[no-untyped-def]
    """(eager, compiled): values and gradients."""
    made = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module, x = model.make(), model.inputs()
        made.append(results(module, x, torch.compile(module, backend=snn, options={"step_from": 4}) if compiled else module))
    return made


@pytest.mark.skipif(not FOUND, reason="no other library is installed (pip install --no-deps snntorch spikingjelly norse sinabs)")
@pytest.mark.parametrize("name", FOUND)
def test_model(name):
    model = FOUND[name]
    torch._dynamo.reset()
    (values, gradients), (got, got_gradients) = both(model)
    for a, b in zip(values, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=model.atol)
    for a, b in zip(gradients, got_gradients, strict=True):
        if a is not None or b is not None:
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * max(1e-6, float(a.abs().max())))
    torch._dynamo.reset()
    torch.manual_seed(0)
    found = explain(model.make(), step_from=4)(model.inputs())
    compiled = [*found.recurrences, *found.stepped]
    assert len(compiled) >= model.recurrences, str(found)
    if model.reason:
        assert not compiled, f"'{name}' is compiled now: say so in tests/ecosystem/models.py"
