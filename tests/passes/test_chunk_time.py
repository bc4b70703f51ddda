import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from snn_compile.backend import snn
from snn_compile.config import parse_options
from snn_compile.errors import OptionError
from snn_compile.passes import chunk_time as passes
from snn_compile.passes.chunk_time import chunk_length, chunk_time, held_by_eager, made_by_step
from tests.passes.capture import infos, rerolled, x


def layers(a, w):
    v, total, out, last = torch.zeros(3, 4), 0.0, [], []
    for t in range(a.shape[0]):
        v = 0.5 * v + torch.nn.functional.linear(a[t], w)
        out.append(v)
        last.append(v * 2.0)
        total = total + v
    return torch.stack(out), torch.stack(last, 1), total, v


def chunked(function, length, *inputs):
    captured = rerolled(function, *inputs)

    def rewrite(gm):
        return [part for call, loop in captured.loops() for part in chunk_time(gm, call, loop, length)]

    return captured.check(rewrite)


@pytest.mark.parametrize(("length", "parts"), [(1, 7), (2, 4), (3, 3), (6, 2), (7, 1), (100, 1)])
def test_stretches_hand_their_states_on(length, parts):
    made = chunked(layers, length, x(7), torch.randn(4, 5))
    assert [loop.length for _, loop in made] == [min(length, 7 - i * length) for i in range(parts)]


def test_near_miss_reversed_time():
    def backwards(a):
        v, out = torch.zeros(3, 5), []
        for t in range(a.shape[0]):
            v = 0.5 * v + a[a.shape[0] - 1 - t]
            out.append(v)
        return torch.stack(out)

    assert len(chunked(backwards, 2, x(7))) == 1


def test_bytes_held_by_a_step():
    captured = rerolled(layers, x(7), torch.randn(4, 5))
    ((_, loop),) = captured.loops()
    value = 3 * 4 * 4  # bytes of one [3, 4]
    assert made_by_step(infos(loop)) == value  # what the layer gives
    assert 2 * value <= held_by_eager(loop, infos(loop)) <= 4 * value


def test_auto_keeps_to_the_budget(monkeypatch):
    captured = rerolled(layers, x(7), torch.randn(4, 5))
    ((_, loop),) = captured.loops()
    assert chunk_length(loop, infos(loop), "auto") == 7  # far less than a GiB
    assert chunk_length(loop, infos(loop), 3) == 3
    monkeypatch.setattr(passes, "GIB", 0)
    step, eager = made_by_step(infos(loop)), held_by_eager(loop, infos(loop))
    length = chunk_length(loop, infos(loop), "auto")
    assert length < 7 and length * step <= 2 * eager


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 4)

    def forward(self, a):
        return layers(a, self.fc.weight)


@pytest.mark.parametrize("chunk", [1, 3, "auto"])
def test_inference(chunk, fresh):
    net, a = Net(), torch.rand(7, 3, 5)
    with torch.no_grad():
        expected = net(a)
        got = torch.compile(net, backend=snn, options={"time_chunk": chunk})(a)
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)
        assert g.stride() == e.stride()
    assert counters["snn_compile"]["loops_chunked"] == (chunk != "auto")


def test_training_is_left_alone(fresh):
    net, a = Net(), torch.rand(7, 3, 5)
    torch.compile(net, backend=snn, options={"time_chunk": 2})(a)[0].sum().backward()
    assert counters["snn_compile"]["loops_chunked"] == 0 and net.fc.weight.grad is not None


@pytest.mark.parametrize("value", [0, -1, "all", 2.0, True])
def test_bad_option(value):
    with pytest.raises(OptionError, match="time_chunk"):
        parse_options({"time_chunk": value})
