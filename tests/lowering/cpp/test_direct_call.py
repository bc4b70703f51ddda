"""Calls that C++ answers: the results of Python's, and Python asked once for each new size."""

from __future__ import annotations

import ctypes
import signal
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from snn_compile.lowering import registration, result_memory
from snn_compile.lowering.cpp import direct_call
from snn_compile.neuron import LIFNode
from snn_compile.surrogate import ATan

pytestmark = pytest.mark.skipif(direct_call.direct(registration.NAMESPACE) is None, reason="libtorch has no such interface")


class LIF(nn.Module):
    """Of a size of its own, so that no other test has called its op; the decay is learned, the state handed on."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay, self.spike = decay, ATan()
        self.threshold = nn.Parameter(torch.tensor(0.8))

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        spikes = []
        for t in range(x.shape[0]):
            v = self.decay * v + x[t]
            s = self.spike(v - self.threshold)
            v = v - s * self.threshold
            spikes.append(s)
        return torch.stack(spikes), v


@pytest.fixture
def asked():  # type: ignore[no-untyped-def]
    """The calls that Python answers, as ``forward`` and ``backward``."""
    calls: list[str] = []

    def counting(name: str):  # type: ignore[no-untyped-def]
        function = getattr(registration, f"run_{name}")

        def run(*args):  # type: ignore[no-untyped-def]
            calls.append(name)
            return function(*args)

        return mock.patch.object(registration, f"run_{name}", run)

    with counting("forward"), counting("backward"):
        yield calls


def training_step(run: nn.Module, x: Tensor, v: Tensor, spikes_count: bool = True, state_counts: bool = True) -> list[Tensor]:
    x, v = x.clone().requires_grad_(), v.clone().requires_grad_()
    spikes, last = run(x, v)
    loss = (spikes * torch.linspace(-1, 2, spikes.numel()).view_as(spikes)).sum() * spikes_count
    (loss + (last.square().sum() if state_counts else 0.0)).backward()
    threshold = run.get_parameter("threshold") if isinstance(run, LIF) else run._orig_mod.threshold
    gradient, threshold.grad = threshold.grad, None
    assert x.grad is not None and v.grad is not None and gradient is not None
    return [spikes.detach(), last.detach(), x.grad, v.grad, gradient]


def check(module: LIF, compiled: nn.Module, x: Tensor, v: Tensor, **counts: bool) -> None:
    eager, got = training_step(module, x, v, **counts), training_step(compiled, x, v, **counts)
    for a, b in zip(eager[:2], got[:2], strict=True):
        assert torch.equal(a, b) and a.device == b.device
    for a, b in zip(eager[2:], got[2:], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_python_is_asked_once(fresh, asked):
    module = LIF(0.6171)
    compiled = torch.compile(module, backend="snn")
    for _ in range(4):
        check(module, compiled, torch.randn(6, 5, 7), torch.randn(5, 7))
    assert asked == ["forward", "backward"]


def test_each_size_and_layout_is_asked_once(fresh, asked):
    module = LIF(0.6172)
    compiled = torch.compile(module, backend="snn", dynamic=True)
    inputs = [torch.randn(6, 5, 7), torch.randn(6, 9, 7), torch.randn(7, 5, 6).transpose(0, 2), torch.randn(6, 5, 14)[..., ::2]]
    strides = []
    for _ in range(3):
        for x in inputs:
            with torch.no_grad():
                results = compiled(x, x[0])
                for got, expected in zip(results, module(x, x[0]), strict=True):
                    assert torch.equal(got, expected)
                strides.append([r.stride() for r in results])
    assert strides == strides[:4] * 3
    assert asked == ["forward"] * 4


def test_cotangents_that_are_absent(fresh, asked):
    module = LIF(0.6173)
    compiled = torch.compile(module, backend="snn", dynamic=False)
    op = None
    for _ in range(3):
        check(module, compiled, torch.randn(6, 5, 7), torch.randn(5, 7), state_counts=False)
        check(module, compiled, torch.randn(6, 5, 7), torch.randn(5, 7), spikes_count=False)
    [op] = [n for n, r in registration.registered().items() if "0.6173" in str(r.step.code)]
    given = torch.zeros(5, 7), torch.randn(6, 5, 7), torch.tensor(0.8)
    ct_spikes, ct_last = torch.randn(6, 5, 7), torch.randn(5, 7)
    backward = registration.overload(f"{op}_backward")
    for cotangents in ((ct_spikes, None), (None, ct_last)):
        zeros = [torch.zeros_like(g) if c is None else c for c, g in zip(cotangents, (ct_spikes, ct_last), strict=True)]
        asked.clear()
        first, second = (backward(*given, *cotangents, 6) for _ in range(2))
        assert asked == ["backward"]
        for a, b, expected in zip(first, second, backward(*given, *zeros, 6), strict=True):
            assert torch.equal(a, b) and torch.equal(a, expected)


def test_more_sizes_than_are_kept(fresh, asked):
    module = LIF(0.6174)
    compiled = torch.compile(module, backend="snn", dynamic=True)
    for n in [*range(3, 103), *range(3, 103)]:
        x = torch.randn(4, n)
        with torch.no_grad():
            assert torch.equal(compiled(x, x[1])[0], module(x, x[1])[0])


def test_large_results_keep_their_memory(fresh, asked):
    module = LIF(0.6175)
    compiled = torch.compile(module, backend="snn")
    x = torch.randn(2, result_memory.THRESHOLD // 8 + 1)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x, x[0])[0], module(x, x[0])[0])
    assert asked == ["forward"]


def test_the_number_of_threads_is_part_of_a_launch(fresh, asked):
    module = LIF(0.6176)
    compiled = torch.compile(module, backend="snn")
    x, before = torch.randn(3, 40_000), torch.get_num_threads()
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            with torch.no_grad():
                torch._dynamo.reset()  # (the number of threads is a guard)
                assert torch.equal(compiled(x, x[0])[0], module(x, x[0])[0])
    finally:
        torch.set_num_threads(before)
    assert asked == ["forward"] * 2


def test_many_threads(fresh):
    module = LIF(0.6177)
    compiled = torch.compile(module, backend="snn", dynamic=True)
    inputs = [torch.randn(4, n) for n in range(5, 25)]
    compiled(inputs[0], inputs[0][0]), compiled(inputs[1], inputs[1][0])
    [op] = [registration.overload(f"{n}_forward") for n, r in registration.registered().items() if "0.6177" in str(r.step.code)]
    with torch.no_grad(), ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: op(x[0], x, module.threshold, 4), inputs * 20))
        for (spikes, last), x in zip(results, inputs * 20, strict=True):
            expected = module(x, x[0])
            assert torch.equal(spikes, expected[0]) and torch.equal(last, expected[1])


def test_operands_and_results_are_released(fresh):
    module = LIF(0.6178)
    compiled = torch.compile(module, backend="snn")
    x, v = torch.randn(6, 5, 7, requires_grad=True), torch.randn(5, 7)
    storages = [t.untyped_storage() for t in (x, v)]
    counts = []
    for _ in range(5):
        spikes, last = compiled(x, v)
        (spikes.sum() + last.sum()).backward()
        held = [spikes.untyped_storage(), x.grad.untyped_storage()]  # type: ignore[union-attr]
        del spikes, last
        x.grad = None
        counts.append([torch._C._storage_Use_Count(s._cdata) for s in storages + held])
        del held
    assert counts[1:] == counts[:-1] and counts[-1][2:] == [1, 1]


@pytest.mark.parametrize("again", [False, True])
def test_an_error_says_what_python_said(fresh, again):
    module = LIF(0.6179 + again / 1e5)
    compiled = torch.compile(module, backend="snn", dynamic=True)
    x = torch.randn(4, 5)
    with torch.no_grad():
        if again:
            compiled(x, x[0])
            x = torch.randn(4, 6)
        fails = mock.patch.object(registration, "run_forward", side_effect=OSError("no room"))
        with fails, pytest.raises(RuntimeError, match="OSError: no room"):
            compiled(x, x[0])
        assert torch.equal(compiled(x, x[0])[0], module(x, x[0])[0])


@pytest.fixture
def interruptible():
    """A shell's background job ignores interrupts, and so does what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_one(fresh, interruptible):
    module = LIF(0.6181)
    compiled = torch.compile(module, backend="snn")
    x = torch.randn(4, 5)
    with torch.no_grad():
        with mock.patch.object(registration, "run_forward", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            compiled(x, x[0])
        assert torch.equal(compiled(x, x[0])[0], module(x, x[0])[0])


def test_results_are_poisoned():
    """What these tests go by."""
    direct = direct_call.direct(registration.NAMESPACE)
    assert direct is not None
    name = "test_results_are_poisoned"
    schema = "(Tensor a, SymInt steps) -> Tensor"
    calls = registration.define_op(name, schema, lambda a, steps: a.clone(), lambda a, steps: a.clone(), direct)
    nothing = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(lambda addresses, numbers: None)
    address = ctypes.cast(nothing, ctypes.c_void_p).value
    from snn_compile.lowering.launch import ResultSpec

    a = torch.ones(3)
    kernel = mock.Mock(address=address, pointers=(), numbers=(), scratch=0)
    assert torch.equal(registration.overload(name)(a, 2), a)
    assert calls is not None
    calls.add(2, [a], [ResultSpec.like(a)], kernel)
    assert registration.overload(name)(a, 2).isnan().all()
    assert torch.equal(registration.overload(name)(a, 3), a)


def test_a_version_without_the_interface(fresh, asked, monkeypatch):
    monkeypatch.setattr(direct_call, "direct", lambda namespace: None)
    module = LIFNode(tau=2.125, step_mode="m")
    compiled = torch.compile(module, backend="snn")
    for _ in range(3):
        module.reset()
        x = torch.randn(6, 11)
        got = compiled(x)
        module.reset()
        assert torch.equal(got, module(x))
    assert asked == ["forward"] * 3


def test_memory_of_large_results_is_given_out_again(fresh):
    """Only when nobody refers to it any more, be it by a view."""
    module = LIF(0.6182)
    compiled = torch.compile(module, backend="snn")
    x = torch.randn(2, result_memory.THRESHOLD // 8 + 1)
    with torch.no_grad():
        compiled(x, x[0])
        first = compiled(x, x[0])[0]
        view, address, expected = first[1], first.data_ptr(), module(x, x[0])[0]
        del first
        second = compiled(2 * x, x[0])[0]
        assert second.data_ptr() != address and torch.equal(view, expected[1])
        del view
        assert compiled(2 * x, x[0])[0].data_ptr() == address
        assert torch.equal(second, module(2 * x, x[0])[0])
        second.untyped_storage().share_memory_()
        assert torch.equal(second, module(2 * x, x[0])[0])
