import torch

from snn_compile.passes.hoist_creations import hoist_creations
from tests.passes.capture import capture, x


def two_zero_states(a):
    first = torch.zeros_like(a[0])
    y = a[0] + first
    second = a.new_zeros(3, 5)
    return y + second, torch.ones(5) * y


def test_equal_constants_are_made_once_and_first():
    captured = capture(two_zero_states, x())
    captured.check(hoist_creations)
    assert captured.targets().count(torch.full) == 2  # zeros [3, 5], ones [5]
    assert captured.targets()[:2] == [torch.full] * 2


def test_a_random_tensor_is_no_constant():
    captured = capture(lambda a: a + torch.rand(3, 5), x())
    hoist_creations(captured.gm)
    assert torch.rand in captured.targets() and torch.full not in captured.targets()
