"""Channel kernels: interpreted against eager, compiled for devices that are not here, their text, what does not run so."""

from __future__ import annotations

import contextlib
import copy
import re

import expecttest
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from snn_compile.config import Config
from snn_compile.explain import describe_stepped
from snn_compile.lowering import by_channel
from snn_compile.lowering.triton import channel_kernel
from snn_compile.lowering.triton.channel_layout import lay_out, place
from snn_compile.lowering.triton.heuristics import channel_tile, fills_device
from snn_compile.pipeline import run_pipeline
from tests.lowering.channel_layers import LAYERS, Layer, run
from tests.lowering.triton import channel_checks
from tests.lowering.triton.assembly import compile_channels
from tests.lowering.triton.channel_checks import SHAPES, InterpretedTarget, check, compiled, kernels, kernels_run
from tests.passes.capture import Spike

# ---------------------------------------------------------------------------------------------------- against eager


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer(interpreted, layer, tiled):
    interpreted(check, layer, "odd sizes", tiled=tiled, calls=2 if layer == "hard reset" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("size", [s for s in SHAPES if s != "odd sizes"])
def test_every_size(interpreted, size, tiled):
    interpreted(check, "hard reset", size, tiled=tiled)


@pytest.mark.parametrize(
    ("layout", "size"),
    [("channels last", "odd sizes"), ("channels last", "more channels"), ("strided", "odd sizes"), ("unaligned", "neurons")],
)
@pytest.mark.parametrize("tiled", [False, True])
def test_every_layout(interpreted, layout, size, tiled):
    interpreted(check, "raw potential carried", size, layout, tiled)


def _wide_indices() -> None:
    import triton.language as tl

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel_kernel, "_index_type", lambda places, shape: tl.int64)
        for tiled in (False, True):
            check("hard reset", "odd sizes", "channels last", tiled)


def test_offsets_beyond_32_bits(interpreted):
    interpreted(_wide_indices)


def _without_gradients() -> None:
    torch.manual_seed(0)
    eager = Layer(SHAPES["odd sizes"][2])
    ours = copy.deepcopy(eager)
    found: list[str] = []
    x, v, _ = channel_checks.inputs(SHAPES["odd sizes"], "contiguous", "cpu")
    channel_checks.targets._target = lambda kind: InterpretedTarget()  # type: ignore[assignment]
    with torch.no_grad(), kernels_run(found):
        expected, results = eager(x, v), compiled(ours)(x, v)
    assert found == ["forward"] and torch.equal(results[0], expected[0])
    torch.testing.assert_close(results[1], expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.norm.running_var, eager.norm.running_var)


def test_without_gradients(interpreted):
    interpreted(_without_gradients)


class Other(Layer):
    """Looks almost like one."""

    def __init__(self, case):
        super().__init__(6)
        self.case = case

    def step(self, v, x):
        if self.case == "a layer norm beside it":
            v = F.layer_norm(v, v.shape[1:])
        h = F.instance_norm(v + x) if self.case == "statistics of one sample" else self.norm(v * 0.5 + x)
        s = Spike.apply(h - 0.5)
        return s, h * (1.0 - s)


def _runs_by_steps(case: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float64 if case == "fp64" else torch.float32
    eager = Other(case).to(dtype)
    x, v, weights = (i.to(dtype) for i in channel_checks.inputs((5, 3, 6, 4, 4), "contiguous", "cpu"))
    if case == "rows of other strides":
        x = torch.stack([x, x], -1)[..., 0].transpose(-1, -2).contiguous().transpose(-1, -2)
    ours = copy.deepcopy(eager)
    found: list[str] = []
    channel_checks.targets._target = lambda kind: InterpretedTarget()  # type: ignore[assignment]
    with kernels_run(found):
        (expected, last), _ = run(eager, x, v, weights)
        (spikes, ours_last), _ = run(compiled(ours), x, v, weights)
    assert not found or (case == "rows of other strides" and found == ["backward"])
    torch.testing.assert_close(spikes, expected)
    torch.testing.assert_close(ours_last, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["fp64", "a layer norm beside it", "statistics of one sample", "few channels"])
def test_near_misses_run_step_by_step(interpreted, case):
    interpreted(_runs_by_steps, case) if case != "few channels" else interpreted(_too_few_channels)


def _too_few_channels() -> None:
    """Many values in each of few channels, on a device of many processors."""
    with pytest.MonkeyPatch.context() as patch, channel_checks.small_tiles(True):
        patch.setattr(channel_kernel, "processors", lambda device: 132)
        _runs_by_steps("few channels")


def test_where_channels_pay():
    assert fills_device(4096, 3, 132)  # they fit into registers: one launch, whatever stands idle
    assert not fills_device(1 << 16, 64, 132) and fills_device(1 << 16, 66, 132)
    assert fills_device(1 << 16, 1, 0)  # nothing is known of the device


@pytest.mark.parametrize(("processors", "beside"), [(0, 8), (16, 8), (17, 4), (64, 2), (132, 1)])
def test_channels_of_a_program_fill_the_device(processors, beside):
    value = torch.empty(2, 64, 3, 3).to(memory_format=torch.channels_last)
    found = place(value, False, False, value.shape)
    assert lay_out([found], value.shape, processors).key.channels == beside
    assert lay_out([place(value.contiguous(), False, False, value.shape)], value.shape, processors).key.channels == 1


def test_the_report_says_so(monkeypatch):
    monkeypatch.setattr(channel_checks.targets, "_target", lambda kind: InterpretedTarget())
    reports = []

    def backend(gm, inputs, **_):
        reports.append(run_pipeline(gm, Config())[1])
        return lambda *args: args

    torch._dynamo.reset()
    with contextlib.suppress(Exception):  # nothing is computed
        torch.compile(Layer(16), backend=backend)(torch.randn(4, 16, 16, 16, 16), torch.zeros(16, 16, 16, 16))
    text = describe_stepped(reports[0].stepped[0])
    assert "channel by channel" in text and re.search(r"target +triton", text)


def test_which_steps_become_channel_kernels_on_a_gpu(monkeypatch):
    monkeypatch.setattr(channel_kernel, "processors", lambda device: 132)
    with torch._subclasses.FakeTensorMode():
        shape = 64, 128, 32, 32
        assert by_channel.suits_channels(torch.empty(shape, device="cuda"))
        assert by_channel.suits_channels(torch.empty(shape, device="cuda", memory_format=torch.channels_last))
        assert by_channel.suits_channels(torch.empty(32, 10, device="cuda"))
        assert not by_channel.suits_channels(torch.empty(64, 64, 32, 32, device="cuda"))
        assert not by_channel.suits_channels(torch.empty(shape, device="cuda", dtype=torch.bfloat16))


# ------------------------------------------------------------------------------------------------------- the text


class Goldens(expecttest.TestCase):
    maxDiff = None

    def test_forward(self) -> None:
        text, _, _ = kernels("hard reset", (4, 2, 3, 4, 4))["forward"]
        self.assertExpectedInline(
            text.source,
            """\
import triton
import triton.language as tl


# loop_00_forward: all steps of a channel at a time
@triton.jit
def loop_00_forward(
    v_ptr,
    running_mean_ptr,
    running_var_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    s_seq_ptr,
    v_seq_ptr,
    mean_seq_ptr,
    invstd_seq_ptr,
    v_final_ptr,
    running_mean_final_ptr,
    running_var_final_ptr,
    T,
    rows,
    inner,
    channels,
    running_mean_stride_c: tl.int64,
    running_var_stride_c: tl.int64,
    x_stride_t: tl.int64,
    weight_stride_c: tl.int64,
    bias_stride_c: tl.int64,
    s_seq_stride_t: tl.int64,
    v_seq_stride_t: tl.int64,
    mean_seq_stride_t: tl.int64,
    mean_seq_stride_c: tl.int64,
    invstd_seq_stride_t: tl.int64,
    invstd_seq_stride_c: tl.int64,
    running_mean_final_stride_c: tl.int64,
    running_var_final_stride_c: tl.int64,
    stride_r,
    stride_c,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    beside = tl.arange(0, CHANNELS)[None, :]
    channel = program.to(INDEX) * CHANNELS + beside
    exists = channel < channels
    count = rows * inner
    size = count.to(tl.float32)
    offset = tl.arange(0, BLOCK)[:, None].to(INDEX)
    lane = offset
    inside = (lane < count) & exists
    row = lane // inner
    column = lane % inner
    lanes = row * stride_r + channel * stride_c + column
    v = tl.load(v_ptr + lanes, mask=inside)
    running_mean = tl.load(running_mean_ptr + channel * running_mean_stride_c, mask=exists)
    running_var = tl.load(running_var_ptr + channel * running_var_stride_c, mask=exists)
    weight = tl.load(weight_ptr + channel * weight_stride_c, mask=exists)
    bias = tl.load(bias_ptr + channel * bias_stride_c, mask=exists)
    for t in range(T):
        x = tl.load(x_ptr + t * x_stride_t + lanes, mask=inside)
        add = v + (x - v) * 0.5
        mean = tl.div_rn(tl.sum(tl.where(inside, add, 0.0), 0, keep_dims=True), size)
        distance = tl.where(inside, add - mean, 0.0)
        variance = tl.div_rn(tl.sum(distance * distance, 0, keep_dims=True), size)
        invstd = tl.div_rn(1.0, tl.sqrt_rn(variance + 1e-05))
        next_mean = running_mean * 0.7 + mean * 0.3
        sub = tl.div_rn(1.0, (invstd * invstd)) - 1e-05
        next_var = running_var * 0.7 + sub * 1.032258 * 0.3
        normalised = tl.fma(weight * (add - mean), invstd, bias)
        arg = normalised - 0.5
        s = (arg >= 0.0).to(tl.float32)
        v_1 = normalised * (1.0 - s)
        tl.store(s_seq_ptr + t * s_seq_stride_t + lanes, s, mask=inside)
        tl.store(v_seq_ptr + t * v_seq_stride_t + lanes, v_1, mask=inside)
        tl.store(mean_seq_ptr + t * mean_seq_stride_t + channel * mean_seq_stride_c, mean, mask=exists)
        tl.store(invstd_seq_ptr + t * invstd_seq_stride_t + channel * invstd_seq_stride_c, invstd, mask=exists)
        v = v_1
        running_mean = next_mean
        running_var = next_var
    tl.store(v_final_ptr + lanes, v, mask=inside)
    tl.store(running_mean_final_ptr + channel * running_mean_final_stride_c, running_mean, mask=exists)
    tl.store(running_var_final_ptr + channel * running_var_final_stride_c, running_var, mask=exists)
""",
        )

    def test_backward(self) -> None:
        text, _, _ = kernels("no weights", (4, 2, 3, 4, 4))["backward"]
        self.assertExpectedInline(
            text.source,
            """\
import triton
import triton.language as tl


# loop_00_backward: all steps of a channel at a time
@triton.jit
def loop_00_backward(
    v_after_ptr,
    v_ptr,
    x_ptr,
    kept_ptr,
    kept_1_ptr,
    grad_v_ptr,
    grad_s_ptr,
    grad_v_final_ptr,
    div_seq_ptr,
    T,
    rows,
    inner,
    channels,
    v_after_stride_t: tl.int64,
    x_stride_t: tl.int64,
    kept_stride_t: tl.int64,
    kept_stride_c: tl.int64,
    kept_1_stride_t: tl.int64,
    kept_1_stride_c: tl.int64,
    grad_s_stride_t: tl.int64,
    div_seq_stride_t: tl.int64,
    stride_r,
    stride_c,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    beside = tl.arange(0, CHANNELS)[None, :]
    channel = program.to(INDEX) * CHANNELS + beside
    exists = channel < channels
    count = rows * inner
    size = count.to(tl.float32)
    offset = tl.arange(0, BLOCK)[:, None].to(INDEX)
    lane = offset
    inside = (lane < count) & exists
    row = lane // inner
    column = lane % inner
    lanes = row * stride_r + channel * stride_c + column
    grad_v = tl.load(grad_v_ptr + lanes, mask=inside)
    for i in range(T):
        t = T - 1 - i
        kept = tl.load(kept_ptr + t * kept_stride_t + channel * kept_stride_c, mask=exists)
        kept_1 = tl.load(kept_1_ptr + t * kept_1_stride_t + channel * kept_1_stride_c, mask=exists)
        mul = kept * -1.0 * kept_1
        x = tl.load(x_ptr + t * x_stride_t + lanes, mask=inside)
        v_first = tl.load(v_ptr + lanes, mask=inside & (t == 0))
        v = tl.load(v_after_ptr + (t - 1) * v_after_stride_t + lanes, mask=inside & (t > 0), other=v_first)
        add = v + (x - v) * 0.5
        grad_s = tl.load(grad_s_ptr + t * grad_s_stride_t + lanes, mask=inside)
        addcmul = tl.fma(add, kept_1, mul)
        arg = addcmul - 0.5
        s = (arg >= 0.0).to(tl.float32)
        add_1 = tl.abs(arg) + 1.0
        div = tl.div_rn(grad_s + grad_v * addcmul * -1.0, add_1 * add_1)
        add_2 = grad_v * (1.0 - s) + div
        total = tl.sum(tl.where(inside, add_2, 0.0), 0, keep_dims=True)
        product = tl.sum(tl.where(inside, add_2 * (add - kept), 0.0), 0, keep_dims=True)
        center = tl.div_rn(total, size)
        slope = tl.div_rn(product, size) * kept_1 * kept_1
        factor = kept_1
        grad_weight = product * kept_1
        grad_h = (add_2 - center - (add - kept) * slope) * factor
        div_1 = grad_h * 0.5
        add_3 = grad_h + div_1 * -1.0
        tl.store(div_seq_ptr + t * div_seq_stride_t + lanes, div_1, mask=inside)
        grad_v = add_3
    tl.store(grad_v_final_ptr + lanes, grad_v, mask=inside)
""",
        )

    def test_forward_over_tiles(self) -> None:
        text, _, _ = kernels("raw potential carried", (4, 64, 3, 32, 32), "channels last")["forward"]
        self.assertExpectedInline(
            text.source,
            """\
import triton
import triton.language as tl


# loop_00_forward: all steps of a channel at a time
@triton.jit
def loop_00_forward(
    v_ptr,
    running_mean_ptr,
    running_var_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    normalised_seq_ptr,
    s_seq_ptr,
    v_seq_ptr,
    mean_seq_ptr,
    invstd_seq_ptr,
    v_final_ptr,
    running_mean_final_ptr,
    running_var_final_ptr,
    v_state_ptr,
    v_values_ptr,
    T,
    rows,
    inner,
    channels,
    running_mean_stride_c: tl.int64,
    running_var_stride_c: tl.int64,
    x_stride_t: tl.int64,
    weight_stride_c: tl.int64,
    bias_stride_c: tl.int64,
    normalised_seq_stride_t: tl.int64,
    s_seq_stride_t: tl.int64,
    v_seq_stride_t: tl.int64,
    mean_seq_stride_t: tl.int64,
    mean_seq_stride_c: tl.int64,
    invstd_seq_stride_t: tl.int64,
    invstd_seq_stride_c: tl.int64,
    running_mean_final_stride_c: tl.int64,
    running_var_final_stride_c: tl.int64,
    stride_r,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    beside = tl.arange(0, CHANNELS)[None, :]
    channel = program.to(INDEX) * CHANNELS + beside
    exists = channel < channels
    count = rows * inner
    size = count.to(tl.float32)
    area = count.to(tl.int64) * CHANNELS
    offset = tl.arange(0, BLOCK)[:, None].to(INDEX)
    tl.debug_barrier()
    for start in range(0, count, BLOCK):
        lane = start + offset
        inside = (lane < count) & exists
        home = lane * CHANNELS + beside
        lanes = lane * stride_r + channel
        tl.store(v_state_ptr + (2 * program + 0 % 2) * area + home, tl.load(v_ptr + lanes, mask=inside), mask=inside)
    running_mean = tl.load(running_mean_ptr + channel * running_mean_stride_c, mask=exists)
    running_var = tl.load(running_var_ptr + channel * running_var_stride_c, mask=exists)
    weight = tl.load(weight_ptr + channel * weight_stride_c, mask=exists)
    bias = tl.load(bias_ptr + channel * bias_stride_c, mask=exists)
    for t in range(T):
        mean_of_lane = tl.zeros([BLOCK, CHANNELS], tl.float32)
        squares = tl.zeros([BLOCK, CHANNELS], tl.float32)
        tl.debug_barrier()
        for start in range(0, count, BLOCK):
            lane = start + offset
            inside = (lane < count) & exists
            home = lane * CHANNELS + beside
            lanes = lane * stride_r + channel
            v = tl.load(v_state_ptr + (2 * program + t % 2) * area + home, mask=inside)
            x = tl.load(x_ptr + t * x_stride_t + lanes, mask=inside)
            v_1 = v * 0.9 + x
            tl.store(v_values_ptr + program * area + home, v_1, mask=inside)
            distance = v_1 - mean_of_lane
            mean_of_lane += tl.where(inside, distance * (1.0 / (start // BLOCK + 1)), 0.0)
            squares += tl.where(inside, distance * (v_1 - mean_of_lane), 0.0)
        seen = ((count - offset + BLOCK - 1) // BLOCK).to(tl.float32)
        mean = tl.div_rn(tl.sum(mean_of_lane * seen, 0, keep_dims=True), size)
        apart = mean_of_lane - mean
        variance = tl.div_rn(tl.sum(squares + apart * apart * seen, 0, keep_dims=True), size)
        invstd = tl.div_rn(1.0, tl.sqrt_rn(variance + 1e-05))
        next_mean = running_mean * 0.7 + mean * 0.3
        sub = tl.div_rn(1.0, (invstd * invstd)) - 1e-05
        next_var = running_var * 0.7 + sub * 1.0000153 * 0.3
        tl.debug_barrier()
        for start in range(0, count, BLOCK):
            lane = start + offset
            inside = (lane < count) & exists
            home = lane * CHANNELS + beside
            lanes = lane * stride_r + channel
            v_2 = tl.load(v_values_ptr + program * area + home, mask=inside)
            normalised = tl.fma(weight * (v_2 - mean), invstd, bias)
            arg = normalised - 0.5
            s = (arg >= 0.0).to(tl.float32)
            v_3 = v_2 - s
            tl.store(s_seq_ptr + t * s_seq_stride_t + lanes, s, mask=inside)
            tl.store(v_seq_ptr + t * v_seq_stride_t + lanes, v_3, mask=inside)
            tl.store(v_state_ptr + (2 * program + (t + 1) % 2) * area + home, v_3, mask=inside)
            tl.store(normalised_seq_ptr + t * normalised_seq_stride_t + lanes, normalised, mask=inside)
        tl.store(mean_seq_ptr + t * mean_seq_stride_t + channel * mean_seq_stride_c, mean, mask=exists)
        tl.store(invstd_seq_ptr + t * invstd_seq_stride_t + channel * invstd_seq_stride_c, invstd, mask=exists)
        running_mean = next_mean
        running_var = next_var
    tl.debug_barrier()
    for start in range(0, count, BLOCK):
        lane = start + offset
        inside = (lane < count) & exists
        home = lane * CHANNELS + beside
        lanes = lane * stride_r + channel
        tl.store(v_final_ptr + lanes, tl.load(v_state_ptr + (2 * program + T % 2) * area + home, mask=inside), mask=inside)
    tl.store(running_mean_final_ptr + channel * running_mean_final_stride_c, running_mean, mask=exists)
    tl.store(running_var_final_ptr + channel * running_var_final_stride_c, running_var, mask=exists)
""",
        )


def test_new_sizes_have_the_same_kernel():
    """As long as the factor of the unbiased variance, a number of the step, is the same."""
    first, second = kernels("hard reset", (4, 2, 3, 8, 8)), kernels("hard reset", (7, 8, 16, 4, 4))
    for direction in ("forward", "backward"):
        assert first[direction][0] == second[direction][0]
    assert len({channel_tile(count, 1) for count in range(1, 1 << 15, 7)}) == 8  # 128 to 8192, and what does not fit


# ------------------------------------------------------------------------------------- compiled for a device that is not here

SIZES = {"registers": (4, 32, 16, 8, 8), "more registers": (4, 64, 16, 8, 8), "tiles": (4, 64, 16, 32, 32), "rows": (4, 256, 32)}


@pytest.mark.parametrize("device", ["sm_90", "gfx942"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("size", SIZES)
def test_next_to_nothing_spills(size, layout, device, record_property):
    """Contiguous results of channels-last inputs pass from layout to layout: Triton 3.6 spills an address or two of them."""
    for direction, (text, tile, channels) in kernels("hard reset", SIZES[size], layout).items():
        for aligned in (True, False):
            assembly = compile_channels(device, text, tile, channels, aligned=aligned)
            record_property(f"registers of {direction}, {size}, {layout}, on {device}", assembly.registers)
            assert assembly.spills <= (64 if layout == "channels last" else 0), f"{direction}: {assembly.registers} registers"


@pytest.mark.parametrize("layer", LAYERS)
def test_the_largest_channels_in_registers_spill_little(layer):
    """A thread has 64 registers: where accesses are narrow a few values go to the cache, still fewer than with tiles."""
    for text, tile, channels in kernels(layer, (4, 32, 16, 16, 16)).values():
        assert tile.fits and tile.block == 8192
        for aligned in (True, False):
            assert compile_channels("sm_90", text, tile, channels, aligned=aligned).spills <= (64 if aligned else 256)


@pytest.mark.parametrize("size", ["registers", "tiles", "rows"])
def test_accesses_of_whole_values_are_128_bits_wide(size):
    for direction, (text, tile, channels) in kernels("hard reset", SIZES[size]).items():
        assembly = compile_channels("sm_90", text, tile, channels)
        wide = re.findall(r"(?:ld|st)\.global[\w.]*\.v4\.b32", assembly.text)
        lanes = tile.block * channels // (32 * tile.warps) // 4
        assert len(wide) == lanes * len(re.findall(r"mask=inside", text.source)), direction


def test_forward_is_not_contracted():
    """But where eager's batch norm is: one fused multiply-add a lane."""
    text, tile, channels = kernels("hard reset", SIZES["registers"])["forward"]
    assembly = compile_channels("sm_90", text, tile, channels)
    assert len(re.findall(r"\bfma\.rn\.", assembly.text)) == tile.block * channels // (32 * tile.warps)
    assert not re.search(r"\b(?:mul|sub)\.f32", assembly.text)  # without .rn ptxas may contract
