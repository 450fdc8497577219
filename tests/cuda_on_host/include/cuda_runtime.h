// As much of CUDA as `csrc/cuda` uses, on the host: the threads of a block are fibers that take turns at
// `__syncthreads()`, blocks run one after the other, and a launch has run when it returns.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <typeinfo>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  uint64_t count() const { return uint64_t(x) * y * z; }
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };

namespace host {

inline cudaError_t last_error = cudaSuccess;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA on the host: %s\n", what);
  std::abort();
}

// The launches of one kernel with one set of template arguments; there is one for each that the library holds.
struct Kernel {
  const char* name;
  int64_t launches = 0;

  static std::vector<Kernel*>& all() {
    static std::vector<Kernel*> all;
    return all;
  }
  explicit Kernel(const char* name) : name(name) { all().push_back(this); }
};
template <class Here>
inline Kernel kernel{typeid(Here).name()};

class Block {
 public:
  explicit Block(const std::function<void()>& thread) : thread_(thread) {}

  // All threads up to the next barrier, in any order, until they have ended.
  void run(dim3 index) {
    blockIdx = index;
    current_ = this;
    begun_ = 0;
    const int64_t count = blockDim.count();
    if (int64_t(fibers().size()) < count) fibers().resize(count);
    order_.resize(count);
    for (int64_t i = 0; i < count; ++i) order_[i] = i;
    int64_t left = count;
    for (bool first = true; left > 0; first = false) {
      std::shuffle(order_.begin(), order_.end(), chance());
      int64_t ended = 0;
      for (const int64_t i : order_) ended += !step(i, first);
      if (ended != 0 && ended != left) fail("some threads wait at a barrier that others never reach");
      left -= ended;
    }
  }

  void wait_for_others() {
    waits_ = true;
    swapcontext(&fibers()[running_].context, &scheduler());
  }

  int64_t begin_thread() { return ++begun_; }
  int64_t threads_begun() const { return begun_; }
  int64_t running_thread() const { return running_; }

  static Block& current() { return *current_; }

 private:
  struct Fiber {
    static constexpr size_t STACK = 1 << 16;
    std::unique_ptr<char[]> stack{new char[STACK]};
    ucontext_t context;
  };

  // False if the thread has ended.
  bool step(int64_t i, bool first) {
    Fiber& fiber = fibers()[i];
    if (first) {
      getcontext(&fiber.context);
      fiber.context.uc_stack = {fiber.stack.get(), 0, Fiber::STACK};
      fiber.context.uc_link = &scheduler();
      makecontext(&fiber.context, [] { current_->thread_(); }, 0);
    }
    running_ = i;
    waits_ = false;
    threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    swapcontext(&scheduler(), &fiber.context);
    return waits_;
  }

  static std::vector<Fiber>& fibers() {
    static std::vector<Fiber> fibers;
    return fibers;
  }
  static ucontext_t& scheduler() {
    static ucontext_t scheduler;
    return scheduler;
  }
  static std::mt19937& chance() {
    static std::mt19937 chance(0);
    return chance;
  }

  static inline Block* current_ = nullptr;
  const std::function<void()>& thread_;
  std::vector<int64_t> order_;
  int64_t running_ = 0, begun_ = 0;
  bool waits_ = false;
};

inline int64_t launches = 0;       // of all kernels so far
inline int64_t scratch_bytes = 0;  // of the last tensor of bytes
// Whether launches only count, so that host code can be measured alone. Results are then uninitialised.
inline const bool runs_kernels = std::getenv("RDP_NO_KERNELS") == nullptr;

// `kernel<<<grid, block, shared, stream>>>(arguments)`, with the limits of compute capability 8.0 and later.
template <class Thread>
void launch(dim3 grid, dim3 block, size_t, cudaStream_t, const Thread& thread) {
  const bool possible = grid.count() > 0 && grid.x <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535 &&
                        block.count() > 0 && block.count() <= 1024 && block.z <= 64;
  if (!possible) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  ++launches;
  if (!runs_kernels) return;
  gridDim = grid;
  blockDim = block;
  const std::function<void()> body(thread);
  Block runner(body);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) runner.run(dim3(x, y, z));
    }
  }
}

// What the builder has each kernel begin with. `Here`: a type of the kernel's own.
template <class Here>
void enter(int64_t launch_bound) {
  if (int64_t(blockDim.count()) > launch_bound) fail("more threads than __launch_bounds__");
  if (Block::current().begin_thread() == 1 && !(blockIdx.x | blockIdx.y | blockIdx.z)) ++kernel<Here>.launches;
}

// What it has follow a `__shared__` array: to a block, what another one left in it is NaN.
template <class Array>
void poison(Array& shared) {
  if (Block::current().threads_begun() == 1) std::memset(&shared, 0xff, sizeof shared);
}

// A limit of the kernels that a test may lower, so that small tensors take several rounds.
inline int64_t limit(const char* name, int64_t value) {
  const char* lowered = std::getenv(name);
  return lowered == nullptr ? value : std::atoll(lowered);
}

}  // namespace host

inline void __syncthreads() { host::Block::current().wait_for_others(); }

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = host::last_error;
  host::last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
