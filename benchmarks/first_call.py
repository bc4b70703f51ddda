"""First call (forward and backward) beyond Dynamo's own trace, against T.

    python benchmarks/first_call.py

Dynamo's trace of the same function, compiled with ``backend="eager"``, is taken off. The first process starts with an empty
cache and has compiled something else before; the second finds the caches warm. Inductor beside it up to T = 64. `snn_scan_s`:
the whole first call of the same neuron written as a `scan`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from _harness import lif_index, lif_scan, machine, markdown, write
from torch import Tensor

LANES = 4096


def first_call(backend: str, steps: int, function: Callable[[Tensor], Tensor] = lif_index) -> float:
    torch._dynamo.reset()
    x = torch.randn(steps, LANES, requires_grad=True)
    start = time.perf_counter()
    torch.compile(function, backend=backend)(x).sum().backward()
    return time.perf_counter() - start


def in_this_process(steps: list[int], inductor: list[int]) -> list[dict[str, str]]:
    import snn_compile  # noqa: F401

    warm = torch.compile(lambda a: (a * 2 + 1).sum(), backend="inductor")
    warm(torch.randn(8, requires_grad=True)).backward()
    rows = []
    for t in steps:
        trace = min(first_call("eager", t) for _ in range(2))
        row = {"T": str(t), "dynamo_s": f"{trace:.2f}", "snn_beyond_dynamo_s": f"{first_call('snn', t) - trace:.2f}"}
        row["snn_scan_s"] = f"{first_call('snn', t, lif_scan):.2f}"
        row["inductor_beyond_dynamo_s"] = f"{first_call('inductor', t) - trace:.1f}" if t in inductor else ""
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--inductor", type=int, nargs="*", default=[8, 16, 32, 64])
    args = parser.parse_args()
    if args.child:
        print(json.dumps(in_this_process(args.steps, args.inductor)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for process, inductor in (("cold caches", args.inductor), ("second process, warm caches", [])):
            command = [sys.executable, __file__, "--child", "--steps", *map(str, args.steps)]
            command += ["--inductor", *map(str, inductor)]
            env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
            rows += [{"process": process, **row, **machine()} for row in json.loads(out.splitlines()[-1])]
    print(markdown(rows, ["process", "T", "dynamo_s", "snn_beyond_dynamo_s", "inductor_beyond_dynamo_s", "snn_scan_s"]))
    print(write("first_call", rows))


if __name__ == "__main__":
    main()
