"""Every case of the zoo against eager: forward bit for bit, gradients, carried states.

The rewritten graph runs in eager around the real C++ kernels, without Inductor: that is the same arithmetic in a tenth of the
time. `test_end_to_end.py` goes through Inductor. Results are filled with NaN before a kernel writes them.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from snn_compile.config import Config
from snn_compile.ir.loop import Loop, verify
from snn_compile.lowering.cpp import compiler
from snn_compile.pipeline import Report, run_pipeline
from tests import zoo

pytestmark = [
    pytest.mark.skipif(compiler.missing() is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("fresh"),
]


class Backend:
    """The pipeline, then the rewritten graph as it is."""

    def __init__(self):
        self.report = Report()

    def __call__(self, gm, inputs, **_):
        gm, self.report = run_pipeline(gm, Config(strict=True, step_from=4))
        for module in gm.modules():
            if isinstance(module, Loop):
                verify(module)
        return gm.forward


def run(function, inputs):
    leaves = [i.clone().requires_grad_(i.is_floating_point()) for i in inputs]
    out = function(*leaves)
    out = list(out) if isinstance(out, (tuple, list)) else [out]
    memory = {i.untyped_storage().data_ptr() for i in leaves}
    assert not any(o.untyped_storage().data_ptr() in memory for o in out if o.numel())
    wanted = [o for o in out if o.requires_grad]
    weights = [torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view(o.shape) for o in wanted]
    grads = torch.autograd.grad(wanted, leaves, weights, allow_unused=True) if wanted else []
    return out, grads


def check(case, inputs, rtol=1e-5, **options):
    backend = Backend()
    expected, expected_grads = run(case.function, inputs)
    got, got_grads = run(torch.compile(case.function, backend=backend, fullgraph=True, **options), inputs)
    for a, b in zip(expected, got, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert b.is_contiguous() or not a.is_contiguous()
        if case.atol:
            torch.testing.assert_close(a, b, rtol=0, atol=case.atol)
        else:
            assert torch.equal(a, b)
    for a, b in zip(expected_grads, got_grads, strict=True):
        if a is None or b is None:
            assert a is None and (b is None or not b.any())
        else:
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(a.abs().max()))
    return backend.report


@pytest.mark.parametrize("name", zoo.CASES)
def test_case(name):
    case = zoo.CASES[name]
    report = check(case, case.inputs(9))
    assert len(report.recurrences) >= case.recurrences
    assert len(report.stepped) == case.stepped
    assert len(report.loops) >= case.loops
    assert not case.unpeeled or all(r.meta["steps"] == 9 for r in [*report.recurrences, *report.stepped])


LENGTHS = ["lif", "scalar_start", "written_into_a_buffer", "accumulated", "two_layers_in_one_loop", "recurrent_lif"]


@pytest.mark.parametrize("steps", [1, 2, 3, 33])
@pytest.mark.parametrize("name", LENGTHS)
def test_length(name, steps):
    case = zoo.CASES[name]
    check(case, case.inputs(steps))


DYNAMIC = ["lif", "cuba_lif_two_states", "parametric_lif", "linear_layers_in_the_loop", "steps_as_slices", "buffer_read_back"]
DYNAMIC += ["both_directions_in_one_loop", "rate_regularised_in_the_loop"]


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_shapes(name):
    case = zoo.CASES[name]
    report = check(case, case.inputs(8), dynamic=True)
    assert len(report.recurrences) >= case.recurrences


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.bfloat16, 2**-6), (torch.float16, 2**-9)], ids=str)
@pytest.mark.parametrize(
    "name", ["lif", "lif_soft_reset_detached_with_state", "cuba_lif_two_states", "time_last", "recurrent_lif"]
)
def test_dtype(name, dtype, rtol):
    case = zoo.CASES[name]
    report = check(case, [i.to(dtype) for i in case.inputs(9)], rtol)
    assert len(report.recurrences) + len(report.stepped) >= 1


@pytest.mark.parametrize("name", ["lif", "adaptive_threshold", "bool_and_integer_states", "recurrent_lif"])
def test_without_gradients(name):
    case = zoo.CASES[name]
    backend = Backend()
    with torch.no_grad():
        inputs = case.inputs(9)
        expected, got = case.function(*inputs), torch.compile(case.function, backend=backend)(*inputs)
    pairs = zip(expected, got, strict=True) if isinstance(expected, tuple) else [(expected, got)]
    assert all(torch.equal(a, b) for a, b in pairs)
    found = [*backend.report.recurrences, *backend.report.stepped]
    assert found and all(r.backward is None for r in found)


def test_loop_that_no_gradient_passes():
    """Detached inside: the results want no gradient, and autograd has nothing to warn of."""

    def count(x):
        v, total = torch.zeros_like(x[0]), 0.0
        for t in range(x.shape[0]):
            v = 0.5 * v + x[t].detach()
            total = total + (v > 1.0).float()
        return total

    x = torch.randn(6, 5).requires_grad_()
    backend = Backend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = torch.compile(count, backend=backend)(x)
    assert len(backend.report.recurrences) == 1
    assert torch.equal(got, count(x)) and not got.requires_grad


def near_miss_number_that_changes(x):
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v = v * 0.9 ** (t + 1) + x[t]
        out.append(v)
    return torch.stack(out)


def near_miss_permuted_time(x):
    v, out = torch.zeros_like(x[0]), []
    for t in (0, 3, 1, 2, 5, 4):
        v = v * 0.5 + x[t]
        out.append(v)
    return torch.stack(out)


def near_miss_write_through_a_view(x):
    v, out = torch.zeros_like(x[0]), []
    for t in range(x.shape[0]):
        v = v * 0.5 + x[t]
        v[0].mul_(2.0)
        out.append(v)
    return torch.stack(out)


def near_miss_old_view_read_after_a_write(x):
    v = torch.zeros_like(x[0])
    old, out = v[0], []
    for t in range(x.shape[0]):
        v += x[t]
        out.append(v * 2 + old)
    return torch.stack(out)


def near_miss_two_indices(x):
    y, v, out = x[:, :6], torch.zeros_like(x[0, 0]), []
    for t in range(6):
        v = v * 0.5 + y[t, t]
        out.append(v)
    return torch.stack(out)


def near_miss_dtype_that_changes(x):
    v, out = torch.zeros(x.shape[1:], dtype=torch.float64), []
    for t in range(x.shape[0]):
        v = (v * 0.5 + x[t]).to(torch.float32 if t % 2 else torch.float64)
        out.append(v.float())
    return torch.stack(out)


NEAR_MISSES = [f for name, f in list(globals().items()) if name.startswith("near_miss")]


@pytest.mark.parametrize("function", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss(function):
    """Looks like a loop of the kind that is compiled, and is not: the result stays eager's."""
    backend = Backend()
    x = torch.randn(6, 6, 7)
    expected, expected_grads = run(function, [x])
    got, grads = run(torch.compile(function, backend=backend), [x])
    assert torch.equal(expected[0], got[0])
    torch.testing.assert_close(expected_grads[0], grads[0])
    assert backend.report.rejections, "it must say why"
