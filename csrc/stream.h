// Writing past the caches. A line that is written whole need not be read first, and pushes out nothing that is read.
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tempops {

// Whether to: tensors that are larger together than the caches do not stay there anyway.
inline bool passes_caches(std::initializer_list<const Clip*> tensors) {
#if defined(__x86_64__)
  static const int64_t caches = [] {
    const char* bytes = std::getenv("TEMPOPS_CACHE_BYTES");
    return bytes ? std::atoll(bytes) : 32LL << 20;
  }();
  int64_t bytes = 0;
  for (const Clip* x : tensors) bytes += x->N * x->T * x->C * x->P * static_cast<int64_t>(x->tensor.element_size());
  return bytes > caches;
#else
  return false;  // others have no such stores that C++ can name
#endif
}

// A function of its own for each instruction set: what calls it is compiled for all.
#if defined(__x86_64__)
TEMPOPS_AVX512 inline void stream_lines_avx512(char* to, const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
}
__attribute__((noinline)) inline void stream_lines(char* to, const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
}
#endif

// to = from: whole cache lines past the caches, what is left at the ends through them.
inline void stream(void* to_, const void* from_, int64_t bytes) {
  char* to = static_cast<char*>(to_);
  const char* from = static_cast<const char*>(from_);
#if defined(__x86_64__)
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) % 64), lines = (bytes - head) & ~63;
  std::memcpy(to, from, head);
  isa() == Isa::avx512 ? stream_lines_avx512(to + head, from + head, lines)
                       : stream_lines(to + head, from + head, lines);
  to += head + lines, from += head + lines, bytes -= head + lines;
#endif
  std::memcpy(to, from, bytes);
}

// What a thread calls when it has streamed, before another one reads.
inline void end_of_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Where a thread's loops write runs of an output: straight to it, or to a piece of scratch that is then streamed there.
template <class scalar>
class Writer {
 public:
  static constexpr int64_t kPiece = 2048 / sizeof(scalar);

  const bool streams;

  explicit Writer(bool streams) : streams(streams) {}
  Writer(const Writer&) = delete;
  ~Writer() {
    if (streams) end_of_stream();
  }

  // Calls f(constant) with `streams`, for what is done often: write<constant>.
  template <class F>
  TEMPOPS_INLINE void chosen(const F& f) {
    streams ? f(std::true_type()) : f(std::false_type());
  }
  // Calls f(to, begin, count) for the parts of a run of n elements, of which f writes [begin, begin + count) to `to`.
  template <bool streams, class F>
  TEMPOPS_INLINE void write(scalar* run, int64_t n, const F& f) {
    if constexpr (!streams) return f(run, 0, n);
    for (int64_t begin = 0, count; begin < n; begin += count) {
      // Parts end where cache lines do.
      const int64_t past = reinterpret_cast<uintptr_t>(run + begin) % 64 / sizeof(scalar);
      count = std::min(n - begin, kPiece - past);
      f(piece + past, begin, count);
      stream(run + begin, piece + past, count * sizeof(scalar));
    }
  }

 private:
  alignas(64) scalar piece[kPiece];
};

}  // namespace tempops
