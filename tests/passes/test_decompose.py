"""A custom op with a registered loop becomes that loop; the op's own gradient and the loop's agree."""

import pytest
import torch
from torch._dynamo.utils import counters

from snn_compile.decompositions import decomposition_of, register_decomposition
from snn_compile.passes.decompose import decompose
from snn_compile.passes.unwrap_steps import unwrap_steps
from tests.passes.capture import capture, reroll_all, x


@torch.library.custom_op("snn_test::leaky", mutates_args=())
def leaky_op(a: torch.Tensor, v: torch.Tensor, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    out = []
    for t in range(a.shape[0]):
        v = v * decay + a[t]
        out.append(v)
    return torch.stack(out), v.clone()


@leaky_op.register_fake
def _(a, v, decay):
    return torch.empty_like(a), torch.empty_like(v)


def _setup(ctx, inputs, output):
    ctx.decay = inputs[2]


def _backward(ctx, grad, grad_last):
    carry, grads = grad_last, []
    for t in reversed(range(grad.shape[0])):
        carry = carry + grad[t]
        grads.append(carry)
        carry = carry * ctx.decay
    return torch.stack(grads[::-1]), carry, None


leaky_op.register_autograd(_backward, setup_context=_setup)


def leaky(a, v, decay):
    out = []
    for t in range(a.shape[0]):
        v = v * decay + a[t]
        out.append(v)
    return torch.stack(out), v


@pytest.fixture(autouse=True)
def registered():
    register_decomposition("snn_test::leaky", leaky)


def test_the_op_becomes_its_loop():
    captured = capture(lambda a: leaky_op(a * 2.0, torch.zeros(3, 5), 0.5), x())
    count, refused = captured.check(decompose)
    assert (count, refused) == (1, [])
    loops, _ = captured.check(reroll_all)
    assert [loop.length for loop in loops] == [6]


def test_single_steps_lose_their_wrapping():
    def function(a):
        v, out = torch.zeros(3, 5), []
        for t in range(a.shape[0]):
            s, v = leaky_op(a[t].unsqueeze(0), v, 0.5)
            out.append(s[0])
        return torch.stack(out)

    captured = capture(function, x())
    captured.check(decompose)
    assert captured.check(unwrap_steps) >= 6
    loops, _ = captured.check(reroll_all)
    assert [loop.length for loop in loops] == [6]
    assert "unsqueeze" not in str(loops[0].body.graph)


def test_many_signatures():
    """Dynamo gives up on a function after eight; each decomposition is captured as a new one."""
    for n in range(2, 14):
        captured = capture(lambda a, n=n: leaky_op(a, torch.zeros(n), 0.5)[0], x(3, n))
        assert captured.check(decompose)[0] == 1


def test_symbolic_sizes_are_left_alone():
    captured = capture(lambda a: leaky_op(a, a[0] * 0.0, 0.5)[0], x(), dynamic=True)
    count, refused = captured.check(decompose)
    assert count == 0 and "sizes that are not known" in refused[0].reason


def test_further_sizes_of_a_batch(fresh):
    """The last batch of an epoch is smaller: Dynamo makes its size symbolic, and the op is its loop all the same."""
    compiled = torch.compile(lambda a: leaky_op(a, a[0] * 0.0, 0.5)[0], backend="snn")
    for batch in (3, 5, 4):
        counters.clear()
        a = torch.randn(6, batch, 5, requires_grad=True)
        y = compiled(a)
        assert counters["snn_compile"]["ops_decomposed"] == counters["snn_compile"]["recurrences_lowered"] == 1
        expected = leaky(a, a[0] * 0.0, 0.5)[0]
        assert torch.equal(y, expected)
        weights = torch.randn_like(y)
        (got,), (wanted,) = (torch.autograd.grad(o, a, weights) for o in (y, expected))
        torch.testing.assert_close(got, wanted)


def test_names():
    assert decomposition_of(torch.ops.snn_test.leaky.default) is leaky
    assert decomposition_of(torch.ops.snn_test.leaky) is leaky
    assert decomposition_of(torch.ops.aten.add.Tensor) is None
    with pytest.raises(TypeError, match="namespace::name"):
        register_decomposition("leaky", leaky)


def test_a_decomposition_that_declines_leaves_the_call():
    def only_elsewhere(a, v, decay):
        return NotImplemented if a.device.type == "cpu" else leaky(a, v, decay)

    register_decomposition("snn_test::leaky", only_elsewhere)
    captured = capture(lambda a, v: leaky_op(a, v, 0.5)[0], x(), torch.zeros(3, 5))
    before = captured.targets()
    assert captured.check(decompose) == (0, [])
    assert captured.targets() == before
