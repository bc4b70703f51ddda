"""A view of the series that is made in every step is made once."""

import pytest
import torch

from snn_compile.passes.merge_views import merge_views
from tests.passes.capture import capture, reroll_all, x


def rewrite(gm):
    count = merge_views(gm.graph)
    loops, _ = reroll_all(gm)
    return count, loops


def loop_over(view):
    def function(a):
        v, out = torch.zeros(3, 5), []
        for t in range(6):
            v = v * 0.5 + view(a, t)
            out.append(v)
        return torch.stack(out)

    return function


VIEWS = {
    "transpose": lambda a, t: a.transpose(0, 1)[:, t],
    "permute": lambda a, t: torch.permute(a, (1, 0, 2))[:, t],
    "flip": lambda a, t: a.flip(0)[t],
    "view": lambda a, t: a.view(6, 15)[t].view(3, 5),
}


def test_a_part_that_all_steps_read_is_a_series():
    captured = capture(lambda noise: loop_over(lambda a, t: a[1][t])(noise), torch.randn(2, 6, 3, 5))
    count, loops = captured.check(rewrite)
    assert count == 5 and [loop.length for loop in loops] == [6]


def test_parts_of_single_steps_stay():
    captured = capture(loop_over(lambda a, t: a[t][0] + a[t][1]), torch.randn(6, 2, 3, 5))
    assert captured.check(rewrite)[0] == 0


@pytest.mark.parametrize("name", VIEWS)
def test_one_view_is_left_and_the_loop_is_found(name):
    captured = capture(loop_over(VIEWS[name]), x())
    count, loops = captured.check(rewrite)
    assert count == 5 and [loop.length for loop in loops] == [6]


def written_between(a):
    b = a * 1.0
    first = b.flip(0)
    b[0] = 7.0
    return first + b.flip(0)


def without_gradient(a):
    first = a.flip(0)
    with torch.no_grad():
        second = a.flip(0)
    return first * second


def other_arguments(a):
    return a.flip(0) + a.flip(1)


def result_written(a):
    first, second = a.reshape(6, 15) * 1.0, a.flip(0)
    second.add_(1.0)
    return first, second, a.flip(0)


@pytest.mark.parametrize(
    "function", [written_between, without_gradient, other_arguments, result_written], ids=lambda f: f.__name__
)
def test_near_misses(function):
    captured = capture(function, x())
    assert captured.check(lambda gm: merge_views(gm.graph)) == 0
