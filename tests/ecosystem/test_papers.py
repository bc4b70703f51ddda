"""Papers' ways of writing spiking networks: equal to eager, and compiled; under autocast, channels-last, accumulation, saved."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import snn_compile
from snn_compile.backend import snn
from snn_compile.lowering.cpp import compiler
from tests.ecosystem.papers import PAPERS, SEWBlock

pytestmark = [
    pytest.mark.skipif(compiler.missing() is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("fresh"),
]

#: eager's stream of random numbers, one call a step
OPTIONS = {"fallback_random": True, "strict": True, "step_from": 4}


def run(module, call, x):  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    module.zero_grad()
    out = call(x)
    out = out if isinstance(out, tuple) else (out,)
    sum((o.float() * torch.linspace(0.5, 1.5, o.numel()).view(o.shape)).sum() for o in out).backward()
    return [o.detach() for o in out], [p.grad.clone() for p in module.parameters() if p.grad is not None]


def check(module, x, exact, tolerance=1e-4, **options):  # type: ignore[no-untyped-def]
    reference = copy.deepcopy(module)
    expected, gradients = run(reference, reference, x)
    got, got_gradients = run(module, torch.compile(module, backend=snn, options=OPTIONS, **options), x)
    largest = max(float(g.abs().max()) for g in gradients)
    for a, b in zip(expected, got, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if exact:
            assert torch.equal(a, b)
        else:
            assert float(((a - b).abs() > 1e-5).float().mean()) < 0.01
            assert float(a.std()) > 0
    for a, b in zip(gradients, got_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)


#: What Inductor would compile of these, after its kernels, runs op by op: another form of what it compiles of the others.
OP_BY_OP = ("BNTT", "MS-ResNet", "SpyTorch", "STBP-tdBN", "TET")


@pytest.mark.parametrize("name", PAPERS)
def test_paper(name, request):
    if name in OP_BY_OP:
        request.getfixturevalue("op_by_op")
    paper = PAPERS[name]
    counters["snn_compile"].clear()
    check(paper.make(), torch.rand(paper.shape) * 2, paper.exact)
    assert counters["snn_compile"]["ops_time_batched"] >= paper.batched
    torch._dynamo.reset()
    found = snn_compile.explain(paper.make(), **OPTIONS)(torch.rand(paper.shape))
    assert len(found.recurrences) + len(found.stepped) >= paper.recurrences, str(found)
    assert found.graphs == 1


def test_channels_last():
    module = SEWBlock().to(memory_format=torch.channels_last).eval()
    x = torch.rand(6, 2, 4, 8, 8).flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (6, 2))
    check(module, x, exact=False)


def test_channels_last_without_copies_of_layout():
    """From convolution to neuron to residual sum to convolution, no tensor of the network's size is laid out anew."""
    module = nn.Sequential(SEWBlock(), SEWBlock(), SEWBlock()).to(memory_format=torch.channels_last)
    x = torch.rand(6, 2, 4, 8, 8).flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (6, 2))
    torch._dynamo.reset()
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(module, backend=snn), x)
    made = re.findall(r"= empty_strided_cpu\(\((.+?)\), \((.+?)\)", code)
    images = {strides for shape, strides in made if shape in ("12, 4, 8, 8", "6, 2, 4, 8, 8")}
    assert images <= {"256, 1, 32, 4", "512, 256, 1, 32, 4"}, code
    read = re.findall(r"extern_kernels.convolution\(reinterpret_tensor\(\w+, \((.+?)\), \((.+?)\)", code)
    assert read == [("12, 4, 8, 8", "256, 1, 32, 4")] * 6, code


def test_gradient_accumulation():
    module = SEWBlock()
    compiled = torch.compile(module, backend=snn)
    reference = copy.deepcopy(module)
    for x in torch.rand(3, 4, 2, 4, 8, 8):
        compiled(x).sum().backward()
        reference(x).sum().backward()
    for a, b in zip(reference.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * float(a.grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype):
    module = PAPERS["SpyTorch"].make()
    compiled = torch.compile(module, backend=snn)
    reference = copy.deepcopy(module)
    x = torch.rand(5, 9, 20)
    for m, call in ((reference, reference), (module, compiled)):
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        with torch.autocast("cpu", dtype):
            loss = call(x)[0].float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    for a, b in zip(reference.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_state_of_a_compiled_module_is_saved_and_loaded():
    module = torch.compile(nn.Sequential(SEWBlock()), backend=snn)
    x = torch.rand(4, 2, 4, 8, 8)
    module(x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = torch.compile(nn.Sequential(SEWBlock()), backend=snn)
    other.load_state_dict(torch.load(file))
    module.eval()
    other.eval()
    assert torch.equal(module(x), other(x))
