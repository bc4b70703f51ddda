"""The text of two kernels. ``EXPECTTEST_ACCEPT=1 pytest tests/lowering/cpp/test_golden.py`` accepts a change."""

from __future__ import annotations

import expecttest
import torch

from snn_compile.ir.recurrence import Carry, Output, Recurrence, TimeSeries
from snn_compile.lowering.cpp.target import CppTarget
from snn_compile.lowering.layout import Layout
from snn_compile.passes.trace_step import trace_step
from tests.lowering.cpp.test_cpp import lif


def named_lif() -> Recurrence:
    """With the names that Dynamo gives the values of the user's code."""
    r = trace_step(
        lif,
        name="lif",
        carries=[Carry("v", torch.float32, is_result=True)],
        xs=[TimeSeries("x", torch.float32, needs_grad=True)],
        consts=[],
        ys=[Output("s", torch.float32)],
        shape=(3,),
    )
    for graph in (r.step, r.backward):
        for node in graph.graph.nodes:  # type: ignore[union-attr]
            name = {"add": "h", "_to_copy": "s", "mul": "v"}.get(node.name)
            if name:
                node.meta["user_name"] = name
    r.equations = ("h = v + (x - v)/2", "s = Spike(h - 1)", "v = h*(1 - s)")
    return r


def without_helpers(text: str) -> str:
    head, rest = text.split("static inline", 1)
    return f"{head}...\n\n{rest[rest.index('constexpr int64_t LANES') :]}"


def test_forward() -> None:
    text = CppTarget().source(named_lif(), "forward", Layout(1, (1, 1, 1, 1)))
    expecttest.assert_expected_inline(
        without_helpers(text),
        """\
// lif: forward
//
//     h = v + (x - v)/2
//     s = Spike(h - 1)
//     v = h*(1 - s)

#include <cstdint>

...

constexpr int64_t LANES = 2048;  // of a block, at most: what it keeps stays in cache

extern "C" void lif_forward(
    const float* v_init, const float* x_data, float* s_data, float* v_final, int64_t steps, int64_t size,
    int64_t x_stride_t, int64_t s_stride_t, int64_t block_lanes, bool streaming, int64_t threads) {
  const int64_t blocks = (size + block_lanes - 1) / block_lanes;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t thread = 0; thread < threads; ++thread) {
    const int64_t end = blocks * (thread + 1) / threads;
    for (int64_t block = blocks * thread / threads; block < end; ++block) {
      const int64_t first = block * block_lanes, lanes = min(block_lanes, size - first);
      alignas(64) float v_lanes[LANES];
      alignas(64) float s_stage[LANES];
      const float* const v_init_row = v_init + first;
#pragma omp simd
      for (int64_t lane = 0; lane < lanes; ++lane) {
        v_lanes[lane] = v_init_row[lane];
      }
      for (int64_t t = 0; t < steps; ++t) {
        const float* const x_row = x_data + t * x_stride_t + first;
        float* const s_row = s_data + t * s_stride_t + first;
        float* const s_to = streaming ? s_stage : s_row;
        const float* const x_next = x_row + x_stride_t;
        for (int64_t start = 0; start < lanes; start += 256) {
          const int64_t here = min(start + 256, lanes);
          prefetch(x_next + start, 256 * sizeof(*x_next));
#pragma omp simd
          for (int64_t lane = start; lane < here; ++lane) {
            const float v = v_lanes[lane];
            const float x = x_row[lane];
            const float h = v + (x - v) / 2.0f;
            const float s = float(h - 1.0f >= 0.0f);
            const float v2 = h * (1.0f - s);
            v_lanes[lane] = v2;
            s_to[lane] = s;
          }
        }
        if (streaming) {
          stream(s_row, s_stage, lanes * sizeof(float));
        }
      }
      float* const v_final_row = v_final + first;
#pragma omp simd
      for (int64_t lane = 0; lane < lanes; ++lane) {
        v_final_row[lane] = v_lanes[lane];
      }
    }
  }
}
""",
    )


def test_backward() -> None:
    text = CppTarget().source(named_lif(), "backward", Layout(1, (1, 1, 1, 1, 1)))
    expecttest.assert_expected_inline(
        text,
        """\
// lif: backward
//
//     h = v + (x - v)/2
//     s = Spike(h - 1)
//     v = h*(1 - s)

#include <cstdint>

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

static inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)  // the arithmetic of Sleef's expf_u10, which eager calls: its bits
static inline float vexp(float x) {  // 2^n * e^r, n = round(x / ln 2)
  const float shifted = x * 0x1.715476p+0f + 0x1.8p23f, n = shifted - 0x1.8p23f;
  const int32_t exponent = int32_t(__builtin_bit_cast(uint32_t, shifted) - 0x4b400000u), half = exponent >> 1;
  const float r = __builtin_fmaf(n, -0x1.7f7d1cp-20f, __builtin_fmaf(n, -0x1.62e4p-1f, x));
  float y = __builtin_fmaf(0x1.a057b4p-13f, r, 0x1.6d2d92p-10f);
  y = __builtin_fmaf(y, r, 0x1.11114cp-7f);
  y = __builtin_fmaf(y, r, 0x1.5554f4p-5f);
  y = __builtin_fmaf(y, r, 0x1.555556p-3f);
  y = __builtin_fmaf(y, r, 0.5f);
  y = 1.0f + __builtin_fmaf(r * r, y, r);
  y = y * __builtin_bit_cast(float, uint32_t(half + 127) << 23);
  y = y * __builtin_bit_cast(float, uint32_t(exponent - half + 127) << 23);
  y = x < -104.0f ? 0.0f : y;
  return x > 100.0f ? __builtin_inff() : y;
}
#else
static inline float vexp(float x) { return __builtin_expf(x); }
#endif

static inline float sigmoid(float x) { return 1 / (1 + vexp(-x)); }

// Copies a finished row past the caches: it is not read again here, and a plain store would read it from memory first.
static inline void stream(void* to, const void* from, int64_t bytes) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  const int64_t head = min(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % 64));  // up to a cache line
  __builtin_memcpy(target, source, head);
  target += head, source += head, bytes -= head;
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
  typedef float chunk __attribute__((vector_size(64), aligned(1), may_alias));
  for (; bytes >= 64; bytes -= 64, target += 64, source += 64)
    __builtin_ia32_movntps512(reinterpret_cast<float*>(target), *reinterpret_cast<const chunk*>(source));
#elif defined(__AVX__) && defined(__GNUC__) && !defined(__clang__)
  typedef float chunk __attribute__((vector_size(32), aligned(1), may_alias));
  for (; bytes >= 32; bytes -= 32, target += 32, source += 32)
    __builtin_ia32_movntps256(reinterpret_cast<float*>(target), *reinterpret_cast<const chunk*>(source));
#endif
  __builtin_memcpy(target, source, bytes);
}

constexpr int64_t LANES = 2048;  // of a block, at most: what it keeps stays in cache

extern "C" void lif_backward(
    const float* v_init, const float* x_data, const float* grad_s_data, const float* grad_v_final,
    float* grad_x_data, int64_t steps, int64_t size, int64_t x_stride_t, int64_t grad_s_stride_t,
    int64_t grad_x_stride_t, int64_t block_lanes, int64_t segment, bool streaming, int64_t threads,
    int64_t scratch_bytes, char* scratch) {
  const int64_t blocks = (size + block_lanes - 1) / block_lanes;
  const int64_t segments = (steps + segment - 1) / segment;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t thread = 0; thread < threads; ++thread) {
    const int64_t capacity = block_lanes;
    char* here = scratch + thread * scratch_bytes;
    float* const h_record = reinterpret_cast<float*>(here);
    here += segment * capacity * sizeof(float);
    float* const v_checkpoint = reinterpret_cast<float*>(here);
    const int64_t end = blocks * (thread + 1) / threads;
    for (int64_t block = blocks * thread / threads; block < end; ++block) {
      const int64_t first = block * block_lanes, lanes = min(block_lanes, size - first);
      alignas(64) float v_lanes[LANES];
      alignas(64) float grad_v_lanes[LANES];
      alignas(64) float grad_x_stage[LANES];
      const float* const v_init_row = v_init + first;
      const float* const grad_v_final_row = grad_v_final + first;
#pragma omp simd
      for (int64_t lane = 0; lane < lanes; ++lane) {
        v_lanes[lane] = v_init_row[lane];
        grad_v_lanes[lane] = grad_v_final_row[lane];
      }
      // forwards through all segments but the last one, leaving a checkpoint before each;
      // then, last to first, each is replayed and walked back
      for (int64_t visit = 0; visit < 2 * segments - 1; ++visit) {
        const bool replays = visit >= segments - 1;
        const int64_t number = replays ? 2 * segments - 2 - visit : visit;
        const int64_t begin = number * segment, stop = min(begin + segment, steps);
        if (!replays) {
#pragma omp simd
          for (int64_t lane = 0; lane < lanes; ++lane) {
            v_checkpoint[number * capacity + lane] = v_lanes[lane];
          }
        } else if (visit >= segments) {
#pragma omp simd
          for (int64_t lane = 0; lane < lanes; ++lane) {
            v_lanes[lane] = v_checkpoint[number * capacity + lane];
          }
        }
        for (int64_t t = begin; t < stop; ++t) {
          float* const h_then = h_record + (t - begin) * capacity;
          const float* const x_row = x_data + t * x_stride_t + first;
#pragma omp simd
          for (int64_t lane = 0; lane < lanes; ++lane) {
            const float v = v_lanes[lane];
            const float x = x_row[lane];
            const float h = v + (x - v) / 2.0f;
            const float s = float(h - 1.0f >= 0.0f);
            const float v2 = h * (1.0f - s);
            h_then[lane] = h;
            v_lanes[lane] = v2;
          }
        }
        const int64_t next_begin = begin > 0 ? begin - segment : 0;
        const int64_t next_first = begin > 0 ? first : first + block_lanes;
        for (int64_t t = stop - 1; replays && t >= begin; --t) {
          float* const h_then = h_record + (t - begin) * capacity;
          const float* const grad_s_row = grad_s_data + t * grad_s_stride_t + first;
          float* const grad_x_row = grad_x_data + t * grad_x_stride_t + first;
          float* const grad_x_to = streaming ? grad_x_stage : grad_x_row;
          const float* const grad_s_next = grad_s_row - grad_s_stride_t;
          const float* const x_next = x_data + (next_begin + stop - 1 - t) * x_stride_t + next_first;
          for (int64_t start = 0; start < lanes; start += 256) {
            const int64_t here = min(start + 256, lanes);
            prefetch(grad_s_next + start, 256 * sizeof(*grad_s_next));
            prefetch(x_next + start, 256 * sizeof(*x_next));
#pragma omp simd
            for (int64_t lane = start; lane < here; ++lane) {
              const float h = h_then[lane];
              const float grad_next_v = grad_v_lanes[lane];
              const float grad_s = grad_s_row[lane];
              const float sub1 = h - 1.0f;
              const float s = float(sub1 >= 0.0f);
              const float sigmoid_value = sigmoid(sub1 * 4.0f);
              const float mul5 = (grad_s + (-(grad_next_v * h))) * (1.0f - sigmoid_value) * sigmoid_value;
              const float add2 = grad_next_v * (1.0f - s) + mul5 * 4.0f;
              const float div1 = add2 / 2.0f;
              const float add3 = add2 + (-div1);
              grad_v_lanes[lane] = add3;
              grad_x_to[lane] = div1;
            }
          }
          if (streaming) {
            stream(grad_x_row, grad_x_stage, lanes * sizeof(float));
          }
        }
      }
    }
  }
}
""",
    )
