"""First call (forward and backward) beyond Dynamo's own trace, against T.

    python benchmarks/first_call.py [--all]

Dynamo's trace is what its own clock says: all but the time inside of the backend. The first process starts with an empty cache
and has compiled something else before; the second finds the caches warm. Inductor beside it at T = 8 and 32. `snn_scan_s`: the
whole first call of the same neuron written as a `scan`. `--all`: Inductor at T = 16 and 64, the second process beyond T = 256.
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
from _device import machine
from _loops import lif_index, lif_scan
from _results import markdown, write
from torch import Tensor
from torch._dynamo.utils import compilation_time_metrics

LANES = 4096
CALL_OF_BACKEND = "OutputGraph.call_user_compiler"


def first_call(backend: str, steps: int, function: Callable[[Tensor], Tensor] = lif_index) -> tuple[float, float]:
    """Seconds of forward and backward, and those of them that are Dynamo's trace."""
    torch._dynamo.reset()
    compilation_time_metrics.clear()
    x = torch.randn(steps, LANES, requires_grad=True)
    start = time.perf_counter()
    torch.compile(function, backend=backend)(x).sum().backward()
    whole = time.perf_counter() - start
    in_dynamo, in_backend = (sum(compilation_time_metrics[name]) for name in ("_compile.compile_inner", CALL_OF_BACKEND))
    return whole, in_dynamo - in_backend


def in_this_process(steps: list[int], inductor: list[int]) -> list[dict[str, str]]:
    import snn_compile  # noqa: F401

    warm = torch.compile(lambda a: (a * 2 + 1).sum(), backend="inductor")
    warm(torch.randn(8, requires_grad=True)).backward()
    rows = []
    for t in steps:
        whole, trace = first_call("snn", t)
        row = {"T": str(t), "dynamo_s": f"{trace:.2f}", "snn_beyond_dynamo_s": f"{whole - trace:.2f}"}
        row["snn_scan_s"] = f"{first_call('snn', t, lif_scan)[0]:.2f}"
        whole, trace = first_call("inductor", t) if t in inductor else (0.0, 0.0)
        row["inductor_beyond_dynamo_s"] = f"{whole - trace:.1f}" if t in inductor else ""
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--inductor", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--all", action="store_true", help="the points that take minutes, too")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(in_this_process(args.steps, args.inductor)))
        return
    processes = {
        "cold caches": (args.steps, sorted({*args.inductor, *(16, 64) * args.all})),
        "second process, warm caches": ([t for t in args.steps if args.all or t <= 256], []),
    }
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for process, (steps, inductor) in processes.items():
            command = [sys.executable, __file__, "--child", "--steps", *map(str, steps)]
            command += ["--inductor", *map(str, inductor)]
            env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
            rows += [{"process": process, **row, **machine()} for row in json.loads(out.splitlines()[-1])]
    print(markdown(rows, ["process", "T", "dynamo_s", "snn_beyond_dynamo_s", "inductor_beyond_dynamo_s", "snn_scan_s"]))
    print(write("first_call", rows))


if __name__ == "__main__":
    main()
