// Which instruction set a CPU loop runs with, chosen at run time.
//
// A kernel is a plain loop in a lambda marked TEMPOPS_INLINE. `run` calls it from inside a function that is compiled
// for the chosen instruction set; because the lambda is inlined there, the compiler vectorises the same source once
// per instruction set. Nothing is compiled with -march=native, and other processors get the baseline alone.
//
// A kernel that walks blocks of some thousand elements calls `run` again for what it does to one of them: compilers
// take much longer over one large function than over its parts, and parts can be shared. What a loop reads of the
// captures is copied to locals first (a lambda that captures by value does that), or passed to `run` as arguments.
#pragma once

#include <cstdlib>
#include <cstring>

#define TEMPOPS_INLINE __attribute__((always_inline))

#if defined(__x86_64__)
#define TEMPOPS_AVX2 __attribute__((noinline, target("avx2,fma")))
#define TEMPOPS_AVX512 \
  __attribute__((noinline, target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif

namespace tempops {

enum class Isa { baseline, avx2, avx512 };

inline const char* name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

// The best instruction set of this processor, lowered by PyTorch's own variable ATEN_CPU_CAPABILITY.
inline Isa detect_isa() {
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const auto limited_to = [&](const char* value) { return limit && std::strcmp(limit, value) == 0; };
  if (limited_to("default")) return Isa::baseline;
#if defined(__x86_64__)
  if (!limited_to("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

inline Isa isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

#if defined(__x86_64__)
template <class Body, class... Args>
TEMPOPS_AVX512 void run_avx512(const Body& body, Args... args) {
  body(args...);
}
template <class Body, class... Args>
TEMPOPS_AVX2 void run_avx2(const Body& body, Args... args) {
  body(args...);
}
#endif
template <class Body, class... Args>
__attribute__((noinline)) void run_baseline(const Body& body, Args... args) {
  body(args...);
}

// Calls body(args...), compiled for the instruction set in use.
template <class Body, class... Args>
void run(const Body& body, Args... args) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return run_avx512(body, args...);
  if (isa() == Isa::avx2) return run_avx2(body, args...);
#endif
  run_baseline(body, args...);
}

}  // namespace tempops
