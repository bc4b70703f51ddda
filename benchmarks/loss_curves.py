"""Losses of 200 training steps on digits, eager and compiled, three seeds: ``python benchmarks/loss_curves.py``.

The network of snnTorch's tutorial (64-128-10, `Leaky`, 100 steps of time), on rate-coded digits of scikit-learn. Batching the
layers over time rounds their sums differently, so single spikes may differ; the question is whether the curves do by more than
those of two seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from _device import machine
from _results import write
from network_models import SnnTorchTutorial
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from snn_compile.backend import snn

SEEDS, UPDATES, STEPS, BATCH = (0, 1, 2), 200, 100, 64


def losses(seed: int, net: nn.Module, run: Callable[[Tensor], Tensor]) -> list[float]:
    """Of `run`, which is `net` or compiled from it, trained anew from this seed's parameters."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    classes = torch.tensor(digits.target)
    torch.manual_seed(seed)
    for layer in (net.fc1, net.fc2):
        layer.reset_parameters()  # type: ignore[operator, union-attr]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(UPDATES):
        chosen = torch.randint(0, len(images), (BATCH,), generator=generator)
        spikes = torch.bernoulli(images[chosen].expand(STEPS, -1, -1), generator=generator)
        loss = F.cross_entropy(run(spikes), classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main() -> None:
    net, compiled = SnnTorchTutorial(), SnnTorchTutorial()
    runs = {"eager": (net, net), "snn": (compiled, torch.compile(compiled, backend=snn))}  # (compiled once for all seeds)
    curves = {(seed, name): losses(seed, *pair) for seed in SEEDS for name, pair in runs.items()}
    about = machine()
    rows = [
        {"seed": str(seed), "framework": name, "update": str(i), "loss": f"{loss:.6f}", **about}
        for (seed, name), curve in curves.items()
        for i, loss in enumerate(curve)
    ]
    write("loss_curves", rows)
    between = [abs(a - b) for s in SEEDS for a, b in zip(curves[s, "eager"], curves[s, "snn"], strict=True)]
    of_seeds = [abs(a - b) for a, b in zip(curves[0, "eager"], curves[1, "eager"], strict=True)]
    print(f"eager and compiled, same seed: mean {statistics.mean(between):.1e}, largest {max(between):.1e}")
    print(f"two seeds, eager: mean {statistics.mean(of_seeds):.1e}, largest {max(of_seeds):.1e}")


if __name__ == "__main__":
    main()
