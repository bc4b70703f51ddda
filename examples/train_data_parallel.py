"""Train one spiking network in several processes, with `DistributedDataParallel` and ``backend="snn"``.

    torchrun --nproc-per-node 2 examples/train_data_parallel.py        (two processes, half of each batch in each)
    python examples/train_data_parallel.py                             (one process: the same losses)

Order matters: the module is wrapped in `DistributedDataParallel` first and compiled then, so that the compiler sees where
gradients are exchanged. Each process prints the loss of the whole batch.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from snn_compile import functional, neuron

STEPS, BATCH, FEATURES, CLASSES = 6, 8, 12, 5


def make_network() -> nn.Module:
    """Two dense layers with a LIF and a parametric LIF neuron, over [T, B, features]."""
    torch.manual_seed(0)  # the same weights in all processes
    return nn.Sequential(
        nn.Linear(FEATURES, 16),
        neuron.LIFNode(step_mode="m"),
        nn.Linear(16, CLASSES),
        neuron.ParametricLIFNode(step_mode="m", v_threshold=0.1),
    )


def make_data(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This process's share of one random batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(STEPS, BATCH, FEATURES, generator=generator) * 12
    y = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    return x[:, rank::world], y[rank::world]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    epochs = parser.parse_args().epochs
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    network = make_network()
    if world > 1:
        dist.init_process_group("gloo")  # on GPUs: "nccl", and network.to(local rank)
    model = torch.compile(DistributedDataParallel(network) if world > 1 else network, backend="snn")
    optimizer = torch.optim.SGD(network.parameters(), 0.5)
    x, y = make_data(rank, world)
    for epoch in range(epochs):
        functional.reset_net(network)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).mean(0), y)
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        print(f"rank {rank} epoch {epoch} loss {float(total) / world:.5f}", flush=True)
    if world > 1:
        dist.barrier()  # none leaves while another still talks to it
        dist.destroy_process_group()
        os._exit(0)  # gloo's threads may outlive the interpreter, which then waits for ever (torch 2.13)


if __name__ == "__main__":
    main()
