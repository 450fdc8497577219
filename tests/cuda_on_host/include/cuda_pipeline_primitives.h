// Asynchronous copies to shared memory: a thread's copies take place when it waits for them, and not before.
#pragma once

#include <deque>

#include "cuda_runtime.h"

namespace host {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// The copies that the running thread has begun: the groups that it has committed, then the open one.
inline std::deque<std::vector<Copy>>& copies() {
  static std::vector<std::deque<std::vector<Copy>>> of_threads(1024);
  auto& groups = of_threads[Block::current().running_thread()];
  if (groups.empty()) groups.emplace_back();
  return groups;
}

}  // namespace host

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    host::fail("a misaligned copy to shared memory");
  }
  host::copies().back().push_back({to, from, bytes});
}

inline void __pipeline_commit() { host::copies().emplace_back(); }

// All groups but the last `prior` ones are there afterwards.
inline void __pipeline_wait_prior(size_t prior) {
  for (auto& groups = host::copies(); groups.size() > prior + 1; groups.pop_front()) {
    for (const host::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
}
