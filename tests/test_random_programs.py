"""Random time loops, as Dynamo traces them, against eager: results, their layouts and their memory, what is written, gradients.

Recurrences run step by step in eager (`tests/test_random_steps.Interpreted`), so a program takes a second; `--compiled` runs the
whole backend instead.

    python tests/test_random_programs.py --programs 500 --seed 1
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx

from snn_compile.config import Config
from snn_compile.pipeline import run_pipeline
from tests.random_programs import Made, make, source, weights
from tests.test_random_steps import interpreted

seen: collections.Counter[str] = collections.Counter()


@dataclass(frozen=True)
class How:
    """`compiled`: with the whole backend; `dynamic`: with symbolic sizes; `autocast`: in fp32, under autocast to bf16."""

    compiled: bool = False
    dynamic: bool = False
    autocast: bool = False

    @property
    def tolerance(self) -> float:
        """In bf16, sums of eighths are exact in any order, and sigmoids are not."""
        return 2e-2 if self.autocast else 1e-9

    def __call__(self, made: Made, function: Callable[..., list[object]]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return made.run(function)

    def text(self, program: str) -> str:
        """Gradients are switched on by no one; autocast is switched off."""
        if not self.autocast:
            return program
        return program.replace("torch.enable_grad()", "torch.autocast('cpu', enabled=False)")


class Wrong(AssertionError):
    """What a program gives compiled is not what eager gives."""


def close(what: str, a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    if a.dtype != b.dtype or a.shape != b.shape:
        raise Wrong(f"{what}: {b.dtype} {tuple(b.shape)}, eager has {a.dtype} {tuple(a.shape)}")
    error = (a - b).abs().max() if a.is_floating_point() and a.numel() else torch.tensor(0.0)
    scale = a.detach().abs().max() if a.numel() else torch.tensor(1.0)
    if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(scale)), equal_nan=True):
        raise Wrong(f"{what}: off by {float(error.detach())}")


def strides(value: Tensor) -> tuple[int, ...] | None:
    """None of a part of a larger tensor, or where elements share memory: a copy has others."""
    if not torch.ops.aten.is_non_overlapping_and_dense(value):
        return None
    return tuple(s for s, n in zip(value.stride(), value.shape, strict=True) if n > 1)


def share(values: list[Tensor], others: list[Tensor]) -> list[list[bool]]:
    memory = [v.untyped_storage().data_ptr() for v in values]
    return [[o.untyped_storage().data_ptr() == m for o in others] for m in memory]


def gradients(made: Made, results: list[Tensor]) -> list[Tensor | None]:
    wanted = [r for r in results if r.requires_grad and r.is_floating_point()]
    leaves = made.leaves()
    if not wanted:
        return [None] * len(leaves)
    return list(torch.autograd.grad(wanted, leaves, [weights(r.shape, r.dtype) for r in wanted], allow_unused=True))


def compare(
    eager: Made,
    expected: list[Tensor],
    wanted: list[Tensor | None] | None,
    compiled: Made,
    got: list[Tensor],
    shared: bool,
    tolerance: float,
) -> None:
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        close(f"result {i}", a, b, tolerance)
        if strides(a) not in (None, strides(b)):
            raise Wrong(f"result {i}: strides {b.stride()}, eager has {a.stride()}")
    for i, (a, b) in enumerate(zip(eager.buffers(), compiled.buffers(), strict=True)):
        close(f"buffer {i}", a, b, tolerance)
    for i, (a, b) in enumerate(zip(eager.states(), compiled.states(), strict=True)):
        close(f"state {i}", a, b, tolerance)
    mine, theirs = (share(r, m.operands) for r, m in ((got, compiled), (expected, eager)))
    if shared and mine != theirs:
        raise Wrong(f"results share memory with inputs: {mine}, in eager {theirs}")
    if wanted is None:
        return
    for i, (g, h) in enumerate(zip(wanted, gradients(compiled, got), strict=True)):
        if g is None or h is None:
            if any(v is not None and v.any() for v in (g, h)):
                raise Wrong(f"gradient {i}: {h}, eager has {g}")
        elif not g.isfinite().all():
            seen["a gradient of eager overflows"] += 1
        else:
            close(f"gradient {i}", g, h, tolerance)


def _passes(gm: fx.GraphModule, _: object):  # type: ignore[no-untyped-def]
    gm, report = run_pipeline(gm, Config(strict=True, step_from=4))
    seen["recurrences"] += len(report.recurrences)
    seen["graphs with a loop"] += bool(report.loops)
    seen["graphs"] += 1
    return gm.forward


def check(seed: int, how: How = How(), text: str = "") -> None:
    """The program of this seed, or `text` in its place."""
    given, steps = source(seed)
    text = how.text(text or given)
    images, dtype = seed % 5 == 0, torch.float32 if how.autocast else torch.float64
    eager = make(seed, text, steps, images, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = how(eager, eager.function)
        except Exception:
            seen["eager fails"] += 1
            return
        wanted = None
        try:
            wanted = gradients(eager, expected)
        except RuntimeError:  # (written into what its backward needs: Inductor says so when it compiles)
            seen["eager has no gradient"] += 1
            if how.compiled:
                return
        other = make(seed, text, steps, images, dtype)
        torch._dynamo.reset()
        with contextlib.nullcontext() if how.compiled else interpreted():
            backend, options = ("snn", {"strict": True, "step_from": 4}) if how.compiled else (_passes, None)
            got = how(other, torch.compile(other.function, backend=backend, options=options, dynamic=how.dynamic))
            seen["programs"] += 1
            # (a view taken while gradients are switched off is no view that can be taken again)
            compare(eager, expected, wanted, other, got, "grad():" not in text, how.tolerance)


@pytest.mark.parametrize("part", range(4))
def test_a_program_means_what_it_says(part: int) -> None:
    for seed in range(part * 15, part * 15 + 15):
        check(seed)


#: Short forms of programs that were compiled wrongly; the names say what was.
WRONG_ONCE = {
    "what_was_joined_without_gradients_has_none": """
    v, out = b.clone(), []
    for t in range(len(x)):
        v = v * 0.5 + x[t]
        a = spike(v - 1.0)
        with torch.no_grad():
            u = torch.chunk(torch.cat([v, a], 1), 2, 1)[1]
        out.append(u * k)
    return [torch.stack(out), v]""",
    "slots_written_without_gradients": """
    slots, out = torch.full((2, *x.shape[1:]), 0.25, dtype=x.dtype), []
    for t in range(len(x)):
        with torch.no_grad():
            slots[0] = x[t]
        slots[1] = k * (slots[0] > 0.5) + slots[1]
        slots[0] = slots[0] - slots[1] * 0.25
        out.append(slots[0] * 1.0)
    return [torch.stack(out)]""",
    "code_that_nobody_reads_had_an_operand_of_another_shape": """
    v1, v2, out = torch.zeros_like(x[0]), torch.zeros_like(x[0]), []
    for t in range(len(x)):
        v1 = x[t]
        a = v2.transpose(0, 1).transpose(0, 1)
        v2 = spike(v2 - 1.0) * 0.5
        out.append(v1)
    return [sum(out), v1, v2]""",
    "slots_of_one_tensor_that_want_a_gradient_from_the_second_step_on": """
    slots, out = torch.full((3, *x.shape[1:]), 0.25, dtype=x.dtype), []
    for t in range(len(x)):
        a = slots[2] * 0.5
        slots[2] = slots[2] * 0.5
        slots[0] = k * a + slots[0]
        slots[1] = x[t] - slots[1] * 0.25
        out.append(slots[0])
    return [sum(out) / len(x), slots]""",
    "a_state_written_through_a_view": """
    v, out = buf.clone(), []
    for t in range(len(x)):
        v.t().mul_(0.5)
        v = k * v + x[t]
        out.append(v)
    return [torch.stack(out)]""",
    "a_state_written_under_another_name": """
    v = buf.clone()
    u, out = v, []
    for t in range(len(x)):
        u = u.detach()
        u.mul_(0.5)
        a = v.clamp(-1.0, 1.0)
        v = k * u + a
        out.append(a)
    return [torch.stack(out)]""",
    "a_value_written_after_it_was_stored": """
    v = b
    for t in range(len(x)):
        u = v + v
        mem[t] = u
        u[:, :2].copy_(v[:, :2])
        v = v * 0.5 + x[t]
    return [v, u]""",
    "a_step_without_its_last_write": """
    v, u, out = torch.full_like(x[0], 0.25), torch.zeros_like(x[0]), []
    for t in range(len(x)):
        v.relu_()
        a = v.detach()
        a.add_(u)
        u = u - u * 0.25
        v = x[t] + x[t]
        out.append(a)
    return [out[2], v, u]""",
    "a_state_that_nobody_reads": """
    v, u, out = b * 1.0, torch.zeros_like(x[0]), []
    for t in range(len(x)):
        v = v * 0.5
        v.t().mul_(0.5)
        u = k * u + x[t]
        out.append(u)
    return [torch.stack(out)[-1]]""",
    "a_record_in_steps_that_differ": """
    v = torch.zeros_like(x[0])
    for t in range(len(x)):
        mem[t].copy_(v)
        a = v * (1.0 - v.detach()) + x[t]
        if t % 2 == 0:
            v = a * (1.0 - a.detach())
        v = k * a + v
    return [v]""",
    "results_that_are_views_of_inputs": """
    v, seen, out = b * 1.0, [], []
    for t, now in enumerate(y.unbind(1)):
        u = x[t]
        v = v * 0.5 + u + now
        seen.append(now)
        out.append(v)
    return [torch.stack(out), seen, u]""",
}


@pytest.mark.parametrize("program", WRONG_ONCE)
def test_what_was_wrong_once(program: str) -> None:
    check(1, text="def f(x, y, k, b, buf, mem):" + WRONG_ONCE[program])


def test_a_group_norm_of_what_lies_with_gaps() -> None:
    """``y[:, 0]`` of images: `native_group_norm` alone does not take it."""
    text = """
    v, out = y[:, 0], []
    for t in range(x.shape[0]):
        a = norm(v)
        v = a - v * 0.25
        out.append(a)
    return [torch.stack(out)]"""
    check(5, text="def f(x, y, k, b, buf, mem):" + text)


def test_a_state_that_grows_to_a_symbolic_size() -> None:
    """The size that its first value is stretched to is one of the graph's, not the symbol itself."""
    text = """
    unread = x.new_zeros(5, *x.shape[1:])
    v, read, made = 0.0 * x[0], [], []
    for t in range(5):
        a = lin(v)
        u = x[t][:, :1] + v
        w = a + u
        v = w * 0.5
        read.append(u)
        made.append(a)
    return [sum(read), torch.stack(made), w]"""
    check(261, How(dynamic=True), "def f(x, y, k, b, buf, mem):" + text)


def test_a_record_in_steps_that_differ_compiles_whole() -> None:
    check(1, How(compiled=True), "def f(x, y, k, b, buf, mem):" + WRONG_ONCE["a_record_in_steps_that_differ"])


def shortened(seed: int, how: How, failure: type[Exception]) -> str:
    """The program of this seed without the lines that do not matter to how it fails."""
    lines = source(seed)[0].splitlines()

    def fails(lines: list[str]) -> bool:
        try:
            check(seed, how, "\n".join(lines))
        except Exception as found:
            return type(found) is failure
        return False

    at = len(lines)
    while at > 0:
        at -= 1
        fewer = lines[:at] + lines[at + 1 :]
        if fails(fewer):
            lines = fewer
            at = min(at, len(lines))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1, help="of the first program; the others follow")
    parser.add_argument("--compiled", action="store_true", help="with Inductor and generated kernels: ten times as slow")
    parser.add_argument("--dynamic", action="store_true", help="with symbolic sizes")
    parser.add_argument("--autocast", action="store_true", help="in fp32, under autocast to bf16")
    parser.add_argument("--shorten", action="store_true", help="print what fails, without the lines that do not matter")
    given = parser.parse_args()
    how = How(given.compiled, given.dynamic, given.autocast)
    start, failures = time.perf_counter(), 0
    for seed in range(given.seed, given.seed + given.programs):
        try:
            check(seed, how)
        except Exception as failure:
            failures += 1
            lines = [line for line in str(failure).splitlines() if line] or [""]
            print(f"{seed}: {type(failure).__name__}: {' '.join(lines[:2])[:200]}", flush=True)
            if given.shorten:
                print(shortened(seed, how, type(failure)), flush=True)
    print(f"torch {torch.__version__}, {time.perf_counter() - start:.0f} s, {failures} failures")
    for what, count in seen.most_common():
        print(f"{count:7} {what}")


if __name__ == "__main__":
    main()
