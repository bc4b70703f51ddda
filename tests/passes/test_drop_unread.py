"""What nobody wants of a step is neither carried nor read; what somebody does is."""

import torch

from tests.passes.capture import rerolled, x


def loop_of(function, *inputs):
    ((_, loop),) = rerolled(function, *inputs).loops()
    return loop


def in_vain(a, b, w, traced):
    v, trace, out = torch.zeros_like(a[0]), torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        _ = v.t() * w, b[t] * 2.0  # nobody reads them
        trace = trace * 0.9 + v
        v = 0.9 * v + a[t]
        out.append(v)
    return torch.stack(out), *((trace,) if traced else ())


def inputs():
    return x(6, 3, 5), x(6, 3, 5) * 0.5, torch.rand(3)


def test_states_series_and_constants_that_nobody_wants_are_gone():
    loop = loop_of(lambda a, b, w: in_vain(a, b, w, False), *inputs())
    assert [len(specs) for specs in (loop.carries, loop.xs, loop.consts, loop.ys)] == [1, 1, 0, 1]


def test_a_state_whose_last_value_is_wanted_stays():
    loop = loop_of(lambda a, b, w: in_vain(a, b, w, True), *inputs())
    assert [carry.is_result for carry in loop.carries].count(True) == 1 and len(loop.carries) == 2
    assert [len(specs) for specs in (loop.xs, loop.consts)] == [1, 0]


def test_states_that_only_feed_each_other_are_gone():
    def function(a):
        v, u, w, out = torch.zeros_like(a[0]), torch.ones_like(a[0]), torch.ones_like(a[0]), []
        for t in range(a.shape[0]):
            u, w = 0.5 * w + v, 0.25 * u
            v = 0.9 * v + a[t]
            out.append(v)
        return torch.stack(out)

    assert len(loop_of(function, x(6, 3, 5)).carries) == 1


def test_random_numbers_are_drawn_all_the_same():
    def function(a, p):
        v, out = torch.zeros_like(a[0]), []
        for t in range(a.shape[0]):
            torch.bernoulli(p)
            v = 0.9 * v + a[t]
            out.append(v)
        return torch.stack(out)

    (_, loop), *_ = rerolled(function, x(6, 3, 5), torch.rand(3, 5)).loops()
    assert len(loop.consts) == 1 and any(n.target is torch.bernoulli for n in loop.body.graph.nodes)
