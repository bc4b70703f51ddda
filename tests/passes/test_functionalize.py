import torch

from snn_compile.passes.functionalize import functionalize, store
from snn_compile.passes.unroll import restore_writes
from tests.passes.capture import capture, x


def into_a_buffer(a):
    out = torch.zeros_like(a)
    for t in range(a.shape[0]):
        out[t] = a[t] * 2.0
    return out


def in_place_operators(a):
    v = torch.zeros_like(a[0])
    for t in range(a.shape[0]):
        v *= 0.5
        v += a[t]
        v.clamp_(max=1.0)
    return v


def masked_write(a):
    v = a[0] * 1.0
    v[v > 0.5] = 0.0
    return v


def no_grad_region(a):
    with torch.no_grad():
        threshold = a[0] * 0.1
    return a[1] - threshold


def test_a_written_buffer_is_a_chain_of_values():
    captured = capture(into_a_buffer, x())
    captured.check(functionalize)
    assert captured.targets().count(store) == 6


def test_in_place_operators_become_values():
    captured = capture(in_place_operators, x())
    captured.check(functionalize)
    assert not any(str(t).endswith("_") or "iadd" in str(t) or "imul" in str(t) for t in captured.targets())


def test_masked_write():
    capture(masked_write, x()).check(functionalize)


def test_a_no_grad_region_is_a_detach():
    captured = capture(no_grad_region, x())
    captured.check(functionalize)
    assert torch._C._set_grad_enabled not in captured.targets()


def test_writes_that_became_no_loop_are_written_again():
    captured = capture(into_a_buffer, x())

    def there_and_back(gm):
        functionalize(gm)
        restore_writes(gm, lambda node: False)

    captured.check(there_and_back)
    assert store not in captured.targets()


def near_miss_view_read_after_a_write(a):
    buffer = a * 1.0
    view = buffer[0]
    buffer[0] = 7.0
    return view + 1.0


def near_miss_write_into_the_input(a):
    a[0] = 1.0
    return a + 1.0


def near_miss_write_through_a_view(a):
    buffer = a * 1.0
    buffer[1].mul_(3.0)
    return buffer.sum()


def near_miss_no_grad_region_that_writes(a):
    count = torch.zeros(3, 5)
    with torch.no_grad():
        count += a[0]
    return a[1] + count


def test_near_misses_keep_their_meaning():
    for function in (
        near_miss_view_read_after_a_write,
        near_miss_write_through_a_view,
        near_miss_no_grad_region_that_writes,
    ):
        capture(function, x()).check(functionalize)
    captured = capture(near_miss_write_into_the_input, x().detach())
    captured.check(functionalize)
    assert store not in captured.targets(), "the caller's tensor must change"


def test_a_value_that_is_written_over_is_dropped():
    def f(x):
        v = torch.zeros(x.shape[0] + 1, *x.shape[1:])
        for t in range(x.shape[0]):
            v[t + 1] = v[t] * 0.5 + x[t]
            v[t + 1] = v[t + 1] * (v[t + 1] < 1)
        return v

    captured = capture(f, x(5, 3).detach())
    captured.check(functionalize)
    assert sum(n.target is store for n in captured.gm.graph.nodes) == 5


def test_a_value_that_is_read_before_it_is_written_over_stays():
    def f(x):
        v = torch.zeros_like(x)
        v[0] = x[0]
        copy = v * 2
        v[0] = x[1]
        return v, copy

    captured = capture(f, x(5, 3).detach())
    captured.check(functionalize)
    assert sum(n.target is store for n in captured.gm.graph.nodes) == 2
