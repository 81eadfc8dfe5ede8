// The fibers, and the symbols of a CUDA build of PyTorch that the launchers use.
#include "cuda_runtime.h"

#include <cuda_pipeline_primitives.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#ifdef CUDA_SIM_ADDRESS
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef CUDA_SIM_THREAD
#include <sanitizer/tsan_interface.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_sim {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kWarp = 32;

// A group of threads that wait for one another.
struct Barrier {
  int members = 0, arrived = 0, ended = 0;
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

// Where a fiber goes on. swapcontext asks the system for signal masks, which takes most of the time here.
using Place = void* [5];

struct Fiber {
  ucontext_t context;  // where it begins
  Place place;
  bool begun = false;
  std::deque<Copy> copies;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = true;
#ifdef CUDA_SIM_THREAD
  void* tsan = __tsan_create_fiber(0);
#endif
};

Place scheduler;
std::vector<Fiber> fibers;
std::vector<Barrier> warps;
std::vector<uint64_t> exchanged[2];  // by thread; two, so that one shuffle may begin before all have read the last
std::vector<void*> passed;           // by thread, in `together`
Barrier block;
char* dynamic;  // of this launch's size, so that AddressSanitizer knows where it ends
const std::function<void()>* running;
int current;
#ifdef CUDA_SIM_THREAD
void* scheduler_tsan;
#endif
#ifdef CUDA_SIM_ADDRESS
const void* scheduler_stack;
size_t scheduler_size;
#endif

[[gnu::noinline]] void leave(Place& here, Fiber* fiber) {
  if (__builtin_setjmp(here)) return;
  if (!fiber) __builtin_longjmp(scheduler, 1);
  if (fiber->begun) __builtin_longjmp(fiber->place, 1);
  fiber->begun = true;
  setcontext(&fiber->context);
}

// From the scheduler to a fiber, or from a fiber, which may end there, to the scheduler.
void enter(Fiber& fiber) {
#ifdef CUDA_SIM_THREAD
  __tsan_switch_to_fiber(fiber.tsan, 1);
#endif
#ifdef CUDA_SIM_ADDRESS
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStack);
#endif
  leave(scheduler, &fiber);
#ifdef CUDA_SIM_ADDRESS
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void yield([[maybe_unused]] bool ends = false) {
  const int self = current;
#ifdef CUDA_SIM_THREAD
  __tsan_switch_to_fiber(scheduler_tsan, 1);
#endif
#ifdef CUDA_SIM_ADDRESS
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(ends ? nullptr : &fake, scheduler_stack, scheduler_size);
#endif
  leave(fibers[self].place, nullptr);
#ifdef CUDA_SIM_ADDRESS
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#endif
}

void release(Barrier& barrier) {
  if (barrier.members == 0 || barrier.arrived < barrier.members) return;
  barrier.arrived = 0;
  ++barrier.generation;
}

void meet(Barrier& barrier) {
  const uint64_t generation = barrier.generation;
  ++barrier.arrived;
  release(barrier);
  while (barrier.generation == generation) yield();
}

// A GPU does not say what happens then.
void expect_whole(bool whole) {
  if (whole) return;
  std::fputs("a shuffle or barrier of a warp without all its threads\n", stderr);
  std::abort();
}

// The threads of a warp wait for all of it.
Barrier& own_warp() {
  Barrier& warp = warps[current / kWarp];
  expect_whole(warp.ended == 0);
  return warp;
}

// As meet; moreover what anyone wrote before is seen by all after it.
void wait(Barrier& barrier) {
#ifdef CUDA_SIM_THREAD
  char* const met = &barrier.met[barrier.generation % 2];
  __tsan_release(met);
  meet(barrier);
  __tsan_acquire(met);
#else
  meet(barrier);
#endif
}

// Calls f once for a warp, with what its lanes passed.
template <class Lane, class F>
void together(Lane& mine, const F& f) {
  Barrier& warp = own_warp();
  passed[current] = &mine;
  if (warp.arrived + 1 == warp.members) {
    void* const* const lanes = &passed[current / kWarp * kWarp];
    f([&](int i) -> Lane& { return *static_cast<Lane*>(lanes[i]); });
  }
  meet(warp);
}

void thread_main() {
#ifdef CUDA_SIM_ADDRESS
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  const int self = current;
  (*running)();
  fibers[self].done = true;
  expect_whole(warps[self / kWarp].arrived == 0);
  for (Barrier* barrier : {&block, &warps[self / kWarp]}) {
    --barrier->members;
    ++barrier->ended;
    release(*barrier);
  }
#ifdef CUDA_SIM_THREAD
  __tsan_release(&fibers);
#endif
  yield(true);
}

void run_block(int threads) {
  warps.assign((threads + kWarp - 1) / kWarp, {});
  block = {threads};
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    ++warps[i / kWarp].members;
    fiber.done = fiber.begun = false;
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
      enter(fibers[current]);
    }
  }
}

}  // namespace

int lane() {
  return threadIdx.x % kWarp;
}

uint64_t exchange(uint64_t bits, int from) {
  Barrier& warp = own_warp();
  std::vector<uint64_t>& slots = exchanged[warp.generation % 2];
  slots[current] = bits;
  const int self = current;
  meet(warp);  // orders no other memory
  return slots[self / kWarp * kWarp + from];
}

void distribute(uint32_t (&to)[4], const uint16_t (&row)[8], bool transposed) {
  struct Lane {
    uint32_t (&to)[4];
    const uint16_t (&row)[8];
  } mine{to, row};
  together(mine, [&](const auto& lane) {
    for (int m = 0; m < 4; ++m)
      for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) {
          uint32_t& word = lane(4 * i + j / 2).to[m];
          const int from = transposed ? j : i, at = transposed ? i : j;
          const uint32_t element = lane(8 * m + from).row[at];
          word = j % 2 ? word | element << 16 : element;
        }
  });
}

template <class scalar>
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float (&sum)[4];
    const uint32_t (&a)[4];
    uint32_t b[2];
  } mine{sum, a, {b0, b1}};
  together(mine, [](const auto& lane) {
    constexpr int of_word = 4 / sizeof(scalar), half = 4 * of_word;
    float left[16][2 * half], right[8][2 * half];
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 2 * half; ++k) {
        const Lane& from = lane(i % 8 * 4 + k % half / of_word);
        scalar element[of_word];
        std::memcpy(element, &from.a[k / half * 2 + i / 8], 4);
        left[i][k] = static_cast<float>(element[k % of_word]);
        if (i >= 8) continue;
        std::memcpy(element, &from.b[k / half], 4);
        right[i][k] = static_cast<float>(element[k % of_word]);
      }
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        float total = 0;
        for (int k = 0; k < 2 * half; ++k) total += left[i][k] * right[j][k];
        lane(i % 8 * 4 + j / 2).sum[i / 8 * 2 + j % 2] += total;
      }
  });
}
template void multiply<float>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void multiply<torch::headeronly::Half>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void multiply<torch::headeronly::BFloat16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);

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
#ifdef CUDA_SIM_THREAD
  scheduler_tsan = __tsan_get_current_fiber();
#endif
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
#ifdef CUDA_SIM_THREAD
      for (unsigned i = 0; i < threads.x; ++i) {
        __tsan_switch_to_fiber(fibers[i].tsan, 0);  // what came before the launch is ordered before it
        __tsan_switch_to_fiber(scheduler_tsan, 1);
      }
#endif
      run_block(threads.x);
#ifdef CUDA_SIM_THREAD
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
  cuda_sim::wait(cuda_sim::own_warp());
}

void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros) {
  cuda_sim::check_aligned(to, size, "an asynchronous copy");
  cuda_sim::check_aligned(from, size, "an asynchronous copy");  // also where it is zeros, and nothing is read
  const cuda_sim::Copy copy{to, from, size, zeros};
#ifdef CUDA_SIM_THREAD
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
