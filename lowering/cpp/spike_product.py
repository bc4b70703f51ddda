"""A product of spikes and weights as a sum of rows: the rows of the weights whose spike is 1.

    out[i] = sum over k of s[i, k] * w[k]    ->    sum over the k with s[i, k] = 1 of w[k]

A library's product adds up in the order of k, in blocks of it. A term 0*w[k] changes no sum and 1*w[k] is w[k], so the sum of
rows has the product's bits if it starts anew where the library starts a block (and no weight is infinite or NaN). Where that
is, is found by trying, once for sizes: where no block gives the library's bits on random spikes, the product stays.

Neurons that fire at every fourth step or less make this cheaper than the product; each call finds out, and where there are
more, the next calls are spared the search.

The gradient of the weights, ``s.T @ g`` over the rows of all steps, is a sum of rows, too, of those of `g`; a gradient need not
have a library's bits.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from snn_compile.lowering.cpp import compiler

TEXT = """
// out[i] = start + sum of the rows w[k] for which spikes[i, k] is 1, in blocks of k.

#include <algorithm>
#include <cstdint>
#include <vector>

constexpr int64_t WIDTH = 16, VECTORS = 8, LONGEST_PAUSE = 64;
typedef float Lanes __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

struct Product {
  int64_t rows, depth, columns, block, most, threads;  // depth: how many k; most: ones that are still worth it
};

// After a call with too many ones, `left` calls give up at once; the pauses grow.
struct Pause {
  int64_t left, length;
};

// Where the ones of a row are; -1 if it holds anything but ones and zeros.
static int64_t find_ones(const float* row, int64_t depth, int32_t* at) {
  int64_t count = 0;
  bool has_others = false;
  for (int64_t begin = 0; begin < depth; begin += WIDTH) {
    float any = 0.0f;
#pragma omp simd reduction(+ : any)
    for (int64_t k = begin; k < begin + WIDTH; ++k) any += row[k] != 0.0f ? 1.0f : 0.0f;
    if (any == 0.0f) continue;
    for (int64_t k = begin; k < begin + WIDTH; ++k) {
      has_others |= row[k] != 0.0f && row[k] != 1.0f;
      at[count] = int32_t(k);
      count += row[k] != 0.0f;
    }
  }
  return has_others ? -1 : count;
}

template <int vectors>
static void add_rows(const float* w, const float* start, float* out, int64_t columns, const int32_t* at, const int32_t* end) {
  Lanes sum[vectors] = {};
  for (; at < end; ++at) {
    const Lanes* row = reinterpret_cast<const Lanes*>(w + *at * columns);
    for (int v = 0; v < vectors; ++v) sum[v] += row[v];
  }
  const Lanes* from = reinterpret_cast<const Lanes*>(start);
  for (int v = 0; v < vectors; ++v) reinterpret_cast<Lanes*>(out)[v] = from ? from[v] + sum[v] : sum[v];
}

static void sum_row(const Product& p, const float* w, const float* start, float* out, const int32_t* at, const int32_t* end) {
  for (int64_t next = p.block; next < p.depth + p.block; next += p.block) {
    const int32_t* const stop = std::lower_bound(at, end, int32_t(std::min(next, p.depth)));
    int64_t j = 0;
    for (; j + VECTORS * WIDTH <= p.columns; j += VECTORS * WIDTH)
      add_rows<VECTORS>(w + j, start ? start + j : nullptr, out + j, p.columns, at, stop);
    for (; j < p.columns; j += WIDTH) add_rows<1>(w + j, start ? start + j : nullptr, out + j, p.columns, at, stop);
    at = stop;
    start = out;
  }
}

// Whether `out` was written; `start`: what is added to every row, or null. Without `w`, it is not.
extern "C" bool sum_rows(const Product* p, const float* spikes, const float* w, const float* start, float* out, Pause* pause) {
  if (!w) return false;
  if (pause->left > 0) return --pause->left, false;
  int64_t ones = 0;
  bool is_binary = true;
#pragma omp parallel num_threads(p->threads) reduction(+ : ones) reduction(&& : is_binary)
  {
    std::vector<int32_t> at(p->depth + 1);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p->rows; ++i) {
      const int64_t count = find_ones(spikes + i * p->depth, p->depth, at.data());
      is_binary &= count >= 0;
      ones += count;
      if (is_binary) sum_row(*p, w, start, out + i * p->columns, at.data(), at.data() + count);
    }
  }
  const bool is_worth_it = is_binary && ones <= p->most;
  pause->length = is_worth_it ? 0 : std::min(LONGEST_PAUSE, 2 * pause->length + 1);
  pause->left = pause->length;
  return is_binary;
}

// Rows of a block and where their ones are.
struct Ones {
  int64_t rows, depth;
  const int32_t *at, *counts;
};

// out[k] += sum of the g[i] for which row i has a one at k, in `vectors` vectors of columns
template <int vectors>
static void add_columns(const Ones& ones, const float* g, int64_t columns, float* out) {
  std::vector<float> sum(ones.depth * vectors * WIDTH);
  for (int64_t i = 0; i < ones.rows; ++i) {
    Lanes row[vectors];
    for (int v = 0; v < vectors; ++v) row[v] = reinterpret_cast<const Lanes*>(g + i * columns)[v];
    const int32_t* const at = ones.at + i * ones.depth;
    for (int64_t n = 0; n < ones.counts[i]; ++n)
      for (int v = 0; v < vectors; ++v) reinterpret_cast<Lanes*>(sum.data())[at[n] * vectors + v] += row[v];
  }
  for (int64_t k = 0; k < ones.depth; ++k)
    for (int64_t j = 0; j < vectors * WIDTH; ++j) out[k * columns + j] += sum[k * vectors * WIDTH + j];
}

// out[k] += sum of the rows g[i] for which spikes[i, k] is 1, a block of rows at a time; false where there are no spikes.
extern "C" bool sum_outer(const Product* p, const float* spikes, const float* g, float* out) {
  std::vector<int32_t> at(p->block * p->depth), counts(p->block);
  const int64_t vectors = p->columns / WIDTH;
  bool is_binary = true;
  for (int64_t begin = 0; begin < p->rows && is_binary; begin += p->block) {
    const Ones ones{std::min(p->block, p->rows - begin), p->depth, at.data(), counts.data()};
#pragma omp parallel num_threads(p->threads) reduction(&& : is_binary)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < ones.rows; ++i) {
        counts[i] = int32_t(find_ones(spikes + (begin + i) * p->depth, p->depth, at.data() + i * p->depth));
        is_binary &= counts[i] >= 0;
      }
#pragma omp for schedule(static)
      for (int64_t v = 0; v < vectors; v += 4) {
        const float* const from = g + begin * p->columns + v * WIDTH;
        if (v + 4 <= vectors)
          add_columns<4>(ones, from, p->columns, out + v * WIDTH);
        else
          for (int64_t j = 0; j < (vectors - v) * WIDTH; j += WIDTH)
            add_columns<1>(ones, from + j, p->columns, out + v * WIDTH + j);
      }
    }
  }
  return is_binary;
}
"""

#: rows and columns come in vectors of so many
WIDTH = 16
#: the share of ones up to which rows are added (`benchmarks/spike_products.py` shows where the product becomes faster)
MOST = 0.25
#: the gradient of the weights: rows whose sum is one term of the whole sum, the share of ones, columns from which on it pays
BLOCK, MOST_OUTER, FEWEST_COLUMNS = 1024, 0.1, 256
#: fewer rows go to other functions of the library, whose order of sums is another
FEWEST_ROWS = 4


class Product(ctypes.Structure):
    """Sizes of ``[rows, depth] @ [depth, columns]``, as in the text."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "depth", "columns", "block", "most", "threads")]


class Pause(ctypes.Structure):
    """What a place in a program remembers from call to call."""

    _fields_ = [("left", ctypes.c_int64), ("length", ctypes.c_int64)]


@functools.cache
def load() -> ctypes.CDLL:
    library = compiler.load(TEXT)
    library.sum_rows.argtypes = [ctypes.c_void_p] * 6
    library.sum_outer.argtypes = [ctypes.c_void_p] * 4
    library.sum_rows.restype = library.sum_outer.restype = ctypes.c_bool
    return library


def are_spikes(values: Tensor) -> bool:
    """Zeros and ones, nothing else."""
    return bool(((values == 0) | (values == 1)).all())


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is infinite or NaN: a sum of rows leaves out what would be NaN, times 0. (False where they overflow.)"""
    return bool(tensor.sum().isfinite())


def plan(spikes: Tensor, weight: Tensor, start: Tensor | None) -> Product | None:
    """How to compute ``spikes @ weight (+ start)`` to the bit as a sum of rows, or None where that is not possible."""
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in (spikes, weight)) or not spikes.is_contiguous():
        return None
    rows, depth, columns = *spikes.shape, weight.shape[1]
    if rows < FEWEST_ROWS or depth % WIDTH or columns % WIDTH or 0 in (depth, columns):
        return None
    if start is not None and (start.shape != (columns,) or not start.is_contiguous() or start.dtype != torch.float32):
        return None
    threads = torch.get_num_threads()
    block = _block(rows, depth, columns, weight.stride(), start is not None, threads)
    return Product(rows, depth, columns, block, int(MOST * rows * depth), threads) if block else None


@functools.cache
def _block(rows: int, depth: int, columns: int, stride: tuple[int, ...], has_start: bool, threads: int) -> int:
    """The block of k after which the library starts a sum anew; 0: none of those tried."""
    random = torch.Generator().manual_seed(0)
    weight = torch.empty_strided((depth, columns), stride).normal_(generator=random)
    start = torch.empty(columns).normal_(generator=random) if has_start else None
    trials = [(torch.rand(rows, depth, generator=random) < share).float() for share in (0.1, 0.5, 0.9)]
    expected = [torch.mm(s, weight) if start is None else torch.addmm(start, s, weight) for s in trials]
    given, half = weight.contiguous(), -(-depth // 2 // WIDTH) * WIDTH
    for block in dict.fromkeys(min(b, depth) for b in (depth, half, 192, 256, 320, 336, 384, 512)):
        product = Product(rows, depth, columns, block, rows * depth, threads)
        if all(torch.equal(_run(product, s, given, start), e) for s, e in zip(trials, expected, strict=True)):
            return block
    return 0


def _run(product: Product, spikes: Tensor, weight: Tensor, start: Tensor | None) -> Tensor:
    out = torch.empty(product.rows, product.columns)
    pointers = (spikes.data_ptr(), weight.data_ptr(), None if start is None else start.data_ptr(), out.data_ptr())
    assert load().sum_rows(ctypes.byref(product), *pointers, ctypes.byref(Pause()))
    return out


def sum_outer(spikes: Tensor, g: Tensor) -> Tensor | None:
    """``spikes.T @ g`` for ``[rows, depth]`` and ``[rows, columns]``, up to rounding; None where a product is as good."""
    if any(t.dtype != torch.float32 or t.device.type != "cpu" or not t.is_contiguous() for t in (spikes, g)):
        return None
    rows, depth, columns = *spikes.shape, g.shape[1]
    if depth % WIDTH or columns % WIDTH or columns < FEWEST_COLUMNS or rows < BLOCK:
        return None
    sample = spikes[:: rows // 256]
    if not are_spikes(sample) or float(sample.mean()) > MOST_OUTER or not is_finite(g):
        return None
    product = Product(rows, depth, columns, BLOCK, 0, torch.get_num_threads())
    out = torch.zeros(depth, columns)
    is_done = load().sum_outer(ctypes.byref(product), spikes.data_ptr(), g.data_ptr(), out.data_ptr())
    return out if is_done else None
