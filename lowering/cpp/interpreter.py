"""The interpreter of a step's instructions: the time loop in C++, over kernels and torch's own matrix products.

A step of a small recurrent layer works for some ten microseconds; as many more went into Python between its kernels. The
interpreter is compiled once a machine and knows nothing of a program: what runs is a row of numbers (`Code`), as in any
bytecode machine. Its registers are *slots*, each the address of one value.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from snn_compile.lowering.cpp import compiler
from snn_compile.lowering.cpp.libtorch import LibTorch, libtorch

TEXT = """
// One step after the other: addresses of its values, its instructions, its states handed on.

#include <cstdint>
#include <vector>

using Handle = void*;  // of a tensor of torch
using Kernel = void (*)(char* const* addresses, const int64_t* numbers);
using Product = int32_t (*)(Handle out, Handle a, Handle b);
using SumOfProduct = int32_t (*)(Handle out, Handle c, Handle a, Handle b, double beta, double alpha);
using Copy = int32_t (*)(Handle to, Handle from, int32_t non_blocking);

// (in `lowering/cpp/spike_product`; gives false where it is not worth it)
using SumRows = bool (*)(int64_t product, char* spikes, char* weight, char* start, char* out, int64_t pause);

enum Kind : int64_t { KERNEL, PRODUCT, SUM_OF_PRODUCT, COPY, ADD_FLOATS, ADD_DOUBLES, ALIAS, SPIKE_PRODUCT };

struct Torch {
  int32_t (*from_blob)(char* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
                       int32_t device, int32_t index, Handle* made);
  int32_t (*release)(Handle);
};

// Where the value of a slot lies in step t: at base + t % period * stride. Period 0: where an instruction has put it.
struct Place {
  char* base;
  int64_t stride, period;
};

// A tensor over memory of ours while an op runs; in the code: slot, offset, dtype, dims, sizes, strides.
class View {
 public:
  View(const Torch& torch, char* const* at, const int64_t*& code) : torch(torch) {
    const int64_t dims = code[3], *sizes = code + 4, *strides = sizes + dims;
    failed = torch.from_blob(at[code[0]] + code[1], dims, sizes, strides, 0, code[2], 0, 0, &handle);
    code = strides + dims;
  }
  ~View() { if (handle) torch.release(handle); }
  View(const View&) = delete;
  Handle handle = nullptr;
  bool failed;

 private:
  const Torch& torch;
};

static void run_kernel(const int64_t* code, char* const* at, char** addresses) {  // function, count, (slot, offset)..., numbers
  const int64_t count = code[1], *numbers = code + 2 + 2 * count;
  for (int64_t i = 0; i < count; ++i) addresses[i] = at[code[2 + 2 * i]] + code[3 + 2 * i];
  reinterpret_cast<Kernel>(code[0])(addresses, numbers);
}

static bool run_op(const Torch& torch, Kind kind, const int64_t* code, char* const* at) {  // function, views
  const int64_t function = *code++;
  const View out(torch, at, code), a(torch, at, code);
  if (out.failed || a.failed) return false;
  if (kind == COPY) return reinterpret_cast<Copy>(function)(out.handle, a.handle, 0) == 0;
  const View b(torch, at, code);
  if (b.failed) return false;
  if (kind == PRODUCT) return reinterpret_cast<Product>(function)(out.handle, a.handle, b.handle) == 0;
  const View c(torch, at, code);
  return !c.failed && reinterpret_cast<SumOfProduct>(function)(out.handle, a.handle, b.handle, c.handle, 1, 1) == 0;
}

template <typename Real>
static void add(const int64_t* code, char* const* at) {  // to, from, count
  Real* to = reinterpret_cast<Real*>(at[code[0]]);
  const Real* from = reinterpret_cast<const Real*>(at[code[1]]);
  for (int64_t i = 0; i < code[2]; ++i) to[i] += from[i];
}

// function, its product and pause, slots of spikes, weight, start (or -1) and result; then the instruction that it stands for
static bool run_spike_product(const int64_t* code, char* const* at) {
  char* const start = code[5] < 0 ? nullptr : at[code[5]];
  return reinterpret_cast<SumRows>(code[0])(code[1], at[code[3]], at[code[4]], start, at[code[6]], code[2]);
}

static bool run(const Torch& torch, Kind kind, const int64_t* code, char** at, char** addresses) {
  switch (kind) {
    case SPIKE_PRODUCT: return run_spike_product(code, at) || run(torch, Kind(code[7]), code + 9, at, addresses);
    case KERNEL: run_kernel(code, at, addresses); return true;
    case ADD_FLOATS: add<float>(code, at); return true;
    case ADD_DOUBLES: add<double>(code, at); return true;
    case ALIAS: at[code[0]] = at[code[1]] + code[2]; return true;  // to, from, offset
    default: return run_op(torch, kind, code, at);
  }
}

// Instructions are: kind, length, what the kind says. `carried`: slots of a state before and after a step.
extern "C" bool run_steps(const Torch* torch, const int64_t* code, int64_t length, const Place* places, char** at, int64_t slots,
                          const int64_t* carried, int64_t states, int64_t steps) {
  std::vector<char*> addresses(length), after(states);
  for (int64_t t = 0; t < steps; ++t) {
    for (int64_t i = 0; i < slots; ++i)
      if (places[i].period) at[i] = places[i].base + t % places[i].period * places[i].stride;
    for (const int64_t *i = code, *end = code + length; i < end; i += i[1])
      if (!run(*torch, Kind(i[0]), i + 2, at, addresses.data())) return false;
    for (int64_t i = 0; i < states; ++i) after[i] = at[carried[2 * i + 1]];
    for (int64_t i = 0; i < states; ++i) at[carried[2 * i]] = after[i];
  }
  return true;
}
"""

KERNEL, PRODUCT, SUM_OF_PRODUCT, COPY, ADD_FLOATS, ADD_DOUBLES, ALIAS, SPIKE_PRODUCT = range(8)


class Place(ctypes.Structure):
    """As in the text: a slot lies at ``base + t % period * stride``; `period` 0: where an instruction or a state puts it."""

    _fields_ = [("base", ctypes.c_void_p), ("stride", ctypes.c_int64), ("period", ctypes.c_int64)]


class Code:
    """Instructions, written one by one."""

    def __init__(self, torch_: Torch) -> None:
        self.torch = torch_
        self.numbers: list[int] = []

    def kernel(self, function: int, addresses: Sequence[tuple[int, int]], numbers: Sequence[int]) -> None:
        """`addresses`: ``(slot, offset in bytes)``."""
        self._instruction(KERNEL, function, len(addresses), *(n for pair in addresses for n in pair), *numbers)

    def op(self, name: str, *views: tuple[int, int, Tensor]) -> None:
        """`name`: one of `OPS`; views ``(slot, offset, tensor of that layout)``, the result first."""
        encoded = [n for view in views for n in self._view(*view)]
        self._instruction(OPS[name], self.torch.functions[name], *encoded)

    def spike_product(
        self, function: tuple[int, int, int], slots: tuple[int, int, int, int], name: str, *views: tuple[int, int, Tensor]
    ) -> None:
        """`function` with its two arguments, instead of the op; slots: spikes, weight, start or -1, result."""
        product = Code(self.torch)
        product.op(name, *views)
        self._instruction(SPIKE_PRODUCT, *function, *slots, *product.numbers)

    def add(self, to: int, value: int, example: Tensor) -> None:
        self._instruction(ADD_FLOATS if example.dtype == torch.float32 else ADD_DOUBLES, to, value, example.numel())

    def alias(self, to: int, source: int, offset: int) -> None:
        self._instruction(ALIAS, to, source, offset)

    def _view(self, slot: int, offset: int, like: Tensor) -> list[int]:
        return [slot, offset, self.torch.dtypes[like.dtype], like.dim(), *like.shape, *like.stride()]

    def _instruction(self, kind: int, *numbers: int) -> None:
        self.numbers += [kind, 2 + len(numbers), *numbers]


# ----------------------------------------------------------------------------------------------------- functions of torch

#: ops and the kind of instruction that calls them
OPS = {
    "cpu_mm_out": PRODUCT,
    "cpu_bmm_out": PRODUCT,
    "cpu_addmm_out": SUM_OF_PRODUCT,
    "cpu_baddbmm_out": SUM_OF_PRODUCT,
    "copy_": COPY,
}


class Torch:
    """Functions and numbers of torch that the interpreter uses."""

    def __init__(self, torch_: LibTorch) -> None:
        self.functions = {name: torch_.address(f"aoti_torch_{name}") for name in OPS}
        self.table = torch_.table("aoti_torch_create_tensor_from_blob", "aoti_torch_delete_tensor_object")
        self.dtypes = {d: torch_.dtype(d) for d in DTYPES}


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def torch_functions() -> Torch | None:
    """None where this version of libtorch lacks one."""
    try:
        found = libtorch()
        return Torch(found) if found is not None else None
    except AttributeError:
        return None


@functools.cache
def load() -> ctypes.CDLL:
    library = compiler.load(TEXT)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.run_steps.argtypes = [pointer, pointer, number, pointer, pointer, number, pointer, number, number]
    library.run_steps.restype = ctypes.c_bool
    return library
