"""Memory of large results of calls without Python (`direct_call`), by the rules of `lowering/result_memory`.

A block that no tensor refers to any more is given out again. PyTorch tells that by a function that it calls with the block's
address, so nothing has to be asked; blocks that are not asked for again soon go back to the system.
"""

from __future__ import annotations

from snn_compile.lowering.result_memory import HUGE_PAGE, MADV_HUGEPAGE, PATIENCE

#: What `torch_from_blob` wants, and gives: the text needs `<mutex>`, `<new>` and `<vector>`, and a table `torch` of functions.
TEXT = f"""
#ifdef __linux__
#include <sys/mman.h>
#endif

// Memory of large results: kept when its tensor goes, and given out again.
class Blocks {{
  static constexpr size_t HUGE_PAGE = {HUGE_PAGE};
  static constexpr uint64_t PATIENCE = {PATIENCE};
  struct Block {{ void* data; size_t bytes; uint64_t since; }};
  std::mutex mutex;
  std::vector<Block> idle;
  uint64_t clock = 0;  // large results that were asked for

  static void release(void* data) {{ ::operator delete(data, std::align_val_t(HUGE_PAGE)); }}

 public:
  void* take(size_t bytes) {{
    void* found = nullptr;
    {{
      const std::lock_guard lock(mutex);
      ++clock;
      std::vector<Block> kept;
      for (const Block& block : idle) {{
        if (!found && block.bytes == bytes) found = block.data;
        else if (clock - block.since > PATIENCE) release(block.data);
        else kept.push_back(block);
      }}
      idle.swap(kept);
    }}
    if (found) return found;
    void* const fresh = ::operator new(bytes, std::align_val_t(HUGE_PAGE));
#ifdef __linux__
    madvise(fresh, bytes / HUGE_PAGE * HUGE_PAGE, {MADV_HUGEPAGE});  // (a refusal costs speed, not correctness)
#endif
    return fresh;
  }}

  void give_back(void* data, size_t bytes) {{
    const std::lock_guard lock(mutex);
    idle.push_back({{data, bytes, clock}});
  }}
}};
static Blocks& blocks = *new Blocks;  // (never destroyed: a tensor may live longer than what is static here)

static void give_back(void* data, void* bytes) {{ blocks.give_back(data, reinterpret_cast<size_t>(bytes)); }}

static void empty_large(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, size_t bytes, Handle* made) {{
  void* const data = blocks.take(bytes);
  void* const context = reinterpret_cast<void*>(bytes);
  const int32_t failed = torch.from_blob(
      data, dims, sizes, strides, 0, dtype, 0, -1, made, torch.layout_strided(), nullptr, 0, give_back, context);
  if (failed) give_back(data, context);
  check(failed);
}}
"""
