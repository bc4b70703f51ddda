"""The helper functions of generated kernels. Only those that a kernel calls, and what they call, appear in its text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Helper:
    text: str
    requires: tuple[str, ...] = ()


_STREAM = """
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
"""


def _bf16(of_nan: str, note: str) -> str:
    return f"""
static inline float load_bf16(uint16_t bits) {{ return __builtin_bit_cast(float, uint32_t(bits) << 16); }}

static inline uint16_t store_bf16(float rounded) {{ return __builtin_bit_cast(uint32_t, rounded) >> 16; }}

// To the nearest bf16, ties to even.{note}
static inline float round_bf16(float x) {{
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  return __builtin_bit_cast(float, {of_nan}rounded);
}}
"""


_FP16 = """
static inline float load_fp16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00 ? 112u << 23 : 224u << 23);
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, float(int32_t(magnitude)) * 0x1p-24f);
  return __builtin_bit_cast(float, sign | (magnitude < 0x0400 ? subnormal : normal));
}

static inline uint16_t store_fp16(float rounded) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, rounded), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - (112u << 23)) >> 13;
  const uint32_t small = magnitude < 0x38800000u ? magnitude : 0;
  const uint32_t subnormal = int32_t(__builtin_bit_cast(float, small) * 0x1p24f);
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t half = magnitude > 0x7f800000u ? 0x7e00 : magnitude == 0x7f800000u ? 0x7c00 : finite;
  return uint16_t((bits >> 16 & 0x8000) | half);
}

// To the nearest fp16, ties to even.
static inline float round_fp16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = bits & 0x80000000u, magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1)) & 0xffffe000u;
  const float small = __builtin_bit_cast(float, magnitude < 0x38800000u ? magnitude : 0);
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, (small + 0.5f) - 0.5f);  // multiples of 2^-24
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal >= 0x47800000u ? 0x7f800000u : normal;
  return __builtin_bit_cast(float, sign | (magnitude > 0x7f800000u ? 0x7fc00000u : finite));
}
"""


#: name: (Sleef's accuracy, the one at::vec calls where it calls Sleef; number of operands)
SLEEF = {
    **dict.fromkeys(("exp", "expm1", "exp2", "log", "log1p", "log2", "log10", "tan", "asin", "acos", "atan"), ("_u10", 1)),
    **dict.fromkeys(("sinh", "cosh", "tanh", "atanh", "erf"), ("_u10", 1)),
    **dict.fromkeys(("sin", "cos"), ("_u35", 1)),
    "erfc": ("_u15", 1),
    "pow": ("_u10", 2),
    "atan2": ("_u10", 2),
    "hypot": ("_u05", 2),
    "fmod": ("", 2),
}


def _transcendental(name: str, real: str) -> Helper:
    """A scalar function whose vector variants are Sleef's: the last lanes of a row give the same bits as the others."""
    accuracy, arity = SLEEF[name]
    f, wide = ("f", "f8") if real == "float" else ("", "d4")
    scalar, vector, lanes = f"Sleef_{name}{f}{accuracy}", f"Sleef_{name}{wide}{accuracy}", f"{name}_{real}s"
    types = ", ".join([real] * arity)
    parameters = ", ".join(f"{real} {c}" for c in "xy"[:arity])
    arguments = ", ".join("xy"[:arity])
    splats = ", ".join(f"{c} - {lanes}{{}}" for c in "xy"[:arity])
    count = 4 if real == "float" else 2
    few = f"{name}_few_{real}s"
    filled = ", ".join(f"{lanes}{{{', '.join(f'{c}[{i}]' for i in range(count))}}}" for c in "xy"[:arity])
    picked = ", ".join(f"all[{i}]" for i in range(count))
    return Helper(
        f"""
#ifdef SLEEF  // libtorch_cpu holds the vector variants, which eager calls too; the scalar one is a lane of a vector
extern "C" {{
#pragma omp declare simd notinbranch
__attribute__((const)) {real} {scalar}({types});
typedef {real} {lanes} __attribute__((vector_size(32)));
{lanes} {vector}({", ".join([lanes] * arity)});
__attribute__((used, visibility("hidden"))) {real} {name}_{real}({parameters}) {{ return {vector}({splats})[0]; }}
asm(".set {scalar}, {name}_{real}");
typedef {real} {few} __attribute__((vector_size(16)));  // of the last lanes of a row, which libtorch_cpu does not have
{few} {name}_few_{real}({", ".join(f"{few} {c}" for c in "xy"[:arity])}) asm("_ZGVbN{count}{"v" * arity}_{scalar}");
__attribute__((used, visibility("hidden"))) {few} {name}_few_{real}({", ".join(f"{few} {c}" for c in "xy"[:arity])}) {{
  const {lanes} all = {vector}({filled});
  return {few}{{{picked}}};
}}
}}
static inline {real} v{name}({parameters}) {{ return {scalar}({arguments}); }}
#else
static inline {real} v{name}({parameters}) {{ return __builtin_{name}{f}({arguments}); }}
#endif
"""
    )


#: Most surrogates are sigmoids: a call in the innermost loop would spill all vector registers around it, so it is written out.
_EXP = """
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
"""


def _sigmoid(real: str) -> Helper:
    text = f"""
static inline {real} sigmoid({real} x) {{ return 1 / (1 + vexp(-x)); }}
"""
    return Helper(text, (f"vexp.{real}",))


HELPERS: dict[str, Helper] = {
    "min": Helper("""
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
"""),
    "stream": Helper(_STREAM, ("min",)),
    "prefetch": Helper("""
static inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}
"""),
    "team": Helper("""
template <int64_t N>
struct Constant {
  constexpr operator int64_t() const { return N; }
};

// Threads that share the rows of a block of channels. Each adds up its rows; then all of them have the sums, and the same ones.
struct Team {
  int64_t member, members;
  double* sums;
  int64_t half;  // of them; the other one is still being read

  template <typename... Array>
  void add(Array&... arrays) {
    if (members == 1) return;
    constexpr int64_t count = sizeof...(arrays), size = (0 + ... + sizeof(Array)) / sizeof(double), each = size / count;
    double* const now = sums;
    double* own[] = {arrays...};
    for (int64_t k = 0; k < size; ++k) now[member * size + k] = own[k / each][k % each];
#pragma omp barrier
    for (int64_t k = 0; k < size; ++k) {
      double sum = 0.0;
      for (int64_t other = 0; other < members; ++other) sum += now[other * size + k];
      own[k / each][k % each] = sum;
    }
    sums += half;
    half = -half;
  }
};
"""),
    "integer_power": Helper("""
static inline int64_t integer_power(int64_t base, int64_t exponent) {
  if (exponent < 0) return base == 1 ? 1 : base == -1 ? 1 - 2 * (exponent & 1) : 0;
  int64_t result = 1;
  for (; exponent > 0; exponent >>= 1, base *= base) result *= exponent & 1 ? base : 1;
  return result;
}
"""),
    **{
        f"choose.{real}": Helper(f"""
static inline {real} choose(bool condition, {real} yes, {real} no) {{  // by bits, so that no side is computed under a branch
  const {bits} mask = -{bits}(condition);
  return __builtin_bit_cast({real}, (__builtin_bit_cast({bits}, yes) & mask) | (__builtin_bit_cast({bits}, no) & ~mask));
}}
""")
        for real, bits in (("float", "uint32_t"), ("double", "uint64_t"))
    },
    "bf16": Helper(_bf16("x != x ? 0x7fc00000u : ", "")),
    "bf16_alone": Helper(_bf16("", " (The lower half of a NaN is empty here, and so rounds to nothing.)")),
    "fp16": Helper(_FP16),
    **{f"v{name}.{real}": _transcendental(name, real) for name in SLEEF for real in ("float", "double")},
    "vexp.float": Helper(_EXP),  # (in place of Sleef's)
    **{f"sigmoid.{real}": _sigmoid(real) for real in ("float", "double")},
    **{
        f"sigmoid_of_one.{real}": Helper(f"""
static inline {real} sigmoid_of_one({real} x) {{ return 1 / (1 + __builtin_exp{f}(-x)); }}
""")
        for real, f in (("float", "f"), ("double", ""))
    },
}


#: With no others, and where memory holds no wider floats, all NaNs come from bf16 or from arithmetic (Sleef's are all ones).
_BESIDE_BF16_ALONE = {"bf16", "min", "stream", "prefetch", "sigmoid.float", "vexp.float"}


def is_bf16_alone(used: set[str], dtypes: Iterable[torch.dtype]) -> bool:
    """Whether a kernel with these helpers and dtypes in memory may round with "bf16_alone" in place of "bf16"."""
    return "bf16" in used and used <= _BESIDE_BF16_ALONE and all(d == torch.bfloat16 or not d.is_floating_point for d in dtypes)


def prelude(used: Iterable[str]) -> str:
    """The texts of the helpers `used`, dependencies first."""
    order: list[str] = []

    def visit(name: str) -> None:
        for required in HELPERS[name].requires:
            visit(required)
        if name not in order:
            order.append(name)

    for name in sorted(used):
        visit(name)
    return "".join(HELPERS[name].text for name in order)
