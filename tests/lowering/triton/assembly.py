"""Compile a kernel for a device that is not here, and read registers, spills and access widths from the result."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from snn_compile.lowering.triton.channel_kernel import channel_options
from snn_compile.lowering.triton.heuristics import Tile, lanes_and_steps
from snn_compile.lowering.triton.load import load_module
from snn_compile.lowering.triton.target import compile_options
from snn_compile.lowering.triton.text import KernelText

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
DEVICES = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


@dataclass(frozen=True)
class Assembly:
    text: str
    #: Triton's own representation, with the layouts of values over threads
    ttgir: str
    registers: int
    spills: int


def compile_for(device: str, text: KernelText, *, aligned: bool = True, warps: int = 4) -> Assembly:
    warp_size = DEVICES[device][2]
    lanes, segment = lanes_and_steps(text.accessed, text.kept)
    constants: dict[str, Any] = {"BLOCK": lanes * warps * warp_size}
    if text.segmented:
        constants["SEGMENT"] = segment
    return _compile(device, text, constants, {"num_warps": warps, **compile_options(hip=_is_hip(device))}, aligned)


def compile_channels(device: str, text: KernelText, tile: Tile, channels: int, *, aligned: bool = True) -> Assembly:
    """A kernel of `lowering/triton/by_channel.py`."""
    constants = {"BLOCK": tile.block, "CHANNELS": channels}
    return _compile(device, text, constants, channel_options(tile, hip=_is_hip(device)), aligned)


def _is_hip(device: str) -> bool:
    return DEVICES[device][0] == "hip"


def _compile(device: str, text: KernelText, constants: dict[str, Any], options: dict[str, Any], aligned: bool) -> Assembly:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(load_module(text.source), text.name)
    signature: dict[str, str] = {}
    for argument in text.arguments:
        int_type = "i64" if argument.kind in ("N", "stride", "time_stride") else "i32"
        signature[argument.name] = TYPES[argument.dtype] if argument.dtype is not None else int_type
    constants = {**constants, "INDEX": tl.int32}
    signature |= dict.fromkeys(constants, "constexpr")
    divisible = [["tt.divisibility", 16]]
    attributes = {(i,): divisible for i, a in enumerate(text.arguments) if aligned and a.aligned}
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget(*DEVICES[device]), options=options)
    return _read_hip(compiled) if _is_hip(device) else _read_cuda(compiled)


def _read_cuda(compiled: Any) -> Assembly:
    import triton

    cuobjdump = Path(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    use = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return Assembly(compiled.asm["ptx"], compiled.asm["ttgir"], int(use["REG"]), int(use["STACK"]) + int(use["LOCAL"]))


def _read_hip(compiled: Any) -> Assembly:
    text = compiled.asm["amdgcn"]
    # a scalar register is spilled to a lane of a vector register, not to memory
    use = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text))
    spills = int(use["vgpr_spill_count"]) + int(use["private_segment_fixed_size"])
    return Assembly(text, compiled.asm["ttgir"], int(use["vgpr_count"]), spills)
