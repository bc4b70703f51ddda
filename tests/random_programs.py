"""Random time loops as Python source: states that alias, writes in place, layers, delay lines, steps that differ, loops in a row.

`tests/random_steps` draws what a step computes; this draws how a loop is written. A program is text, so that what fails can be
read, shortened and run by itself. Used by `tests/test_random_programs.py`.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.passes.capture import Spike

BATCH, FEATURES, IMAGE = 3, 4, (3, 4)

#: Values of a step, [BATCH, FEATURES] or images of that; `a`, `b` are earlier ones.
POINTWISE = (
    "{a} + {b}",
    "{a} * 0.5",
    "{a} * 0.5 + {b}",
    "{a} - {b} * 0.25",
    "k * {a} + {b}",
    "({a} > 0.5).to({a}.dtype)",
    "torch.where({a} > {b}, {b}, 0.25)",
    "spike({a} - 1.0)",
    "spike({a} - 0.5)",
    "torch.sigmoid({a})",
    "torch.tanh({a})",
    "{a}.detach()",
    "{a} * (1.0 - {b}.detach())",
    "{a}.relu()",
    "{a}.clamp(-1.0, 1.0)",
    "{a}.clone()",
    "{a} + float(t)",
    "torch.zeros_like({a})",
    "torch.ones({a}.shape, dtype={a}.dtype) * {b}",
)
READS = (
    "x[t]",
    "x[t]",
    "x[t]",
    "x[T - 1 - t]",
    "x[max(t - 1, 0)]",
    "y[:, t]",
    "x[0]",
    "x[t].relu()",
    "lin(x[t])",
    "bn(x[t])",
    "lin(y[:, t])",
    "made[t - 1]",
)
VIEWS = (
    "{a}.transpose(0, 1).transpose(0, 1)",
    "{a}.view(-1).view({a}.shape)",
    "{a}.flip(1)",
    "torch.cat([{a}[:, :2], {b}[:, 2:]], 1)",
    "{a}[:, :1] + {b}",
    "torch.stack([{a}, {b}]).sum(0)",
    "torch.chunk(torch.cat([{a}, {b}], 1), 2, 1)[1]",
    "{a}.unsqueeze(0).squeeze(0)",
    "{a}[:]",
)
LAYERS = (
    "lin({a})",
    "lin({a})",
    "bn({a})",
    "norm({a})",
    "{a}.softmax(1)",
    "{a}.mean(1, keepdim=True) + {b}",
    "{a} - {a}.sum(0, keepdim=True)",
    "{a} @ w",
    "pool({a})",
    "seq({a})",
)
WRITES = (
    "{v}.add_({a})",
    "{v}.mul_(0.5)",
    "{v} += {a}",
    "{v} -= {a}.detach()",
    "{v}[{a} > 0.5] = 0.0",
    "{v}[:, :2] *= 0.5",
    "{v}[:, 1] = {a}[:, 0]",
    "{v}.masked_fill_({a} > 0.5, 0.25)",
    "{v}.copy_({a})",
    "{v}[:, :2].copy_({a}[:, :2])",
    "{v}.zero_()",
    "{v}.transpose(0, 1).mul_(0.5)",
    "{v}.relu_()",
)
INTO_SERIES = (
    "mem[t] = {a}",
    "mem[t].copy_({a})",
    "mem[t, :, 1] = {a}[:, 1]",
    "mem[t] += {a}",
    "buf.copy_({a}.detach())",
    "made[t] = {a}",
    "made[t] = {a}",
    "made[t][{a} > 0.5] = 0.25",
    "made[t] += {a}",
)
STARTS = (
    "torch.zeros_like(x[0])",
    "torch.zeros_like(x[0])",
    "torch.zeros(x.shape[1:], dtype=x.dtype)",
    "x.new_zeros(x.shape[1:])",
    "torch.full_like(x[0], 0.25)",
    "0.0 * x[0]",
    "0.0",
    "None",
    "buf",
    "buf.clone()",
    "b",
    "b * 1.0",
    "x[0]",
    "y[:, 0]",
    "torch.zeros(1, *x.shape[2:], dtype=x.dtype)",
    "lin(x[0])",
)
PACKED = (
    ("{p} = torch.stack([{a}, {b}])", "{a}, {b} = {p}"),
    ("{p} = torch.stack([{a}, {b}], -1)", "{b}, {a} = {p}[..., 1], {p}[..., 0]"),
    ("{p} = torch.cat([{a}, {b}], 1)", "{a}, {b} = {p}.chunk(2, 1)"),
    ("{p} = torch.cat([{a}, {b}])", "{a}, {b} = {p}[:x.shape[1]], {p}[x.shape[1]:]"),
    ("{p} = torch.cat([{a}, {b}], -1)", "{a}, {b} = {p}.split(x.shape[-1], -1)"),
    ("{p} = 1.0 * torch.cat([{a}, {b}], -1)", "{a}, {b} = {p}.chunk(2, -1)"),
)
LINE = "3, *x.shape[1:]"
MOVES = (
    "{d} = torch.cat([{a}[None], {d}[:-1]])",
    "{d} = torch.cat([{d}[1:], {a}.unsqueeze(0)])",
    "{d} = torch.roll({d}, 1, 0); {d}[0] = {a}",
    "{d} = {d}.roll(-1, 0); {d}[-1].copy_({a})",
    "{d}[1:] = {d}[:-1].clone(); {d}[0] = {a}",
    "{d} = torch.roll({d}, 2, dims=0).select_scatter({a}, 0, 1)",
)
CONDITIONS = ("if t == 0:", "if t > 0:", "if t % 2 == 0:", "if t < T - 1:", "with torch.no_grad():", "with torch.enable_grad():")
RESULTS = (
    "torch.stack({s})",
    "torch.stack({s})",
    "torch.stack({s}, 1)",
    "torch.stack({s}, -1)",
    "torch.stack({s}).mean(0)",
    "sum({s})",
    "sum({s}) / T",
    "{s}[-1]",
    "torch.cat({s})",
    "torch.cat({s}, 1)",
    "torch.stack({s})[-1]",
    "torch.stack({s}[1:])",
    "torch.stack({s}[::-1])",
    "torch.stack({s}).flatten(1)",
    "torch.stack({s}).sum()",
    "lin(torch.stack({s}))",
    "{s}[T // 2]",
    "{s}",
)


def spike(u: Tensor) -> Tensor:
    return Spike.apply(u)  # type: ignore[no-any-return]


class _Writer:
    def __init__(self, rng: random.Random, steps: int) -> None:
        self.rng, self.lines, self.depth, self.steps = rng, [], 1, steps
        self.series: list[str] = []
        self.fresh = 0

    def line(self, text: str) -> None:
        if text:
            self.lines.append("    " * self.depth + text)

    def name(self, kind: str) -> str:
        self.fresh += 1
        return f"{kind}{self.fresh}"

    def loop(self, first: bool) -> None:
        rng = self.rng
        kept = "h." if rng.random() < 0.3 else ""  # (attributes of a module, as libraries keep their states)
        states = [kept + self.name("v") for _ in range(rng.choice((1, 1, 2, 2, 3)))]
        starts = {v: rng.choice(STARTS) for v in states}
        if len(states) > 1 and rng.random() < 0.1:
            starts[states[1]] = states[0]
        packed = ("", "")
        if rng.random() < 0.2:  # (slots of one tensor)
            states, starts = self.slots(len(states)), {}
        elif len(states) == 2 and rng.random() < 0.4:  # (handed on in one tensor)
            starts = {v: rng.choice(STARTS[:6]) for v in states}
            packed = self.packed(states)
        for v in starts:
            self.line(f"{v} = {starts[v]}")
        self.line(packed[0])
        line = self.name("line") if rng.random() < 0.2 else ""
        if line:
            self.line(f"{line} = {rng.choice(('x.new_zeros({s})', 'torch.zeros({s}, dtype=x.dtype)')).format(s=LINE)}")
        collected = [self.name("out") for _ in range(rng.choice((1, 1, 2)))]
        for out in collected:
            self.line(f"{out} = []")
        source = None if first else rng.choice(self.series)
        if source is not None and rng.random() < 0.5:
            self.line(f"{source}_s = {rng.choice(('', 'lin'))}(torch.stack({source}))")
            source += "_s"
        self.line(rng.choice(("for t in range(T):",) * 6 + ("for t in reversed(range(T)):",)))
        self.depth += 1
        self.line(packed[1])
        for v in states:
            if starts.get(v) == "None":
                self.line(f"if {v} is None:")
                self.line(f"    {v} = {rng.choice(STARTS[:5])}")
        usable = list(states)
        if line:
            usable += [f"{line}[{rng.randrange(-2, 2)}]" for _ in range(rng.randint(1, 2))]
        if source is not None:
            usable.append(f"{source}[t]")
        for _ in range(rng.randint(2, 7)):
            self.statement(usable, states)
        for v in rng.sample(states, rng.randint(1, len(states))):
            self.line(f"{v} = {self.value(usable, POINTWISE[:5])}")
        if rng.random() < 0.1:
            self.statement(usable, states)
        for out in collected:
            self.line(f"{out}.append({rng.choice(usable)})")
        self.line(packed[0])
        if line:
            self.line(rng.choice(MOVES).format(d=line, a=rng.choice(usable)))
        self.depth -= 1
        self.series += collected
        self.states = [*states, *[line] * bool(line), *{v.partition("[")[0] for v in states if v.endswith("]")}]

    def slots(self, count: int) -> list[str]:
        """Names of states that are parts of one tensor, along its first or second dim."""
        rng, name = self.rng, self.name("slots")
        along = rng.choice(("{n}, *x.shape[1:]", "{n}, *x.shape[1:]", "x.shape[1], {n}, *x.shape[2:]"))
        start = rng.choice(("x.new_zeros({s})", "torch.zeros({s}, dtype=x.dtype)", "torch.full(({s},), 0.25, dtype=x.dtype)"))
        is_given = along.startswith("{n}") and count <= self.steps and rng.random() < 0.3  # (a buffer)
        self.line(f"{name} = {'mem' if is_given else start.format(s=along.format(n=count + rng.randint(0, 1)))}")
        if rng.random() < 0.2:
            self.line(f"{name}.mul_(0.5)")
        return [f"{name}[{':, ' * along.startswith('x')}{k}]" for k in range(count)]

    def packed(self, states: list[str]) -> tuple[str, str]:
        """How two states become one tensor, and two again."""
        (a, b), name = states, self.name("packed")
        pack, unpack = self.rng.choice(PACKED)
        return pack.format(p=name, a=a, b=b), unpack.format(p=name, a=a, b=b)

    def value(self, usable: list[str], templates: tuple[str, ...] | None = None) -> str:
        rng = self.rng
        templates = templates or rng.choices((POINTWISE, READS, VIEWS, LAYERS), (6, 4, 1, 1))[0]
        return rng.choice(templates).format(a=rng.choice(usable), b=rng.choice(usable))

    def statement(self, usable: list[str], states: list[str]) -> None:
        rng, kind = self.rng, self.rng.random()
        written = [u for u in usable if not u.endswith("]") or "slots" in u]
        if kind < 0.62:
            target = rng.choice(states) if rng.random() < 0.35 else self.name("a")
            self.line(f"{target} = {self.value(usable)}")
            if target not in usable:
                usable.append(target)
        elif kind < 0.78:
            self.line(rng.choice(WRITES).format(v=rng.choice(written), a=rng.choice(usable)))
        elif kind < 0.84:
            self.line(rng.choice(INTO_SERIES).format(a=rng.choice(usable)))
        elif kind < 0.94:
            self.line(rng.choice(CONDITIONS))
            self.depth += 1
            self.line(f"{rng.choice(written)} = {self.value(usable)}")
            self.depth -= 1
        else:
            self.line(f"{rng.choice(written)} = {rng.choice(usable)}")


def source(seed: int) -> tuple[str, int]:
    """The text of ``f(x, y, k, b, buf, mem)``, and T."""
    rng = random.Random(seed)
    steps = rng.choice((2, 3, 4, 5, 5, 6, 8))
    writer = _Writer(rng, steps)
    writer.line(f"T = {steps}")
    size = rng.choice(("T, *x.shape[1:]", "T, *x.shape[1:]", "T, T, *x.shape[1:]"))
    writer.line(f"made = x.new_zeros({size}){'[0]' if size.startswith('T, T') else ''}")
    loops = rng.choice((1, 1, 1, 2))
    for i in range(loops):
        writer.loop(i == 0)
    results = [rng.choice(RESULTS).format(s=s) for s in writer.series]
    results += [s for s in writer.states if rng.random() < 0.4]
    if any("made" in line for line in writer.lines[2:]):
        results.append("made")
    writer.line(f"return [{', '.join(results)}]")
    return "\n".join(["def f(x, y, k, b, buf, mem):", *writer.lines]), steps


@dataclass
class Made:
    """A program, its layers and its operands, all new."""

    function: Callable[..., list[object]]
    operands: list[Tensor]
    layers: nn.Module

    def run(self, function: Callable[..., list[object]]) -> list[Tensor]:
        """Results, flat."""
        flat: list[Tensor] = []
        for result in function(*self.operands):
            flat += result if isinstance(result, list) else [result]
        return [torch.as_tensor(r) for r in flat]

    def buffers(self) -> list[Tensor]:
        return [*self.operands[4:], *self.layers.buffers()]

    def states(self) -> list[Tensor]:
        """What the program has left in attributes."""
        kept = {k: v for k, v in vars(self.layers.h).items() if k.startswith("v")}
        return [torch.as_tensor(kept[k]) for k in sorted(kept) if kept[k] is not None]

    def leaves(self) -> list[Tensor]:
        return [*self.operands[:4], *self.layers.parameters()]


def make(seed: int, text: str, steps: int, images: bool = False, dtype: torch.dtype = torch.float64) -> Made:
    """Operands are multiples of 1/8, so that most sums are exact in any order; `images`: layers are convolutional."""
    size = (FEATURES, *IMAGE) if images else (FEATURES,)
    generator = torch.Generator().manual_seed(seed)

    def eighths(*shape: int) -> Tensor:
        return torch.randint(-12, 17, shape, generator=generator).to(dtype) / 8

    layers = nn.Module()
    lin, bn = (nn.Conv2d, nn.BatchNorm2d) if images else (nn.Linear, nn.BatchNorm1d)
    layers.lin = lin(FEATURES, FEATURES, 3, padding=1, dtype=dtype) if images else lin(FEATURES, FEATURES, dtype=dtype)
    layers.bn = bn(FEATURES, dtype=dtype).train(seed % 3 == 0)
    layers.norm = nn.GroupNorm(2, FEATURES, dtype=dtype) if images else nn.LayerNorm(FEATURES, dtype=dtype)
    layers.pool = nn.AvgPool2d(3, 1, 1)
    layers.h = nn.Module()
    layers.seq = nn.Sequential(copy.deepcopy(layers.lin), nn.ReLU())
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(eighths(*p.shape))
    leaves = [eighths(steps, BATCH, *size), eighths(BATCH, steps, *size), eighths(1), eighths(BATCH, *size)]
    operands = [*(v.requires_grad_() for v in leaves), eighths(BATCH, *size), eighths(steps, BATCH, *size)]
    names = {"torch": torch, "spike": spike, "w": eighths(FEATURES, FEATURES), **dict(layers.named_children())}
    return Made(_function(text, f"<program {seed}>", names), operands, layers)


def _function(text: str, file: str, names: dict[str, object]) -> Callable[..., list[object]]:
    exec(compile(text, file, "exec"), names)
    return names["f"]  # type: ignore[return-value]


@functools.cache
def weights(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.linspace(0.5, 1.5, shape.numel(), dtype=dtype).view(shape)
