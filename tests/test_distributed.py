"""Data-parallel training over gloo in two processes: the losses of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from snn_compile.lowering.cpp import compiler

pytestmark = pytest.mark.skipif(
    compiler.missing() is not None or not torch.distributed.is_available(), reason="no C++ compiler, or no torch.distributed"
)

SCRIPT = """
    import os
    import sys

    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from snn_compile import functional, layer, neuron
    from snn_compile.backend import snn

    rank, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    nodes = neuron.LIFNode(step_mode="m"), neuron.ParametricLIFNode(step_mode="m", v_threshold=0.1)
    net = nn.Sequential(nn.Linear(12, 16), nodes[0], nn.Linear(16, 5), nodes[1])
    x, y = torch.rand(6, 8, 12) * 12, torch.randint(0, 5, (8,))
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
        model = DistributedDataParallel(net)
        x, y = x[:, rank::world], y[rank::world]
    else:
        model = net
    model = torch.compile(model, backend=snn)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(4):
        functional.reset_net(net)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).mean(0), y)
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        print(f"{float(total) / world:.5f}")
    if world > 1:
        dist.barrier()  # neither leaves while the other still talks to it
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads may outlive the interpreter, and abort
"""


def losses(folder: Path, world: int) -> list[list[float]]:
    script = folder / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(script)]
    runs = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    found = []
    for process in runs:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        found.append([float(line) for line in out.split()])
    return found


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    (alone,) = losses(tmp_path, 1)
    first, second = losses(tmp_path, 2)
    assert first == second and len(first) == 4
    assert first == pytest.approx(alone, abs=1e-4)
    assert alone[-1] < alone[0]
