import torch

from snn_compile.passes.specialize import drop_unread_sizes, specialize_floats
from tests.passes.capture import Spike, capture, x


class Leak(torch.nn.Module):
    tau = 2.5

    def forward(self, a):
        return a[0] / self.tau + Spike.apply(a[1] - 1.0)


def test_floats_are_numbers_again():
    captured = capture(Leak(), x(), dynamic=True)
    captured.check(specialize_floats)
    numbers = [v for n in captured.gm.graph.nodes for v in n.args if isinstance(v, float)]
    assert 2.5 in numbers


def test_sizes_that_no_surrogate_reads_are_dropped():
    captured = capture(Leak(), x(), dynamic=True)
    specialize_floats(captured.gm)
    captured.check(drop_unread_sizes)
    (call,) = [n for n in captured.gm.graph.nodes if "autograd_function_apply" in str(n.target)]
    operands = [a.meta["example_value"] for a in call.args[2:]]
    assert all(isinstance(o, torch.Tensor) for o in operands)


def test_nothing_to_do():
    captured = capture(lambda a: a + 1.5, x())
    before = str(captured.gm.graph)
    captured.check(specialize_floats)
    captured.check(drop_unread_sizes)
    assert str(captured.gm.graph) == before
