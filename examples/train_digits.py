"""Train a two-layer spiking classifier on handwritten digits with ``torch.compile(model, backend="snn")``.

    python examples/train_digits.py [--epochs 15] [--steps 16] [--output examples/out/digits.png]

The model is plain PyTorch: two linear layers and a Python loop over time for each neuron. The script trains it compiled,
prints what the compiler made of it, times it beside eager and beside Inductor, and draws one picture.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import snn_compile

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES, HIDDEN, BATCH = 10, 128, 64


class Spike(torch.autograd.Function):
    """Heaviside forward, the derivative of a sigmoid of slope 4 backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(4.0 * x)
        return grad * 4.0 * s * (1.0 - s)


class SpikingClassifier(nn.Module):
    """64 pixels -> 128 LIF neurons -> 10 leaky readouts; the class is the readout with the largest mean potential."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.readout = nn.Linear(64, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        current = self.hidden(pixels)  # [T, B, 128]
        v, spikes, trace = torch.zeros_like(current[0]), [], []
        for t in range(current.shape[0]):
            h = v + (current[t] - v) / 2.0  # charge
            s = Spike.apply(h - 1.0)  # fire
            v = h * (1.0 - s)  # reset
            spikes.append(s)
            trace.append(h)
        spikes = torch.stack(spikes)

        current = self.readout(spikes)  # [T, B, 10]
        u, potential = torch.zeros_like(current[0]), 0.0
        for t in range(current.shape[0]):
            u = 0.9 * u + current[t]
            potential = potential + u
        return potential / current.shape[0], spikes, torch.stack(trace)


def load(steps: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8x8 images as noisy currents that last `steps` steps: train [T, N, 64], labels, test [T, N, 64], labels."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, labels, test_size=0.25, random_state=seed, stratify=labels)
    x_train, x_test, y_train, y_test = (torch.tensor(a) for a in split)
    noise = torch.Generator().manual_seed(seed)

    def current(x: Tensor) -> Tensor:
        x = x.float().expand(steps, *x.shape)
        return x * 2.0 + 0.3 * torch.randn(x.shape, generator=noise)

    return current(x_train), y_train, current(x_test), y_test


def train_step(model, optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x)[0], y)
    loss.backward()
    optimizer.step()
    return loss.item()


def train(model, parameters, data, epochs: int, seed: int) -> list[float]:
    """Test accuracy after each epoch."""
    x_train, y_train, x_test, y_test = data
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    accuracies = []
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=epochs, unit="epoch", desc="training") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(y_train), generator=generator)
            for i in range(0, len(order) - BATCH + 1, BATCH):
                index = order[i : i + BATCH]
                loss = train_step(model, optimizer, x_train[:, index], y_train[index])
            with torch.no_grad():
                accuracies.append(float((model(x_test)[0].argmax(1) == y_test).float().mean()))
            bar.set_postfix(loss=f"{loss:.3f}", test_accuracy=f"{accuracies[-1]:.1%}")
            bar.update()
    return accuracies


def time_steps(model, x: Tensor, y: Tensor, repeats: int = 20) -> tuple[float, float]:
    """Seconds of the first training step and the median of the later ones."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def once() -> float:
        start = time.perf_counter()
        train_step(model, optimizer, x, y)
        return time.perf_counter() - start

    first = once()
    once()
    return first, statistics.median(once() for _ in range(repeats))


def compare(data) -> dict[str, tuple[float, float]]:
    """First-call and per-step time of one training step: eager, Inductor, snn."""
    x, y = data[0][:, :BATCH].contiguous(), data[1][:BATCH]
    times = {}
    for name in ("eager", "inductor", "snn"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = SpikingClassifier()
        if name == "inductor":
            print(f"compiling the unrolled loop of {len(x)} steps with Inductor alone, for comparison …", flush=True)
        times[name] = time_steps(model if name == "eager" else torch.compile(model, backend=name), x, y)
    return times


def print_times(times: dict[str, tuple[float, float]]) -> None:
    print(f"\n{'training step':>14} {'first call':>12} {'each step':>12} {'against eager':>15}")
    for name, (first, each) in times.items():
        print(f"{name:>14} {first:>10.2f} s {each * 1e3:>9.2f} ms {times['eager'][1] / each:>13.1f} x")


def draw(path: Path, model, data, accuracies: list[float], times: dict[str, tuple[float, float]]) -> None:
    """Spike raster, one neuron's potential, accuracy, times."""
    x, label = data[2][:, :1], int(data[3][0])
    with torch.no_grad():
        scores, spikes, trace = model(x)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    steps, neurons = spikes[:, 0].nonzero(as_tuple=True)
    axes[0, 0].scatter(steps, neurons, s=6, marker="|", color="black")
    axes[0, 0].set(title=f"spikes for a '{label}' (read as {int(scores.argmax())})", xlabel="step", ylabel="hidden neuron")
    axes[0, 0].set_xlim(-0.5, len(x) - 0.5)

    shown = int((spikes[:, 0].mean(0) - 0.4).abs().argmin())  # one that both fires and does not
    axes[0, 1].plot(trace[:, 0, shown], marker="o", label=f"neuron {shown}")
    axes[0, 1].axhline(1.0, linestyle="--", color="tab:red", label="threshold")
    axes[0, 1].set(title="membrane potential after charging", xlabel="step", ylabel="h")
    axes[0, 1].legend()

    axes[1, 0].plot(range(1, len(accuracies) + 1), [100 * a for a in accuracies], marker="o")
    axes[1, 0].axhline(95, linestyle=":", color="gray")
    axes[1, 0].set(title=f"test accuracy: {accuracies[-1]:.1%}", xlabel="epoch", ylabel="%")

    names = list(times)
    for axis, which, unit, scale in ((axes[1, 1], 1, "ms a training step", 1e3),):
        bars = axis.bar(names, [times[n][which] * scale for n in names], color=["tab:gray", "tab:orange", "tab:green"])
        axis.bar_label(bars, [f"{times[n][1] * 1e3:.1f} ms\nfirst call {times[n][0]:.1f} s" for n in names])
        axis.set(title="time of a training step", ylabel=unit)
        axis.margins(y=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=16, help="time steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "out" / "digits.png")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    data = load(args.steps, args.seed)
    model = SpikingClassifier()
    compiled = torch.compile(model, backend="snn")
    start = time.perf_counter()
    accuracies = train(compiled, model.parameters(), data, args.epochs, args.seed)
    print(f"test accuracy {accuracies[-1]:.1%} after {time.perf_counter() - start:.0f} s, compilation included\n")

    print(snn_compile.explain(model)(data[0][:, :BATCH]))
    times = compare(data)
    print_times(times)
    draw(args.output, model, data, accuracies, times)
    print(f"\npicture: {args.output}")


if __name__ == "__main__":
    main()
