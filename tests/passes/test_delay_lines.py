"""Tapped delay lines, in every way to move them on."""

import pytest
import torch

from snn_compile.passes.delay_lines import delay_lines
from snn_compile.passes.functionalize import functionalize
from snn_compile.passes.unwrap_steps import unwrap_steps
from tests.passes.capture import capture, reroll_all, x

STEPS, DELAYS = 9, 4


def put(line, a, at=0):
    line[at] = a
    return line


def put_last(line, a):
    line[..., -1] = a
    return line


def in_place(line, a):
    line[1:] = line[:-1].clone()
    line[0] = a
    return line


def _line(start, move, *taps):
    """``v = 0.5 v + x[t] + taps``, and the line is moved on by v."""

    def function(a):
        v, line, out = torch.zeros_like(a[0]), start(a), []
        for t in range(a.shape[0]):
            v = 0.5 * v + a[t]
            for tap in taps:
                v = v + 0.25 * tap(line)
            out.append(v)
            line = move(line, v)
        return torch.stack(out)

    return function


def zeros(a):
    return torch.zeros(DELAYS, *a.shape[1:])


def zeros_last(a):
    return torch.zeros(*a.shape[1:], DELAYS)


LINES = {
    "cat": _line(zeros, lambda d, a: torch.cat([a[None], d[:-1]]), lambda d: d[-1], lambda d: d[1]),
    "cat, the other way": _line(zeros, lambda d, a: torch.cat((d[1:], a.unsqueeze(0))), lambda d: d[0], lambda d: d.select(0, 2)),
    "cat, the last dim": _line(zeros_last, lambda d, a: torch.cat([a[..., None], d[..., :-1]], -1), lambda d: d[..., -1]),
    "cat, narrowed": _line(zeros, lambda d, a: torch.cat([a[None], d.narrow(0, 0, DELAYS - 1)]), lambda d: d[-2]),
    "cat, longer than it is": _line(zeros, lambda d, a: torch.cat([d, a[None]])[-DELAYS:], lambda d: d[0]),
    "roll": _line(zeros, lambda d, a: put(torch.roll(d, 1, 0), a), lambda d: d[-1], lambda d: d[0]),
    "roll, back": _line(zeros, lambda d, a: put(d.roll(-1, dims=0), a, -1), lambda d: d[0]),
    "roll, the last dim": _line(zeros_last, lambda d, a: put_last(torch.roll(d, shifts=-1, dims=-1), a), lambda d: d[..., 1]),
    "roll, by two": _line(zeros, lambda d, a: put(torch.roll(d, (2,), (0,)), a), lambda d: d[2], lambda d: d[3]),
    "roll, scattered": _line(zeros, lambda d, a: torch.select_scatter(d.roll(1, 0), a, 0, 0), lambda d: d[3]),
    "in place": _line(zeros, in_place, lambda d: d[-1]),
    "given": _line(lambda a: a[:DELAYS] * 2.0, lambda d, a: torch.cat([a[None], d[:-1]]), lambda d: d[-1]),
    "an input": _line(lambda a: a[:DELAYS], lambda d, a: torch.cat([a[None], d[:-1]]), lambda d: d[-1]),
}


def prepared(function, *inputs):
    captured = capture(function, *inputs)
    captured.check(functionalize)
    captured.check(unwrap_steps)
    return captured


@pytest.mark.parametrize("name", LINES)
def test_what_is_delayed_is_carried(name):
    captured = prepared(LINES[name], x(STEPS, 3, 5))
    captured.check(delay_lines)
    assert not {torch.cat, torch.roll, "roll"} & set(captured.targets())
    loops, _ = captured.check(reroll_all)
    assert [loop.length for loop in loops] == [STEPS] and len(loops[0].carries) in range(3, DELAYS + 2)


@pytest.mark.parametrize("move", (lambda d, a: torch.cat([a[None], d[:-1]]), lambda d, a: put(torch.roll(d, 1, 0), a), in_place))
@pytest.mark.parametrize("steps", (2, 9))
def test_what_is_left_of_a_line(move, steps):
    """Behind the last step it is the last results; or, of a short loop, some of what it was."""

    def f(a, line):
        line = line * 1.0
        for t in range(a.shape[0]):
            line = move(line, a[t] + 0.5 * line[1])
        return line, line[1:] * 2.0

    captured = prepared(f, x(steps, 3, 5), x(DELAYS, 3, 5))
    captured.check(delay_lines)
    assert not {torch.roll, "roll"} & set(captured.targets())
    assert sum(t in (torch.cat, torch.stack) for t in captured.targets()) <= 2


def test_near_misses():
    """A series that is moved once, a line that is read as a whole, written through a view, of parts of another line's steps."""

    def once(a):
        late = torch.cat([torch.zeros_like(a[:1]), a[:-1]])
        return sum(late[t] * t for t in range(a.shape[0])), torch.roll(a, 1, 0)[0] * 2.0

    def read_as_a_whole(a):
        line, out = torch.zeros(3, *a.shape[1:]), []
        for t in range(a.shape[0]):
            line = torch.cat([a[t][None], line[:-1]])
            out.append((line * 0.5).sum(0))
        return torch.stack(out)

    def written(a):
        line, out = torch.zeros(3, *a.shape[1:]), []
        for t in range(a.shape[0]):
            line = torch.cat([a[t][None], line[:-1]])
            line[1].view(-1).mul_(0.5)
            out.append(line[2] * 1.0)
        return torch.stack(out)

    def of_another_dtype(a):
        line, out = torch.zeros(3, *a.shape[1:], dtype=torch.float64), []
        for t in range(a.shape[0]):
            line = torch.cat([a[t][None], line[:-1]])
            out.append(line[2] * 1.0)
        return torch.stack(out)

    for function in (once, read_as_a_whole, written, of_another_dtype):
        captured = prepared(function, x(STEPS, 3, 5).detach())
        before = captured.targets()
        captured.check(delay_lines)
        assert captured.targets() == before, function.__name__


def test_gradients_go_where_they_went():
    """What is put in under `no_grad`, or read so, has none."""

    def f(a):
        line, out = torch.zeros(3, *a.shape[1:]), []
        for t in range(a.shape[0]):
            out.append(a[t] * line[1])
            with torch.no_grad():
                late = line[2]
                line = torch.cat([(a[t] * 2.0)[None], line[:-1]])
            out.append(a[t] + late)
        return torch.stack(out)

    prepared(f, x(STEPS, 3, 5)).check(delay_lines)
    capture(f, x(STEPS, 3, 5)).check(delay_lines)


def test_results_share_memory_as_they_did():
    def f(a):
        line = torch.zeros(3, *a.shape[1:])
        for t in range(a.shape[0]):
            line = torch.cat([a[t][None], line[:-1]])
        return line, line[0], line[1:2]

    def are_one(outputs):
        return len({o.untyped_storage().data_ptr() for o in outputs}) == 1

    captured = prepared(f, x(STEPS, 3, 5).detach())
    captured.check(delay_lines)
    assert are_one(f(x(STEPS, 3, 5))) and are_one(captured.run()[0])


def test_layouts_stay():
    """A result that is a step of a line along its last dim, and a `view` of what was put in transposed."""

    def f(a):
        first, last = torch.zeros(3, 3, 3), torch.zeros(3, 3, 3)
        for t in range(a.shape[0]):
            first = torch.cat([(a[t].t() * 2.0)[None], first[:-1]])
            last = torch.cat([a[t][..., None], last[..., :-1]], -1)
        return first[1].view(-1) * 1.0, first[2], last[..., 1], last

    captured = prepared(f, x(STEPS, 3, 3))
    before = [(o.stride(), o.dtype) for o in captured.run()[0]]
    captured.check(delay_lines)
    assert [(o.stride(), o.dtype) for o in captured.run()[0]] == before
