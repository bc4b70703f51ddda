"""Open Neuromorphic's benchmark of frameworks - one dense layer of N to N and LIF neurons, B=16, T=500 - in one run.

    python benchmarks/open_neuromorphic.py [--device cuda] [--update] [N=...]

Every framework runs its own LIF neuron the way its documentation does, so equations and surrogates differ; what they share is
the work: a product of matrices, 500 steps of a leaky integrator with threshold and reset, and the gradient of the weights.
`snn` runs beside the same module in eager and must give its spikes and gradients. Inductor is left out: it unrolls 500 steps.
https://open-neuromorphic.org/blog/spiking-neural-network-framework-benchmarking/
"""

from __future__ import annotations

import os
from collections.abc import Callable

import _harness as h
import torch
from _device import moved
from _gate import Limits
from neurons import Steps
from torch import Tensor, nn

from snn_compile import neuron
from snn_compile.backend import snn

BATCH, STEPS = 16, 500
SIZES = {"cpu": (512,), "cuda": (512, 4096, 16384)}

#: ``run(x) -> spikes``, both ``[T, B, N]``, and a module whose parameters get gradients
Model = tuple[Callable[[Tensor], Tensor], nn.Module]


def own(n: int, backend: object = None) -> Model:
    model = nn.Sequential(nn.Linear(n, n), neuron.LIFNode(step_mode="m"))
    run = model if backend is None else torch.compile(model, backend=backend)  # type: ignore[call-overload]

    def step(x: Tensor) -> Tensor:
        model[1].reset()  # type: ignore[operator]
        return run(x)  # type: ignore[no-any-return]

    return step, model


def spikingjelly(n: int) -> Model:
    from spikingjelly.activation_based import functional, neuron

    model = nn.Sequential(nn.Linear(n, n), neuron.LIFNode(step_mode="m"))

    def step(x: Tensor) -> Tensor:
        functional.reset_net(model)
        return model(x)  # type: ignore[no-any-return]

    return step, model


def snntorch(n: int) -> Model:
    import snntorch

    lif = snntorch.Leaky(beta=0.95)
    model = nn.Sequential(nn.Linear(n, n), Steps(lif, lif.init_leaky))
    return model, model


def norse(n: int) -> Model:
    import norse.torch as norse

    model = nn.Sequential(nn.Linear(n, n), Steps(norse.LIFBoxCell()))
    return model, model


def sinabs(n: int) -> Model:
    import sinabs.layers as layers

    model = nn.Sequential(nn.Linear(n, n), layers.LIF(tau_mem=20.0))

    def step(x: Tensor) -> Tensor:
        model[1].reset_states()  # type: ignore[operator]
        return model(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]

    return step, model


def spyx(n: int, x: Tensor) -> h.Step:
    """JAX, compiled by XLA, on the same device: one training step."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # (JAX would take three quarters of the GPU's memory)
    import jax
    import spyx.nn
    from flax import nnx

    if (jax.default_backend() == "cpu") != (x.device.type == "cpu"):
        raise RuntimeError(f"JAX runs on its {jax.default_backend()} here, not on {x.device.type}")
    jax.config.update("jax_default_matmul_precision", "highest")  # (as in PyTorch; JAX would round to TF32 on a GPU)
    rngs = nnx.Rngs(0)
    model = spyx.nn.Sequential(nnx.Linear(n, n, rngs=rngs), spyx.nn.LIF((n,), beta=0.95, rngs=rngs))
    given = jax.numpy.asarray(x.cpu().numpy())

    @nnx.jit
    def gradient(model, given):  # type: ignore[no-untyped-def]
        return nnx.grad(lambda m: spyx.nn.run(m, given)[0].sum())(model)

    def step() -> list[Tensor]:
        jax.block_until_ready(gradient(model, given))
        return []

    return step


MAKERS: dict[str, Callable[[int], Model]] = {
    "eager": own,
    "snn": lambda n: own(n, snn),
    "spikingjelly": spikingjelly,
    "snntorch": snntorch,
    "norse": norse,
    "sinabs": sinabs,
}


def training_step(make: Callable[[int], Model], n: int, x: Tensor) -> h.Step:
    torch.manual_seed(0)
    run, module = make(n)
    moved(module, x.device)

    def step() -> list[Tensor]:
        module.zero_grad()
        spikes = run(x)
        spikes.sum().backward()
        return [spikes, *(p.grad for p in module.parameters() if p.grad is not None)]

    return step


def measure(name: str, n: int, device: torch.device) -> list[dict[str, str]]:
    x = 5.0 * torch.rand(STEPS, BATCH, n, generator=torch.Generator(device).manual_seed(0), device=device)  # (neurons fire)
    makers = {framework: lambda make=make: training_step(make, n, x) for framework, make in MAKERS.items()}  # type: ignore[misc]
    makers["spyx"] = lambda: spyx(n, x)
    # (a GPU's product of matrices may add up in another order in the compiled layer)
    limits = Limits() if device.type == "cpu" else Limits(equal=0.999, gradient=1e-2)
    contest = h.contest(makers, device, limits, name)
    times = h.interleaved(contest.steps, device)
    reference = h.medians(times)["snn"]

    def values(framework: str) -> dict[str, str]:
        return {
            "first_call_s": f"{contest.first[framework]:.1f}",
            **h.summary(times[framework]),
            "snn_is_faster_by": f"{h.medians(times)[framework] / reference:.1f}",
            "spikes_per_step": f"{contest.agreement[framework].mean:.3f}",
        }

    return contest.rows({"N": str(n)}, values)


COLUMNS = ["N", "framework", "first_call_s", "median_ms", "snn_is_faster_by", "spikes_per_step"]


def main() -> None:
    def rows(device: torch.device) -> dict[str, int]:
        return {f"N={n}": n for n in SIZES[device.type]}

    h.run("open_neuromorphic", rows, measure, COLUMNS, h.arguments(__doc__).parse_args())


if __name__ == "__main__":
    main()
