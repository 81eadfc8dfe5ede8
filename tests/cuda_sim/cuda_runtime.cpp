// The fibers, and the symbols of a CUDA build of PyTorch that the launchers use.
#include "cuda_runtime.h"

#include <cuda_pipeline_primitives.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef CUDA_SIM_TSAN
#include <sanitizer/tsan_interface.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_sim {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kWarp = 32;

// A group of threads that wait for one another.
struct Barrier {
  int members = 0, arrived = 0;
  uint64_t generation = 0;
  char met[2] = {};  // for ThreadSanitizer, by turns: a thread may come here again before another one has left
};

// An asynchronous copy, or with no target the end of a group of them.
struct Copy {
  void* to;
  const void* from;
  size_t size, zeros;

  void arrive() const {
    std::memcpy(to, from, size - zeros);
    std::memset(static_cast<char*>(to) + size - zeros, 0, zeros);
  }
};

struct Fiber {
  ucontext_t context;
  std::deque<Copy> copies;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = true;
#ifdef CUDA_SIM_TSAN
  void* tsan = __tsan_create_fiber(0);
#endif
};

ucontext_t scheduler;
std::vector<Fiber> fibers;
std::vector<Barrier> warps;
std::vector<uint64_t> exchanged[2];  // by thread; two, so that one shuffle may begin before all have read the last
std::vector<void*> passed;           // by thread, likewise in `together`
Barrier block;
char* dynamic;  // of this launch's size, so that AddressSanitizer knows where it ends
const std::function<void()>* running;
int current;
#ifdef CUDA_SIM_TSAN
void* scheduler_tsan;
#endif

void switch_to(ucontext_t& from, ucontext_t& to, const char* stack, [[maybe_unused]] bool ends = false) {
#ifdef __SANITIZE_ADDRESS__
  static const void* scheduler_stack;
  static size_t scheduler_size;
  void* fake = nullptr;
  if (stack)
    __sanitizer_start_switch_fiber(&fake, stack, kStack);
  else
    __sanitizer_start_switch_fiber(ends ? nullptr : &fake, scheduler_stack, scheduler_size);
  swapcontext(&from, &to);
  __sanitizer_finish_switch_fiber(fake, stack ? nullptr : &scheduler_stack, stack ? nullptr : &scheduler_size);
#else
  (void)stack;
  swapcontext(&from, &to);
#endif
}

void yield() {
  const int self = current;
#ifdef CUDA_SIM_TSAN
  __tsan_switch_to_fiber(scheduler_tsan, 1);
#endif
  switch_to(fibers[self].context, scheduler, nullptr);
}

void release(Barrier& barrier) {
  if (barrier.members == 0 || barrier.arrived < barrier.members) return;
  barrier.arrived = 0;
  ++barrier.generation;
}

// The last one to come calls `last`, on behalf of all.
template <class F>
void wait(Barrier& barrier, const F& last) {
  const uint64_t generation = barrier.generation;
#ifdef CUDA_SIM_TSAN
  __tsan_release(&barrier.met[generation % 2]);
#endif
  if (++barrier.arrived == barrier.members) {
#ifdef CUDA_SIM_TSAN
    __tsan_acquire(&barrier.met[generation % 2]);
#endif
    last();
#ifdef CUDA_SIM_TSAN
    __tsan_release(&barrier.met[generation % 2]);
#endif
  }
  release(barrier);
  while (barrier.generation == generation) yield();
#ifdef CUDA_SIM_TSAN
  __tsan_acquire(&barrier.met[generation % 2]);
#endif
}

void wait(Barrier& barrier) {
  wait(barrier, [] {});
}

void thread_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  const int self = current;
  (*running)();
  fibers[self].done = true;
  for (Barrier* barrier : {&block, &warps[self / kWarp]}) {
    --barrier->members;
    release(*barrier);
  }
#ifdef CUDA_SIM_TSAN
  __tsan_release(&fibers);
  __tsan_switch_to_fiber(scheduler_tsan, 1);
#endif
  switch_to(fibers[self].context, scheduler, nullptr, true);
}

void run_block(int threads) {
  warps.assign((threads + kWarp - 1) / kWarp, {});
  block = {threads};
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    ++warps[i / kWarp].members;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, thread_main, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (current = 0; current < threads; ++current) {
      if (fibers[current].done) continue;
      any = true;
      threadIdx = dim3(current);
#ifdef CUDA_SIM_TSAN
      __tsan_switch_to_fiber(fibers[current].tsan, 1);
#endif
      switch_to(scheduler, fibers[current].context, fibers[current].stack.get());
    }
  }
}

}  // namespace

int lane() {
  return threadIdx.x % kWarp;
}

uint64_t exchange(uint64_t bits, int from) {
  Barrier& warp = warps[current / kWarp];
  std::vector<uint64_t>& slots = exchanged[warp.generation % 2];
  slots[current] = bits;
  const int self = current;
  wait(warp);
  return slots[self / kWarp * kWarp + from];
}

void together(void* mine, void (*f)(void* const* lanes)) {
  passed[current] = mine;
  void* const* const lanes = &passed[current / kWarp * kWarp];
  wait(warps[current / kWarp], [&] { f(lanes); });
}

void check_aligned(const void* address, size_t size, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % size == 0) return;
  std::fprintf(stderr, "misaligned address of %s\n", what);
  std::abort();
}

char* dynamic_memory() {
  return dynamic;
}

void run(dim3 grid, dim3 threads, size_t dynamic_bytes, const std::function<void()>& kernel) {
  const auto release = [](char* memory) { ::operator delete(memory, std::align_val_t(128)); };
  const std::unique_ptr<char, decltype(release)> memory(
      static_cast<char*>(::operator new(dynamic_bytes, std::align_val_t(128))), release);
  dynamic = memory.get();
  std::memset(dynamic, 0xff, dynamic_bytes);  // NaN, so that what nobody has written shows
  if (fibers.size() < threads.x) fibers = std::vector<Fiber>(threads.x);
  for (auto& slots : exchanged) slots.resize(fibers.size());
  passed.resize(fibers.size());
  running = &kernel;
  gridDim = grid;
  blockDim = threads;
#ifdef CUDA_SIM_TSAN
  scheduler_tsan = __tsan_get_current_fiber();
#endif
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
#ifdef CUDA_SIM_TSAN
      for (unsigned i = 0; i < threads.x; ++i) {
        __tsan_switch_to_fiber(fibers[i].tsan, 0);  // what came before the launch is ordered before it
        __tsan_switch_to_fiber(scheduler_tsan, 1);
      }
#endif
      run_block(threads.x);
#ifdef CUDA_SIM_TSAN
      __tsan_acquire(&fibers);  // a block ends before the next one has the same shared memory
#endif
    }
  }
}

}  // namespace cuda_sim

// threadIdx is that of the fiber that runs: it is set again after every wait.
void __syncthreads() {
  cuda_sim::wait(cuda_sim::block);
}
void __syncwarp() {
  cuda_sim::wait(cuda_sim::warps[cuda_sim::current / cuda_sim::kWarp]);
}

void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros) {
  cuda_sim::check_aligned(to, size, "an asynchronous copy");
  if (zeros < size) cuda_sim::check_aligned(from, size, "an asynchronous copy");
  const cuda_sim::Copy copy{to, from, size, zeros};
#ifdef CUDA_SIM_TSAN
  copy.arrive();
#else
  cuda_sim::fibers[cuda_sim::current].copies.push_back(copy);
#endif
}

void __pipeline_commit() {
  cuda_sim::fibers[cuda_sim::current].copies.push_back({});
}

void __pipeline_wait_prior(size_t groups) {
  auto& copies = cuda_sim::fibers[cuda_sim::current].copies;
  size_t pending = 0;
  for (const auto& copy : copies) pending += copy.to == nullptr;
  for (; pending > groups; copies.pop_front()) {
    if (copies.front().to)
      copies.front().arrive();
    else
      --pending;
  }
}

extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  return 0;
}
void torch_c10_cuda_free_error_msg(char*) {}
}
