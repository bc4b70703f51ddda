"""Calls of an op that are like an earlier one, answered without Python.

    recurrence_<hash>_forward(v0, x, 8)    ->    sizes and strides known:  allocate results, run the kernel
                                                 else:  recurrence_<hash>_forward_in_python(v0, x, 8)

In Python, finding the launch of a call, allocating its results and gathering addresses takes 10 us, and three times that between
other code, whose data fill the caches: more than the kernel of a small layer. In C++ it takes 2.

An op is given to C++ when it is defined, before anyone can call it: PyTorch's dispatcher is not made for kernels that come later.
Its launches are worked out in Python, one by one, and handed over (`DirectCalls.add`).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snn_compile.lowering import result_memory
from snn_compile.lowering.cpp import compiler, large_results
from snn_compile.lowering.cpp.libtorch import LibTorch, libtorch

if TYPE_CHECKING:
    from snn_compile.lowering.cpp.target import BoundCall
    from snn_compile.lowering.launch import ResultSpec

TEXT = (
    """
// Calls of ops that are like an earlier one: the launch that Python has worked out then, on other addresses.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using Handle = void*;  // of a tensor of torch
using Value = uint64_t;  // on torch's stack: a handle, a number, or where the value of an optional lies (0: nowhere)
using Numbers = std::vector<int64_t>;
using Kernel = void (*)(char* const* addresses, const int64_t* numbers);

struct Torch {
  int32_t (*get_dim)(Handle, int64_t*);
  int32_t (*get_sizes)(Handle, int64_t**);
  int32_t (*get_strides)(Handle, int64_t**);
  int32_t (*get_data_ptr)(Handle, void**);
  int32_t (*empty_strided)(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device,
                           int32_t index, Handle* made);
  int32_t (*release)(Handle);
  int32_t (*get_num_threads)(uint32_t*);
  int32_t (*call)(const char* op, const char* overload, Value* stack);
  int32_t (*layout_strided)();
  int32_t (*from_blob)(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
                       int32_t device, int32_t index, Handle* made, int32_t layout, const uint8_t* opaque, int64_t opaque_size,
                       void (*deleter)(void* data, void* context), void* context);
};
static Torch torch;

constexpr size_t MOST_OPS = 1024, MOST_LAUNCHES = 64, MOST_TENSORS = 64, LONGEST_KEY = 512;
alignas(64) static char zeros[64];  // of a cotangent that is absent: all its strides are 0

struct Op {
  std::string in_python;
  std::vector<bool> is_optional;  // by operand; the number of steps follows them
  std::shared_mutex mutex;
  std::vector<std::shared_ptr<const Numbers>> launches;
};
static std::array<Op, MOST_OPS> ops;

static thread_local std::string failure;  // of the call in Python
static thread_local bool is_interrupted = false;
static void (*interrupt)();

static void check(int32_t failed) {
  if (failed) throw std::runtime_error("snn_compile: a function of libtorch failed; it has said why on stderr");
}

"""
    + large_results.TEXT
    + """
// The key of a call, as `DirectCalls.add` in Python writes it: threads, steps; of each operand dims, sizes, strides (absent: -1).
struct Call {
  int64_t key[LONGEST_KEY];
  size_t length = 0;
  Handle operands[MOST_TENSORS];

  Call(const Op& op, const Value* stack) {
    const size_t count = op.is_optional.size();
    uint32_t threads;
    check(torch.get_num_threads(&threads));
    key[length++] = threads;
    key[length++] = int64_t(stack[count]);
    for (size_t i = 0; i < count; ++i) {
      operands[i] = op.is_optional[i] ? of_optional(stack[i]) : Handle(stack[i]);
      if (!add(operands[i])) { length = 0; return; }
    }
  }

  static Handle of_optional(Value value) { return value ? *reinterpret_cast<Handle*>(value) : nullptr; }

  bool add(Handle tensor) {
    int64_t dims = -1, *sizes, *strides;
    if (tensor) check(torch.get_dim(tensor, &dims));
    if (length + 1 + 2 * (dims > 0 ? dims : 0) > LONGEST_KEY) return false;
    key[length++] = dims;
    if (dims <= 0) return true;
    check(torch.get_sizes(tensor, &sizes));
    check(torch.get_strides(tensor, &strides));
    for (int64_t d = 0; d < dims; ++d) key[length++] = sizes[d];
    for (int64_t d = 0; d < dims; ++d) key[length++] = strides[d];
    return true;
  }
};

static std::shared_ptr<const Numbers> find(Op& op, const Call& call) {
  const std::shared_lock lock(op.mutex);
  for (const auto& launch : op.launches)
    if (size_t((*launch)[0]) == call.length && !std::memcmp(launch->data() + 1, call.key, call.length * sizeof(int64_t)))
      return launch;
  return nullptr;
}

static size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

static char* address(Handle tensor) {
  void* data = zeros;
  if (tensor) check(torch.get_data_ptr(tensor, &data));
  return static_cast<char*>(data);
}

// Behind the key: count of results, of each dtype, bytes (of a small one 0), dims, sizes and strides; the kernel; bytes of its
// scratch memory and of copies; count of addresses, of each tensor, offset and copies; the kernel's numbers.
static void run(const Numbers& launch, const Call& call, size_t operands, std::vector<Handle>& results) {
  const int64_t* code = launch.data() + 1 + call.length;
  results.resize(size_t(*code++));
  for (Handle& result : results) {
    const int64_t dtype = code[0], bytes = code[1], dims = code[2];
    const int64_t *const sizes = code + 3, *const strides = sizes + dims;
    if (bytes) empty_large(dims, sizes, strides, int32_t(dtype), size_t(bytes), &result);
    else check(torch.empty_strided(dims, sizes, strides, int32_t(dtype), 0, -1, &result));
    code = strides + dims;
  }
  const auto kernel = reinterpret_cast<Kernel>(code[0]);
  const size_t scratch_bytes = padded(size_t(code[1])), copied_bytes = size_t(code[2]), count = size_t(code[3]);
  code += 4;
  const auto aligned = std::align_val_t(64);
  const auto free_memory = [&](char* memory) { ::operator delete(memory, aligned); };
  const size_t bytes = scratch_bytes + copied_bytes;
  const std::unique_ptr<char, decltype(free_memory)> memory(
      bytes ? static_cast<char*>(::operator new(bytes, aligned)) : nullptr, free_memory);
  char* copies_at = memory.get() + scratch_bytes;
  char* addresses[2 * MOST_TENSORS + 1];
  for (size_t i = 0; i < count; ++i, code += 3) {
    const int64_t tensor = code[0], copies = code[2];
    const bool is_result = tensor >= int64_t(operands);
    addresses[i] = address(tensor < 0 ? nullptr : is_result ? results[tensor - operands] : call.operands[tensor]) + code[1];
    if (!copies) continue;
    std::fill_n(reinterpret_cast<uint32_t*>(copies_at), copies, *reinterpret_cast<const uint32_t*>(addresses[i]));
    addresses[i] = copies_at;
    copies_at += padded(4 * size_t(copies));
  }
  addresses[count] = memory.get();
  kernel(addresses, code);
}

static void release_operands(const Op& op, const Call& call, const Value* stack) {
  for (size_t i = 0; i < op.is_optional.size(); ++i) {
    if (call.operands[i]) torch.release(call.operands[i]);
    if (op.is_optional[i]) delete reinterpret_cast<Value*>(stack[i]);
  }
}

// In Python; an exception there has left its words in `failure`.
static void answer_in_python(const Op& op, Value* stack, size_t results) {
  failure.clear();
  is_interrupted = false;
  check(torch.call(op.in_python.c_str(), "", stack));
  if (is_interrupted) interrupt();
  if (failure.empty()) return;
  for (size_t i = 0; i < results; ++i) torch.release(Handle(stack[i]));
  throw std::runtime_error(failure);
}

static void answer(Op& op, Value* stack, size_t count) {
  const Call call(op, stack);
  const auto launch = call.length ? find(op, call) : nullptr;
  if (!launch) return answer_in_python(op, stack, count);
  std::vector<Handle> results;
  try {
    run(*launch, call, op.is_optional.size(), results);
  } catch (...) {  // no memory: Python knows better what to say
    for (Handle result : results) if (result) torch.release(result);
    return answer_in_python(op, stack, count);
  }
  release_operands(op, call, stack);
  for (size_t i = 0; i < count; ++i) stack[i] = Value(results[i]);
}

// A function of torch's stack has no context: there is one for each op.
using Function = void (*)(Value* stack, uint64_t operands, uint64_t results);
template <size_t I>
static void answer_of(Value* stack, uint64_t, uint64_t results) { answer(ops[I], stack, results); }
template <size_t... I>
static constexpr std::array<Function, sizeof...(I)> answers(std::index_sequence<I...>) { return {answer_of<I>...}; }
static constexpr auto functions = answers(std::make_index_sequence<MOST_OPS>());

extern "C" void set_functions(const Torch* functions) { torch = *functions; }
extern "C" void set_interrupt(void (*function)()) { interrupt = function; }

extern "C" void* define(int64_t index, const char* in_python, const bool* is_optional, int64_t operands) {
  if (size_t(index) >= MOST_OPS || size_t(operands) > MOST_TENSORS) return nullptr;
  ops[index].in_python = in_python;
  ops[index].is_optional.assign(is_optional, is_optional + operands);
  return reinterpret_cast<void*>(functions[index]);
}

extern "C" void add_launch(int64_t index, const int64_t* numbers, int64_t length) {
  if (size_t(numbers[0]) > LONGEST_KEY) return;
  auto launch = std::make_shared<const Numbers>(numbers, numbers + length);
  const std::unique_lock lock(ops[index].mutex);
  if (ops[index].launches.size() == MOST_LAUNCHES) ops[index].launches.clear();  // (sizes that change from call to call)
  ops[index].launches.push_back(std::move(launch));
}

extern "C" void forget_launches() {
  for (Op& op : ops) {
    const std::unique_lock lock(op.mutex);
    op.launches.clear();
  }
}

extern "C" void set_failure(const char* words) { failure = words; }
extern "C" void set_interrupted() { is_interrupted = true; }
"""
)

#: As in the text's `Torch`.
FUNCTIONS = (
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_data_ptr",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "torch_get_num_threads",
    "aoti_torch_call_dispatcher",
    "aoti_torch_layout_strided",
    "torch_from_blob",
)
#: As in the text.
MOST_TENSORS = 64


#: In place of the position of a tensor: zeros.
NOWHERE = -1


def _padded(copies: int) -> int:
    """Bytes; as in the text."""
    return (4 * copies + 63) // 64 * 64


class DirectCalls:
    """One op's calls: which of them C++ can answer is told by `add`."""

    def __init__(self, direct: Direct, index: int) -> None:
        self._direct, self._index = direct, index

    def add(
        self,
        steps: int,
        tensors: Sequence[Tensor | None],
        results: Sequence[ResultSpec],
        kernel: BoundCall,
        copies: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """See `lowering.launch.DirectCalls`."""
        if len(kernel.pointers) > 2 * MOST_TENSORS:
            return
        if any(r.is_large for r in results):
            result_memory.blocks.clear()  # (later calls take theirs from `large_results`)
        key = [torch.get_num_threads(), steps]
        for tensor in tensors:
            key += (-1,) if tensor is None else (tensor.dim(), *tensor.shape, *tensor.stride())
        numbers = [len(key), *key, len(results)]
        for result in results:
            numbers += (self._direct.torch.dtype(result.dtype), result.nbytes if result.is_large else 0)
            numbers += (len(result.size), *result.size, *result.stride)
        numbers += (kernel.address, kernel.scratch, sum(map(_padded, copies.values())), len(kernel.pointers))
        for i, (position, offset) in enumerate(kernel.pointers):
            numbers += (position, offset, copies.get(i, 0))
        numbers += kernel.numbers
        self._direct.library.add_launch(self._index, (ctypes.c_int64 * len(numbers))(*numbers), len(numbers))


class Direct:
    """The library, and what of PyTorch's dispatcher is ours."""

    def __init__(self, torch_: LibTorch, namespace: str) -> None:
        self.torch = torch_
        self.library = compiler.load(TEXT)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.library.define.argtypes, self.library.define.restype = [number, ctypes.c_char_p, pointer, number], pointer
        self.library.add_launch.argtypes = [number, pointer, number]
        self.library.set_failure.argtypes = [ctypes.c_char_p]
        self.library.set_interrupt(ctypes.cast(ctypes.pythonapi.PyErr_SetInterrupt, pointer))
        self.set_functions(torch_.table(*FUNCTIONS))
        self._ops = itertools.count()
        #: PyTorch's list of our kernels for the CPU, and the file's name, of which it keeps the address
        self._cpu, self._file = pointer(), b"direct_call.py"
        made = torch_.library.aoti_torch_library_init_impl(namespace.encode(), b"CPU", self._file, 0, ctypes.byref(self._cpu))
        self._check(made)

    def set_functions(self, table: ctypes.Array[ctypes.c_void_p]) -> None:
        self.library.set_functions(table)

    def define(self, op: str, in_python: str, is_optional: Sequence[bool]) -> DirectCalls | None:
        index, count = next(self._ops), len(is_optional)
        function = self.library.define(index, in_python.encode(), (ctypes.c_bool * count)(*is_optional), count)
        if function is None:  # too many
            return None
        self._check(self.torch.library.aoti_torch_library_impl(self._cpu, op.encode(), ctypes.c_void_p(function)))
        return DirectCalls(self, index)

    def forget(self) -> None:
        """Python is asked about every call again."""
        self.library.forget_launches()

    def in_python(self, run: Callable[..., Any], fake: Callable[..., Any], results: int) -> Callable[..., Any]:
        """`run`, for C++ to call: no exception passes it. Its words do, and an interrupt comes again afterwards."""

        def guarded(*args: Any) -> Any:
            try:
                return run(*args)
            except Exception as e:
                self.library.set_failure(f"{type(e).__name__}: {e}".encode())
                nothing = tuple(torch.empty(0) for _ in range(results))
                return nothing if results > 1 else nothing[0]
            except KeyboardInterrupt:
                self.library.set_interrupted()
                return fake(*args)

        return guarded

    @staticmethod
    def _check(failed: int) -> None:
        if failed:
            raise RuntimeError("libtorch refused an op's kernel")


@functools.cache
def direct(namespace: str) -> Direct | None:
    """None where this version of PyTorch has no such interface."""
    torch_ = libtorch()
    try:
        return Direct(torch_, namespace) if torch_ is not None else None
    except (AttributeError, RuntimeError):
        return None
