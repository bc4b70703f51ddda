"""All benchmarks of a device, each in its own process, then the tables and pictures: ``make bench``, ``make bench-gpu``.

python benchmarks/run.py [--device cuda] [--all] [part ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from _device import SUFFIX, chosen

HERE = Path(__file__).parent
#: parts that measure any device, and those about the CPU's kernels and the compiler itself
ANY_DEVICE = ("neurons", "networks", "stepped", "folding", "open_neuromorphic", "memory")
CPU_ONLY = ("spike_products", "lif_training", "first_call")
#: minutes, of which no speed comes: when it is named, or with `--all`
LONG = ("loss_curves",)
#: parts with longer runs behind `--all`
HAVE_MORE = ("first_call",)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=SUFFIX, default="cpu")
    parser.add_argument("--all", action="store_true", help="the longest runs, too")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(ANY_DEVICE + CPU_ONLY + LONG)}")
    args = parser.parse_args()
    usual = ANY_DEVICE + CPU_ONLY * (args.device == "cpu")
    known = usual + LONG * (args.device == "cpu")
    for part in args.parts:
        if part not in known:
            parser.error(f"no part {part!r} on {args.device}; there are {', '.join(known)}")
    args.parts = args.parts or (known if args.all else usual)
    return args


def command(part: str, args: argparse.Namespace) -> list[str]:
    device = ["--device", args.device] if part in ANY_DEVICE else []
    return [sys.executable, str(HERE / f"{part}.py"), *device, *["--all"] * (args.all and part in HAVE_MORE)]


def main() -> None:
    args = parse()
    chosen(args.device)
    seconds, failed = {}, []
    for part in args.parts:
        print(f"\n## {part}\n", flush=True)
        start = time.perf_counter()
        if subprocess.run(command(part, args)).returncode:
            failed.append(part)
        seconds[part] = time.perf_counter() - start
    print()
    for part, s in {**seconds, "in all": sum(seconds.values())}.items():
        print(f"{part:20}{s:6.0f} s", flush=True)
    for name in ("charts", "render"):
        subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=True)
    if failed:
        raise SystemExit(f"failed, in whole or in part: {', '.join(failed)}")


if __name__ == "__main__":
    main()
