import numpy as np
import torch

from snn_compile.config import Config
from snn_compile.passes.hoist_creations import hoist_creations
from snn_compile.pipeline import run_pipeline
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


def constants_in_every_step(a):
    v = torch.zeros_like(a[0])
    for t in range(a.shape[0]):
        weights = torch.arange(5) + 1.0
        v = v * torch.tensor(0.5) + a[t] * weights
    return v


def test_equal_calls_without_tensors_are_one():
    captured = capture(constants_in_every_step, x())
    captured.check(hoist_creations)
    assert captured.targets().count(torch.arange) == 1 and captured.targets().count(torch.tensor) <= 1
    captured = capture(constants_in_every_step, x())
    _, report = captured.check(lambda gm: run_pipeline(gm, Config(strict=True)))
    assert report.recurrences[0].meta["steps"] == x().shape[0]


def test_functions_of_numpy_are_one_function():
    captured = capture(lambda a: a * np.prod((2, 3)) + np.prod((2, 3)) - np.prod((2, 4)), x())
    captured.check(hoist_creations)
    assert sum("prod" in str(t) for t in captured.targets()) == 2


def test_what_is_written_into_through_views_is_its_own():
    def f(a):
        first, second, third, fourth = (torch.zeros(5) for _ in range(4))
        first[2:].add_(a[0, 0, :3])
        second.view(5, 1).unbind(1)[0].copy_(a[0, 0])
        torch.add(a[0, 0], 1.0, out=third)
        return first * 1.0, second * 1.0, third * 1.0, fourth * 1.0

    captured = capture(f, x().detach())
    captured.check(hoist_creations)


def test_what_is_written_into_or_random_is_its_own():
    def f(a):
        first, second = torch.arange(5.0), torch.arange(5.0)
        first.add_(a[0, 0])
        return first, second, torch.rand(5) - torch.rand(5)

    captured = capture(f, x().detach())
    hoist_creations(captured.gm)
    assert captured.targets().count(torch.arange) == 2 and captured.targets().count(torch.rand) == 2
