"""What eager gives as tensors of their own, the compiled function does, too."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("fresh")


def steps(x):
    v, vs = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v = v * 0.5 + x[t]
        v = torch.where(v > 1, v * 0.0, v)
        vs.append(v)
    return vs


def last(x):
    vs = steps(x)
    return torch.stack(vs), vs[-1]


def twice(x):
    vs = steps(x)
    return torch.stack(vs), torch.stack(vs)


def part(x):
    vs = steps(x)
    return torch.stack(vs), torch.stack(vs[2:])


def two_parts(x):
    vs = steps(x)
    return torch.stack(vs[2:]), vs[-1], vs[3].unsqueeze(0)


def of_a_spike(x):
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v = v * 0.5 + x[t]
        out.append((v > 1.0).float())
    return torch.stack(out, 1), out[-1], v


@pytest.mark.parametrize("wants_grad", (False, True), ids=("no gradient", "gradient"))
@pytest.mark.parametrize("function", (last, twice, part, two_parts, steps, of_a_spike), ids=lambda f: f.__name__)
def test_apart(function, wants_grad):
    x = torch.rand(6, 3, 4, requires_grad=wants_grad)
    expected = [r.detach().clone() for r in function(x)]
    results = torch.compile(function, backend="snn", fullgraph=True)(x)
    held = [r.untyped_storage().nbytes() for r in function(x)]
    for i, (result, value) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, value) and not result._is_view() and result.untyped_storage().nbytes() == held[i]
        result.detach().fill_(7.0)  # reaches no other
        result.detach_()


def views_of_one(x):
    y = torch.stack(steps(x))
    return y, y[1:], y.detach()


def test_what_is_one_in_eager_stays_one():
    y, later, detached = torch.compile(views_of_one, backend="snn", fullgraph=True)(torch.rand(6, 3, 4))
    y.fill_(7.0)
    assert (later == 7.0).all() and (detached == 7.0).all()
