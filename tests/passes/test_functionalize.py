import operator
import random

import pytest
import torch

from snn_compile.passes.effects import is_write
from snn_compile.passes.functionalize import functionalize, store
from snn_compile.passes.unroll import restore_writes
from tests.passes.capture import capture, rerolled, x
from tests.zoo import FilledIn


def set_where(v, a):
    v[a > 1.0] = 0.5


def set_row(v, a):
    v[1] = a[0]


def set_column(v, a):
    v[:, 2] = a[:, 0]


def copy_column(v, a):
    v[..., 0] = v[..., 1] * 2.0


WRITES = (
    operator.iadd,
    operator.imul,
    operator.isub,
    lambda v, a: v.masked_fill_(a > 0.5, 0.25),
    lambda v, a: v.clamp_(min=-0.5),
    lambda v, a: torch.sigmoid_(v),
    lambda v, a: torch.nn.functional.leaky_relu(v, 0.5, inplace=True),
    set_where,
    set_row,
    set_column,
    copy_column,
    lambda v, a: v.copy_(a.double() * 3.0),
    lambda v, a: v.copy_(a > 0.5),
)


def writes_at_random(seed):
    """Writes through the names of two tensors, which change hands, and reads in between."""
    draw = random.Random(seed)
    kinds = [draw.choice((*WRITES, "read", "new", "rename")) for _ in range(12)]
    names = [draw.sample("vwu", 2) for _ in kinds]

    def f(a):
        value = {"v": a[0] * 1.0, "w": a[1] + 1.0, "u": a[2] - 1.0}
        seen = []
        for t, (kind, (name, other)) in enumerate(zip(kinds, names, strict=True)):
            if kind == "read":
                seen.append(value[name] * 2.0)
            elif kind == "new":
                value[name] = value[other] * 0.5
            elif kind == "rename":
                value[name] = value[other]
            else:
                kind(value[name], a[t % 6])
        return *seen, *(v + 0.0 for v in value.values())

    return f


@pytest.mark.parametrize("seed", range(40))
def test_writes_at_random(seed):
    captured = capture(writes_at_random(seed), x().detach())
    captured.check(functionalize)
    assert not any(is_write(n) for n in captured.gm.graph.nodes)


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


class Dirty(FilledIn):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u.clone())
        u.clamp_(max=0.5)
        return u * 2.0


@pytest.mark.parametrize(("function", "writes_left"), [(FilledIn, 0), (Dirty, 1)])
def test_the_forward_of_a_surrogate(function, writes_left):
    """A tensor of its own is written into by value; its operand is left alone."""
    captured = capture(lambda a: function.apply(a * 1.5) * a, x())
    children = list(captured.gm.children())
    before = [str(child.graph) for child in children]
    captured.check(functionalize)
    (call,) = (n for n in captured.gm.graph.nodes if n.target is torch.ops.higher_order.autograd_function_apply)
    forward = getattr(captured.gm, call.args[0].target)
    assert sum(map(is_write, forward.graph.nodes)) == writes_left
    assert [str(child.graph) for child in children] == before, "a graph that may be gone back to has changed"


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


def pieces_written_into(a):
    first, second = torch.cat([a[0], a[1]], 1).chunk(2, 1)
    one, other = torch.stack([a[2], a[3]])
    first.sigmoid_()
    other.mul_(3.0)
    return first * 1.0, second * 1.0, one * 1.0, other * 1.0


def test_pieces_of_a_tensor_are_no_names_of_it():
    captured = capture(pieces_written_into, x().detach())
    captured.check(functionalize)


def filled_with_a_tensor(a):
    """``torch.full(shape, tensor)`` is this in Dynamo's graph."""
    out = torch.empty(3, 5, dtype=torch.float64).fill_(a[0, 0, 0])
    out[1] = 2.0
    copied = torch.zeros(3, 5)
    copied.copy_(a[1])
    rounded = torch.zeros(3, 5, dtype=torch.int64)
    rounded.copy_(a[2] * 3.0)
    return out, copied * 2.0, rounded + 1


def test_a_tensor_is_filled_and_copied():
    captured = capture(filled_with_a_tensor, x())
    captured.check(functionalize)
    assert not any(is_write(n) for n in captured.gm.graph.nodes)


def reshaped(a):
    v, out = torch.zeros_like(a[0]).unsqueeze_(0), []
    for t in range(a.shape[0]):
        v = v * 0.5 + a[t].unsqueeze(0)
        out.append((v - 0.5).squeeze_(0))
    return torch.stack(out)


def reshaped_between_writes(a):
    v, out = torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        v = v * 0.5 + a[t]
        w = v * 2.0
        w.add_(1.0).unsqueeze_(-1).mul_(2.0).transpose_(0, 1)
        w.squeeze_(-1)
        out.append(w + v.t())
    return torch.stack(out), v


def reshaped_back(a):
    v, out = torch.zeros_like(a[0]), []
    for t in range(a.shape[0]):
        v = v * 0.5 + a[t]
        v.unsqueeze_(-1)
        s = v - 0.5
        v.squeeze_(-1)
        s.t_() if s.dim() == 2 else s.squeeze_(-1)
        out.append(s)
    return torch.stack(out)


@pytest.mark.parametrize("function", [reshaped, reshaped_between_writes, reshaped_back])
def test_what_is_reshaped_in_place_has_the_sizes_of_its_time(function):
    captured = rerolled(function, x())
    assert not any(is_write(n) for n in captured.gm.graph.nodes)
    for node in captured.gm.graph.find_nodes(op="call_function", target=torch.stack):
        assert not captured.loops(), f"{node} is left"


def accumulated_where_it_is(a):
    v, total = torch.zeros_like(a[0]), torch.tensor(0.0).to(a.device)
    for t in range(a.shape[0]):
        v = v * 0.5 + a[t]
        total += v.contiguous().sum()
    return total, v.to(a)


def test_a_conversion_that_changes_nothing_is_no_view():
    captured = rerolled(accumulated_where_it_is, x())
    assert not any(is_write(n) for n in captured.gm.graph.nodes)


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


def near_miss_scatter_into_the_input(a):
    return torch.select_scatter(a, a[0], 0, 1), a * 2.0


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
        near_miss_scatter_into_the_input,
    ):
        capture(function, x()).check(functionalize)
    captured = capture(near_miss_write_into_the_input, x().detach())
    captured.check(functionalize)
    assert store not in captured.targets(), "the caller's tensor must change"


@pytest.mark.parametrize("dim", (0, 1, -1))
def test_a_scatter_is_a_store(dim):
    def f(a):
        out = torch.zeros_like(a)
        for t in range(a.shape[dim]):
            out = torch.select_scatter(out, a.select(dim, t) * 2.0, dim, t)
        return out.select_scatter(a.select(dim, 0), dim, -1)

    captured = capture(f, x())
    captured.check(functionalize)
    assert captured.targets().count(store) == x().shape[dim] + 1 and torch.select_scatter not in captured.targets()


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
