// motion_enhance on CUDA.
//
// A maximum around an element is that along each of three rows, then that of the three. Of equals the first wins, and
// of NaNs the last, as in F.max_pool2d. The backward gathers: dR goes from each window to the row that won it, and then
// from each row's centre to the column that won there. 16-bit elements are compared two at a time.
//
// Kernel size 3, planar: a thread has one pack of a frame, whatever rows it spans, and walks T. The lanes beside it
// have its neighbours in a row; those in other rows are a fixed distance away in shared memory.
//
// Kernel size 3, channels_last: a thread has V channels of kRows pixels of a column, and walks T. Neighbours are read
// through the first-level cache, and those outside the plane are moved to its edge: an element of the window read twice
// leaves the maximum as it is. The backward's columns tell one another what they won in shared memory.
//
// Planes of which no whole packs can be read, or that are very wide: the same with single elements.
//
// Other sizes: a thread has one element and looks at all of its window.
#include "../cuda.h"
#include "arguments.h"

namespace tempops {
namespace {

constexpr int kRows = 4;

struct Shape {
  int64_t N, T, C;
  int H, W;
  bool channels_last;

  explicit Shape(const Clip& x)
      : N(x.N), T(x.T), C(x.C), H(static_cast<int>(x.H)), W(static_cast<int>(x.W)), channels_last(x.channels_last) {
    TEMPOPS_CHECK(x.H == H && x.W == W, "x has too many rows or columns: ", x.H, " x ", x.W);
    TEMPOPS_CHECK(x.C * x.P <= UINT32_MAX, "frames of 2^32 elements or more are not supported");  // see `quotient`
  }
  __device__ int64_t pixel(int i, int j) const {
    return static_cast<int64_t>(i) * W + j;
  }
};

// One direction in which frames are cut into tiles: `of_tile` each, of which `margin` on either side are read for their
// neighbours only, their results being another tile's.
struct Cut {
  int64_t all, tiles;
  int of_tile, margin = 0;

  Cut(int64_t all, int64_t widest, bool margins = false) : all(all) {
    margin = margins && all > widest ? 1 : 0;
    tiles = blocks_for(all, widest - 2 * margin);
    of_tile = static_cast<int>(blocks_for(all, tiles)) + 2 * margin;
  }
  __device__ int64_t first(int64_t tile) const {
    return tile * (of_tile - 2 * margin) - margin;
  }
};

// A block's tile: some columns of threads by some strips of kRows rows by some groups of channels, a group being V
// channels where channels are adjacent, else one. Where they are, 64 bytes of a pixel stay together if V > 1, and a
// tile has about as many rows as columns, so that little is read by two blocks.
struct Tiles {
  Shape shape;
  Cut columns, strips, groups;

  Tiles(const Clip& x, int V, bool exchange)
      : shape(x), columns(x.W, x.channels_last ? 16 : 64, exchange),
        strips(blocks_for(x.H, kRows), kThreads / least_groups(x, V) / columns.of_tile),
        groups(channel_groups(x, V), kThreads / columns.of_tile / strips.of_tile) {}

  static int64_t channel_groups(const Clip& x, int V) {
    return x.channels_last ? x.C / V : x.C;
  }
  static int64_t least_groups(const Clip& x, int V) {
    const int64_t bytes = x.tensor.element_size() * V;
    return x.channels_last ? std::min<int64_t>({8, 64 / bytes, channel_groups(x, V)}) : 1;
  }
  int64_t count() const {
    return columns.tiles * strips.tiles * groups.tiles;
  }
};

// What a thread has of a frame: V elements of kRows rows, or of as many as there are.
template <int V>
struct Site {
  int64_t c, pixel;          // the first
  int up, down;              // how many rows there are above and below, counted as far as needed
  int step;                  // from this thread to the one of the next column
  bool inside, writes;       // has elements; has results
  bool leftmost, rightmost;  // of the plane

  __device__ explicit Site(const Tiles& tiles) {
    const bool channels_last = tiles.shape.channels_last;
    const auto &columns = tiles.columns, &strips = tiles.strips, &groups = tiles.groups;
    int id = threadIdx.x, group = 0;
    if (channels_last) group = id % groups.of_tile, id /= groups.of_tile;
    const int j = id % columns.of_tile, i = id / columns.of_tile % strips.of_tile;
    id /= columns.of_tile * strips.of_tile;
    if (!channels_last) group = id;
    const int64_t block = blockIdx.x, rest = quotient(block, groups.tiles), band = quotient(rest, columns.tiles);
    const int64_t at_group = groups.first(block - rest * groups.tiles) + group;
    const int64_t at_column = columns.first(rest - band * columns.tiles) + j;
    c = at_group * V;
    const int64_t row = (strips.first(band) + i) * kRows, more = tiles.shape.H - 1 - row;
    pixel = row * tiles.shape.W + at_column;
    up = row == 0 ? 0 : kRows;
    down = more < 2 * kRows ? static_cast<int>(more) : 2 * kRows;
    step = channels_last ? groups.of_tile : 1;
    inside = (channels_last ? id == 0 : group < groups.of_tile) && at_group < groups.all && at_column >= 0 &&
             at_column < columns.all && more >= 0;
    writes = inside && j >= columns.margin && j < columns.of_tile - columns.margin;
    leftmost = at_column == 0;
    rightmost = at_column == columns.all - 1;
  }

  __device__ bool has_row(int r) const {
    return r >= -up && r <= down;
  }
  // The first row, or the nearest to row r < 0 that there is.
  template <class scalar>
  __device__ scalar* start(const Elements<scalar>& x, int64_t n, int64_t t, int r) const {
    return x.at(n, t, c, pixel) - (up < -r ? up : -r) * x.row;
  }
  // From row r to the next, or to what is nearest to the next. Pointers that walk take fewer registers than offsets.
  template <class scalar>
  __device__ scalar* next(const Elements<scalar>& x, scalar* from, int r) const {
    return r >= -up && r < down ? from + x.row : from;
  }
};

// V adjacent elements as words that one instruction compares: one of 4 or 8 bytes, or two of 2.
template <class scalar, int V>
struct Words {
  using word = std::conditional_t<sizeof(scalar) == 8, uint64_t, uint32_t>;
  static constexpr int kPer = V == 1 ? 1 : sizeof(word) / sizeof(scalar), kWords = V / kPer;
  word w[kWords];

  __device__ static Words load(const scalar* from) {
    const auto pack = Pack<scalar, V>::load(from);
    Words words{};
    memcpy(&words, &pack, sizeof(pack));
    return words;
  }
  __device__ void store(scalar* to) const {
    Pack<scalar, V> pack;
    memcpy(&pack, this, sizeof(pack));
    pack.store(to);
  }
};

// f(a, b), element by element.
template <class scalar, class word, class F>
__device__ word each(word a, word b, const F& f) {
  scalar of_a[sizeof(word) / sizeof(scalar)], of_b[sizeof(word) / sizeof(scalar)];
  memcpy(of_a, &a, sizeof(a));
  memcpy(of_b, &b, sizeof(b));
#pragma unroll
  for (size_t k = 0; k < sizeof(word) / sizeof(scalar); ++k) {
    of_a[k] = static_cast<scalar>(f(static_cast<acc_t<scalar>>(of_a[k]), static_cast<acc_t<scalar>>(of_b[k])));
  }
  memcpy(&a, of_a, sizeof(a));
  return a;
}

// Whether v wins over m, which comes before it.
template <class acc>
__device__ bool wins(acc v, acc m) {
  return v > m || v != v;
}

// The larger elements; NaN where there is one.
template <class scalar, class word>
__device__ word larger(word a, word b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<scalar, float>)
    asm("max.NaN.f32 %0, %0, %1;" : "+r"(a) : "r"(b));
  else if constexpr (std::is_same_v<scalar, Half>)
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  else if constexpr (std::is_same_v<scalar, BFloat16>)
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  else
#endif
    a = each<scalar>(a, b, [](auto a, auto b) { return wins(b, a) ? b : a; });
  return a;
}

// a - b, rounded once.
template <class scalar, class word>
__device__ word difference(word a, word b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<scalar, Half>)
    asm("sub.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  else if constexpr (std::is_same_v<scalar, BFloat16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(a) : "r"(b), "r"(0xbf80bf80));  // b times -1
  else
#endif
    a = each<scalar>(a, b, [](auto a, auto b) { return a - b; });
  return a;
}

// All bits where v wins over m.
template <class scalar, class word>
__device__ word won(word v, word m) {
  if constexpr (sizeof(scalar) == sizeof(word)) {
    acc_t<scalar> a, b;
    memcpy(&a, &v, sizeof(a));
    memcpy(&b, &m, sizeof(b));
    return wins(a, b) ? ~word(0) : word(0);
  } else {
    word above, none;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (std::is_same_v<scalar, Half>) {
      asm("set.gt.u32.f16x2 %0, %1, %2;" : "=r"(above) : "r"(v), "r"(m));
      asm("set.nan.u32.f16x2 %0, %1, %1;" : "=r"(none) : "r"(v));
    } else {
      asm("set.gt.u32.bf16x2 %0, %1, %2;" : "=r"(above) : "r"(v), "r"(m));
      asm("set.nan.u32.bf16x2 %0, %1, %1;" : "=r"(none) : "r"(v));
    }
    return above | none;
#else
    scalar a[2], b[2];
    memcpy(a, &v, sizeof(v));
    memcpy(b, &m, sizeof(m));
    above = wins<float>(a[1], b[1]) ? 0xffff0000 : 0;
    none = wins<float>(a[0], b[0]) ? 0xffff : 0;
    return above | none;
#endif
  }
}

template <class word>
__device__ word select(word mask, word a, word b) {
  return (a & mask) | (b & ~mask);
}

template <class scalar, int V>
__global__ void __launch_bounds__(kThreads, 2)
    enhance_kernel(Elements<scalar> y, Elements<const scalar> x, Tiles tiles) {
  using Own = Words<scalar, V>;
  const Site<V> at(tiles);
  if (!at.writes) return;
  const int64_t left = at.leftmost ? 0 : -x.sp, right = at.rightmost ? 0 : x.sp;
  for (int64_t n = blockIdx.y; n < tiles.shape.N; n += gridDim.y) {
    Own past[kRows];
    const scalar* from = at.start(x, n, 0, 0);
#pragma unroll
    for (int r = 0; r < kRows; from = at.next(x, from, r), ++r) past[r] = Own::load(from);
    for (int64_t t = 1; t < tiles.shape.T; ++t) {
      Own maxima[kRows + 2], here[kRows];  // all is read before anything is written: loads do not overtake stores
      from = at.start(x, n, t, -1);
#pragma unroll
      for (int r = -1; r <= kRows; from = at.next(x, from, r), ++r) {
        const Own before = Own::load(from + left), own = Own::load(from), after = Own::load(from + right);
        if (r >= 0 && r < kRows) here[r] = own;
#pragma unroll
        for (int k = 0; k < Own::kWords; ++k) {
          maxima[r + 1].w[k] = larger<scalar>(larger<scalar>(before.w[k], own.w[k]), after.w[k]);
        }
      }
      scalar* to = at.start(y, n, t - 1, 0);
#pragma unroll
      for (int r = 0; r < kRows; to += y.row, ++r) {
        Own out;
#pragma unroll
        for (int k = 0; k < Own::kWords; ++k) {
          const auto around = larger<scalar>(maxima[r].w[k], maxima[r + 2].w[k]);
          out.w[k] = difference<scalar>(larger<scalar>(around, maxima[r + 1].w[k]), past[r].w[k]);
        }
        if (at.has_row(r)) out.store(to);
        past[r] = here[r];
      }
    }
  }
}

// Planar: a frame is one run of packs whatever its width, and a thread has one of them, as has slot `slot` of the
// block. A pixel's neighbours in the rows above and below are W elements away. The first and the last lane of a warp
// have a pack of other warps: they only show it to the lanes beside them.
template <class scalar>
struct Slot {
  static constexpr int V = kWidestBytes / sizeof(scalar);
  static constexpr int kOwners = kWarp - 2, kSlots = kThreads / kWarp * kOwners;
  using Own = Words<scalar, V>;
  using word = typename Own::word;

  int64_t first;  // element
  int slot;
  bool inside, owner, near, writes;  // near: has results, or shows something to those that have
  Own left, right, up, down;         // all bits of the elements that have such a neighbour

  // `margin` slots on either side of a block are read for their neighbours only.
  __device__ Slot(const Shape& shape, int margin, int reach) {
    const int lane = threadIdx.x % kWarp;
    slot = threadIdx.x / kWarp * kOwners + lane - 1;
    owner = lane > 0 && lane <= kOwners;
    first = (static_cast<int64_t>(blockIdx.x) * (kSlots - 2 * margin) + slot - margin) * V;
    inside = first >= 0 && first < shape.C * shape.pixel(shape.H, 0);
    near = slot >= reach && slot < kSlots - reach;
    writes = inside && owner && slot >= margin && slot < kSlots - margin;
    left = right = up = down = {};
    const int64_t row = quotient(inside ? first : 0, shape.W);
    int i = static_cast<int>(row - quotient(row, shape.H) * shape.H);
    int j = static_cast<int>((inside ? first : 0) - row * shape.W);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const word bits = ~word(0) >> 8 * (sizeof(word) - sizeof(scalar)) << 8 * sizeof(scalar) * (k % Own::kPer);
      if (j > 0) left.w[k / Own::kPer] |= bits;
      if (j + 1 < shape.W) right.w[k / Own::kPer] |= bits;
      if (i > 0) up.w[k / Own::kPer] |= bits;
      if (i + 1 < shape.H) down.w[k / Own::kPer] |= bits;
      if (++j == shape.W) j = 0, ++i;
      if (i == shape.H) i = 0;
    }
#pragma unroll
    for (int k = 0; k < Own::kWords; ++k) {
      keep(left.w[k]);
      keep(right.w[k]);
      keep(up.w[k]);
      keep(down.w[k]);
    }
  }

  __device__ Own load(const scalar* frame) const {
    return inside ? Own::load(frame) : Own{};
  }
  // The elements before, and those after, the ones of this thread.
  __device__ Own before(const Own& own) const {
    Own out;
    word past = __shfl_up_sync(0xffffffffu, own.w[Own::kWords - 1], 1);
#pragma unroll
    for (int k = 0; k < Own::kWords; past = own.w[k], ++k) out.w[k] = joined(past, own.w[k], Own::kPer - 1);
    return out;
  }
  __device__ Own after(const Own& own) const {
    Own out;
    word next = __shfl_down_sync(0xffffffffu, own.w[0], 1);
#pragma unroll
    for (int k = Own::kWords - 1; k >= 0; next = own.w[k], --k) {
      out.w[k] = Own::kPer == 1 ? next : joined(own.w[k], next, 1);
    }
    return out;
  }
  // The word that begins with element k of two words.
  __device__ static word joined(word a, word b, int k) {
    constexpr int kBits = 4 * sizeof(word);
    return k == 0 ? a : a >> kBits | b << kBits;
  }
};

// What the slots show one another, word by word, so that 32 threads read 32 banks whatever the distance. The words of
// a slot are followed by those of the next one, a second time: which words are some elements away is one address.
template <class scalar>
struct Shown {
  using At = Slot<scalar>;
  using Own = typename At::Own;
  static constexpr int kWords = Own::kWords;
  typename At::word w[2 * kWords][At::kSlots];

  __device__ void put(const At& at, const Own& own) {
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      w[k][at.slot] = own.w[k];
      if (at.slot > 0) w[kWords + k][at.slot - 1] = own.w[k];
    }
  }
  // Where the words are that begin `elements` away; kOdd where that is in the middle of a word.
  template <bool kOdd>
  __device__ static int place(const At& at, int elements) {
    const int words = (elements - kOdd) / Own::kPer, slots = words >> (kWords == 4 ? 2 : 1);
    int place = (words - slots * kWords) * At::kSlots + at.slot + slots;
    keep(place);
    return place;
  }
  template <bool kOdd>
  __device__ Own get(int place) const {
    const auto* from = &w[0][0] + place;
    Own out;
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const auto own = from[k * At::kSlots];
      out.w[k] = kOdd ? At::joined(own, from[(k + 1) * At::kSlots], 1) : own;
    }
    return out;
  }
};

template <class scalar, bool kOdd>
__global__ void __launch_bounds__(kThreads, 4)
    enhance_planar_kernel(Elements<scalar> y, Elements<const scalar> x, Shape shape, int margin) {
  using At = Slot<scalar>;
  using Own = typename At::Own;
  __shared__ Shown<scalar> shown[2];  // maxima along the rows, by turns
  const At at(shape, margin, margin);
  const int up = shown[0].template place<kOdd>(at, -shape.W), down = shown[0].template place<kOdd>(at, shape.W);
  const int T = static_cast<int>(shape.T);
  int turn = 0;
  for (int64_t n = blockIdx.y; n < shape.N; n += gridDim.y) {
    const scalar* from = x.at(n, 0, 0, at.first);
    scalar* to = y.at(n, 0, 0, at.first);
    int ahead = T;
    const auto load = [&] {
      const Own own = ahead-- > 0 ? at.load(from) : Own{};
      from += x.st;
      return own;
    };
    Own past = load(), here = load(), next = load();
    for (int t = 1; t < T; ++t, to += y.st) {
      const Own later = load(), before = at.before(here), after = at.after(here);
      Own maximum;
#pragma unroll
      for (int k = 0; k < Own::kWords; ++k) {
        const auto own = here.w[k];
        maximum.w[k] = larger<scalar>(larger<scalar>(select(at.left.w[k], before.w[k], own), own),
                                      select(at.right.w[k], after.w[k], own));
      }
      if (at.owner) shown[turn].put(at, maximum);
      __syncthreads();
      if (at.writes) {
        const Own above = shown[turn].template get<kOdd>(up);
        const Own below = shown[turn].template get<kOdd>(down);
        Own out;
#pragma unroll
        for (int k = 0; k < Own::kWords; ++k) {
          const auto own = maximum.w[k];
          const auto around = larger<scalar>(larger<scalar>(select(at.up.w[k], above.w[k], own), own),
                                             select(at.down.w[k], below.w[k], own));
          out.w[k] = difference<scalar>(around, past.w[k]);
        }
        out.store(to);
      }
      past = here, here = next, next = later, turn ^= 1;
    }
  }
}

template <class scalar, int V>
__device__ Words<scalar, V> masked(Words<scalar, V> own, const Words<scalar, V>& mask) {
#pragma unroll
  for (int k = 0; k < own.kWords; ++k) own.w[k] &= mask.w[k];
  return own;
}

// Which of three elements along a line wins their window: all bits where it is the first, or the last. The others are
// there only where `has_a` and `has_c` say so.
template <class scalar, int V>
struct Winner {
  using Own = Words<scalar, V>;
  Own first, last;

  Winner() = default;
  __device__ Winner(const Own& a, const Own& b, const Own& c, const Own& has_a, const Own& has_c) {
#pragma unroll
    for (int k = 0; k < Own::kWords; ++k) {
      const auto before = has_a.w[k], after = has_c.w[k];
      last.w[k] = after & won<scalar>(c.w[k], larger<scalar>(select(before, a.w[k], b.w[k]), b.w[k]));
      first.w[k] = before & ~(won<scalar>(b.w[k], a.w[k]) | last.w[k]);
    }
  }
  __device__ Own row(int d) const {
    if (d == 0) return first;
    if (d == 2) return last;
    Own middle;
#pragma unroll
    for (int k = 0; k < Own::kWords; ++k) middle.w[k] = ~(first.w[k] | last.w[k]);
    return middle;
  }
};

template <class scalar, int V>
__device__ acc_t<scalar> element(const Words<scalar, V>& own, int k) {
  const auto word = own.w[k / own.kPer];
  if constexpr (std::is_same_v<scalar, BFloat16>) {  // the upper half of a float is its bfloat16
    const uint32_t bits = k % own.kPer == 0 ? word << 16 : word & 0xffff0000;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  } else {
    scalar v[sizeof(word) / sizeof(scalar)];
    memcpy(v, &word, sizeof(word));
    return static_cast<acc_t<scalar>>(v[k % own.kPer]);
  }
}
// v where a mask has the bits of element k, else 0.
template <class scalar, int V>
__device__ acc_t<scalar> kept(acc_t<scalar> v, const Words<scalar, V>& mask, int k) {
  using word = typename Words<scalar, V>::word;
  const word bits = mask.w[k / mask.kPer];
  if constexpr (sizeof(scalar) == sizeof(word)) {
    word own;
    memcpy(&own, &v, sizeof(v));
    own &= bits;
    memcpy(&v, &own, sizeof(v));
    return v;
  } else {
    return (bits & word(1) << 8 * sizeof(scalar) * (k % mask.kPer)) != 0 ? v : acc_t<scalar>(0);
  }
}

// dx[t] = what the windows of R[t - 1] give to the elements that won them - dR[t].
template <class scalar, bool kOdd>
__global__ void __launch_bounds__(kThreads, 2)
    enhance_planar_backward_kernel(Elements<scalar> dx, Elements<const scalar> dy, Elements<const scalar> x,
                                   Shape shape, int margin) {
  using acc = acc_t<scalar>;
  using At = Slot<scalar>;
  using Own = typename At::Own;
  constexpr int V = At::V;
  __shared__ Shown<scalar> maxima, ups, downs;  // along the rows; what windows give to the rows above and below
  const At at(shape, margin, margin / 2);
  const int up = maxima.template place<kOdd>(at, -shape.W), down = maxima.template place<kOdd>(at, shape.W);
  const int T = static_cast<int>(shape.T);
  for (int64_t n = blockIdx.y; n < shape.N; n += gridDim.y) {
    const scalar *from = x.at(n, 1, 0, at.first), *from_dy = dy.at(n, 0, 0, at.first);
    scalar* to = dx.at(n, 0, 0, at.first);
    int ahead = T - 1;
    Own here{}, past{}, grad = at.load(from_dy), next = at.load(from);  // frame t of x, dR[t - 1], dR[t]; frame t + 1
    for (int t = 0; t < T; ++t, to += dx.st) {
      Own later{}, next_grad{};
      if (--ahead > 0) later = at.load(from += x.st), next_grad = at.load(from_dy += dy.st);
      acc total[V] = {};
      if (t > 0) {
        const Own before = at.before(here), after = at.after(here);
        const Winner<scalar, V> along(before, here, after, at.left, at.right);
        Own maximum;
#pragma unroll
        for (int k = 0; k < Own::kWords; ++k) {
          const auto own = here.w[k];
          maximum.w[k] = larger<scalar>(larger<scalar>(select(at.left.w[k], before.w[k], own), own),
                                        select(at.right.w[k], after.w[k], own));
        }
        if (at.owner) maxima.put(at, maximum);
        __syncthreads();
        Own stay{};
        if (at.near) {
          const Own above = maxima.template get<kOdd>(up), below = maxima.template get<kOdd>(down);
          const Winner<scalar, V> winner(above, maximum, below, at.up, at.down);
          stay = masked(past, winner.row(1));
          if (at.owner) {
            ups.put(at, masked(past, winner.first));
            downs.put(at, masked(past, winner.last));
          }
        }
        __syncthreads();
        acc sum[V] = {};
        if (at.slot >= margin - 1 && at.slot <= At::kSlots - margin) {
          const Own from_below = ups.template get<kOdd>(down), from_above = downs.template get<kOdd>(up);
#pragma unroll
          for (int k = 0; k < V; ++k) sum[k] = element(from_above, k) + element(stay, k) + element(from_below, k);
        }
        const Own stays = along.row(1);
        const auto give = [&](const Own& mask, int k) { return kept(sum[k], mask, k); };
        acc from_left = __shfl_up_sync(0xffffffffu, give(along.last, V - 1), 1);
        const acc from_right = __shfl_down_sync(0xffffffffu, give(along.first, 0), 1);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          total[k] = from_left + give(stays, k) + (k + 1 < V ? give(along.first, (k + 1) % V) : from_right);
          from_left = give(along.last, k);
        }
      }
      if (at.writes) {
        Pack<scalar, V> out;
#pragma unroll
        for (int k = 0; k < V; ++k) out.v[k] = static_cast<scalar>(total[k] - element(grad, k));
        out.store(to);
      }
      here = next, past = grad, grad = next_grad, next = later;
    }
  }
}

// The same for channels_last, or one element at a time: by strips of rows, as forward.
template <class scalar, int V>
__global__ void __launch_bounds__(kThreads, 2)
    enhance_backward_kernel(Elements<scalar> dx, Elements<const scalar> dy, Elements<const scalar> x, Tiles tiles) {
  using acc = acc_t<scalar>;
  using Own = Words<scalar, V>;
  using word = typename Own::word;
  struct alignas(sizeof(acc) * V) Sums {
    acc v[V];
  };
  // Of each row: what the windows of an element's column give it, and who of the row wins around it.
  __shared__ Sums sums[kRows][kThreads];
  __shared__ Winner<scalar, V> winners[kRows][kThreads];
  const Site<V> at(tiles);
  const int self = threadIdx.x;
  const int64_t T = tiles.shape.T, left = at.leftmost ? 0 : -x.sp, right = at.rightmost ? 0 : x.sp;
  const auto all = [](bool is) {
    Own mask;
#pragma unroll
    for (int k = 0; k < Own::kWords; ++k) mask.w[k] = is ? ~word(0) : word(0);
    return mask;
  };
  for (int64_t n = blockIdx.y; n < tiles.shape.N; n += gridDim.y) {
    Own grads[kRows + 2]{};  // from the row above on; dR[t - 1], then dR[t]
    for (int64_t t = 0; t < T; ++t) {
      if (at.inside && t > 0) {
        const scalar* from = at.start(x, n, t, -2);
        Own above{}, middle{}, below{};  // maxima along three rows
        Sums sum[kRows]{};
#pragma unroll
        for (int r = -2; r <= kRows + 1; from = at.next(x, from, r), ++r) {
          const Own before = Own::load(from + left), own = Own::load(from), after = Own::load(from + right);
          if (r >= 0 && r < kRows)
            winners[r][self] = Winner<scalar, V>(before, own, after, all(!at.leftmost), all(!at.rightmost));
          above = middle, middle = below;
#pragma unroll
          for (int k = 0; k < Own::kWords; ++k) {
            below.w[k] = larger<scalar>(larger<scalar>(before.w[k], own.w[k]), after.w[k]);
          }
          const int i = r - 1;  // the row of the windows
          if (i < -1) continue;
          if (at.has_row(i)) {
            const Winner<scalar, V> winner(above, middle, below, all(at.has_row(i - 1)), all(at.has_row(i + 1)));
#pragma unroll
            for (int d = 0; d < 3; ++d) {
              const int to = i - 1 + d;
              if (to < 0 || to >= kRows) continue;
              const Own given = masked(grads[i + 1], winner.row(d));
#pragma unroll
              for (int k = 0; k < V; ++k) sum[to].v[k] += element(given, k);
            }
          }
          if (i >= 1) sums[i - 1][self] = sum[i - 1];
        }
      }
      if (at.inside && t + 1 < T) {
        const scalar* from = at.start(dy, n, t, -1);
#pragma unroll
        for (int r = -1; r <= kRows; from = at.next(dy, from, r), ++r) grads[r + 1] = Own::load(from);
      } else {
#pragma unroll
        for (Own& grad : grads) grad = {};
      }
      __syncthreads();
      if (at.writes) {
        scalar* to = at.start(dx, n, t, 0);
#pragma unroll
        for (int r = 0; r < kRows; to += dx.row, ++r) {
          if (!at.has_row(r)) continue;
          acc total[V] = {};
          // What the windows of a thread's columns give place d of the rows around them.
          const auto add = [&](int thread, int d) {
            const Sums sum = sums[r][thread];
            const Own mask = winners[r][thread].row(d);
#pragma unroll
            for (int k = 0; k < V; ++k) total[k] += kept(sum.v[k], mask, k);
          };
          if (t > 0) {
            add(self, 1);
            if (!at.leftmost) add(self - at.step, 2);
            if (!at.rightmost) add(self + at.step, 0);
          }
          Pack<scalar, V> out;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            out.v[k] = static_cast<scalar>(total[k] - element(grads[r + 1], k));
          }
          out.store(to);
        }
      }
      __syncthreads();
    }
  }
}

// Element `id` of a frame, in the order in which its elements lie in memory.
struct Spot {
  int64_t c;
  int i, j;

  __device__ Spot(const Shape& shape, int64_t id) {
    const int64_t inner = shape.channels_last ? shape.C : shape.pixel(shape.H, 0), outer = quotient(id, inner);
    const int64_t p = shape.channels_last ? outer : id - outer * inner;
    c = shape.channels_last ? id - outer * inner : outer;
    i = static_cast<int>(quotient(p, shape.W));
    j = static_cast<int>(p - shape.pixel(i, 0));
  }
};

// The pixels around one, as far as there are some.
struct Window {
  int top, bottom, left, right;

  __device__ Window(const Shape& shape, int i, int j, int radius)
      : top(i > radius ? i - radius : 0), bottom(radius < shape.H - i ? i + radius : shape.H - 1),
        left(j > radius ? j - radius : 0), right(radius < shape.W - j ? j + radius : shape.W - 1) {}
};

// The pixel that wins a window.
template <class scalar>
__device__ int64_t winner_of(const Window& window, const scalar* plane, int64_t sp, const Shape& shape) {
  using acc = acc_t<scalar>;
  int64_t winner = shape.pixel(window.top, window.left);
  acc maximum = static_cast<acc>(plane[winner * sp]);
  for (int i = window.top; i <= window.bottom; ++i) {
    for (int j = window.left; j <= window.right; ++j) {
      const int64_t p = shape.pixel(i, j);
      const acc v = static_cast<acc>(plane[p * sp]);
      if (wins(v, maximum)) maximum = v, winner = p;
    }
  }
  return winner;
}

// y[t] = other[t + 1], at the elements that won the windows of R[t], - other[t].
template <class scalar>
__global__ void __launch_bounds__(kThreads, 4)
    gather_kernel(Elements<scalar> y, Elements<const scalar> other, Elements<const scalar> x, Shape shape, int radius) {
  using acc = acc_t<scalar>;
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (id >= shape.C * shape.pixel(shape.H, 0)) return;
  const Spot at(shape, id);
  const Window window(shape, at.i, at.j, radius);
  for (int64_t f = blockIdx.y; f < shape.N * (shape.T - 1); f += gridDim.y) {
    const int64_t n = quotient(f, shape.T - 1), t = f - n * (shape.T - 1);
    const int64_t winner = winner_of(window, x.at(n, t + 1, at.c, 0), x.sp, shape);
    const int64_t p = shape.pixel(at.i, at.j);
    const acc maximum = static_cast<acc>(*other.at(n, t + 1, at.c, winner));
    *y.at(n, t, at.c, p) = static_cast<scalar>(maximum - static_cast<acc>(*other.at(n, t, at.c, p)));
  }
}

// Whether the element at (i, j) wins a window: none before it is as large, none after it is larger.
template <class scalar>
__device__ bool is_winner(int i, int j, const Window& window, const scalar* plane, int64_t sp, const Shape& shape) {
  using acc = acc_t<scalar>;
  const acc e = static_cast<acc>(plane[shape.pixel(i, j) * sp]);
#pragma unroll 1
  for (int h = window.top; h <= window.bottom; ++h) {
#pragma unroll 1
    for (int w = window.left; w <= window.right; ++w) {
      const acc v = static_cast<acc>(plane[shape.pixel(h, w) * sp]);
      const bool before = h < i || (h == i && w < j), itself = h == i && w == j;
      if (before ? !wins(e, v) : !itself && wins(v, e)) return false;
    }
  }
  return true;
}

// The backward for any size: an element asks of each window around it whether it won there, which mostly some of the
// first few elements deny.
template <class scalar>
__global__ void __launch_bounds__(kThreads, 4)
    gather_windows_kernel(Elements<scalar> dx, Elements<const scalar> dy, Elements<const scalar> x, Shape shape,
                          int radius) {
  using acc = acc_t<scalar>;
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (id >= shape.C * shape.pixel(shape.H, 0)) return;
  const Spot at(shape, id);
  const Window around(shape, at.i, at.j, radius);
  const int64_t p = shape.pixel(at.i, at.j);
  for (int64_t f = blockIdx.y; f < shape.N * shape.T; f += gridDim.y) {
    const int64_t n = quotient(f, shape.T), t = f - n * shape.T;
    acc sum = 0;
    if (t > 0) {
      const scalar* plane = x.at(n, t, at.c, 0);
      for (int i = around.top; i <= around.bottom; ++i) {
        for (int j = around.left; j <= around.right; ++j) {
          if (is_winner(at.i, at.j, Window(shape, i, j, radius), plane, x.sp, shape))
            sum += static_cast<acc>(*dy.at(n, t - 1, at.c, shape.pixel(i, j)));
        }
      }
    }
    if (t + 1 < shape.T) sum -= static_cast<acc>(*dy.at(n, t, at.c, p));
    *dx.at(n, t, at.c, p) = static_cast<scalar>(sum);
  }
}

// Calls f with how many elements a thread has: channels of a pixel, or where not all pixels of the tensors are whole
// packs, and where planar, one.
template <class scalar, int V, class F, class... Clips>
void by_pack(const F& f, const Clip& x, const Clips&... others) {
  x.channels_last && (whole_packs(x, V, x.C) && ... && whole_packs(others, V, x.C))
      ? f(std::integral_constant<int, V>())
      : f(std::integral_constant<int, 1>());
}

// Slots on either side of a block that are read for `rows` rows of neighbours; 0 where the planar kernels, with their
// whole packs, are not for these tensors.
template <class scalar, class... Clips>
int planar_margin(int rows, const Clip& x, const Clips&... others) {
  const Frame frame(x, others...);
  if (frame.channels_last || frame.runs > 1 || frame.width(x, others...) == 1) return 0;
  const int64_t margin = rows * blocks_for(x.W, Slot<scalar>::V) + rows - 1;
  return margin <= Slot<scalar>::kSlots / 3 ? static_cast<int>(margin) : 0;
}
template <class scalar>
int64_t planar_blocks(const Clip& x, int margin) {
  return blocks_for(x.C * x.P / Slot<scalar>::V, Slot<scalar>::kSlots - 2 * margin);
}
// Calls f with whether rows may begin in the middle of a word.
template <class scalar, class F>
void by_parity(int64_t W, const F& f) {
  if constexpr (sizeof(scalar) == 2) {
    if (W % 2 != 0) return f(std::true_type());
  }
  f(std::false_type());
}

template <class scalar>
void gather(const DeviceGuard& guard, const Clip& y, const Clip& other, const Clip& x, int64_t radius) {
  launch(guard, gather_kernel<scalar>, {blocks_for(x.C * x.P), x.N * (x.T - 1)}, Elements<scalar>(y),
         Elements<const scalar>(other), Elements<const scalar>(x), Shape(x), radius);
}

Tensor motion_enhance(const Tensor& x_, Segments n_segment, int64_t kernel_size) {
  const DeviceGuard guard(x_);
  const Clip x = clips(x_, n_segment);
  const int64_t radius = radius_of(x, kernel_size);
  const Clip y = empty_clips(x, x.T - 1, x.C, x.H, x.W);
  if (y.empty()) return y.tensor;
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    if (radius != 1) return gather<scalar>(guard, y, x, x, radius);
    const Elements<scalar> to(y);
    const Elements<const scalar> from(x);
    if (const int margin = planar_margin<scalar>(1, x, y))
      return by_parity<scalar>(x.W, [&](auto odd) {
        launch(guard, enhance_planar_kernel<scalar, odd>, {planar_blocks<scalar>(x, margin), x.N}, to, from, Shape(x),
               margin);
      });
    by_pack<scalar, kWidestBytes / sizeof(scalar)>([&](auto V) {
      const Tiles tiles(x, V, false);
      launch(guard, enhance_kernel<scalar, V>, {tiles.count(), x.N}, to, from, tiles);
    }, x, y);
  });
  return y.tensor;
}

Tensor motion_enhance_backward(const Tensor& grad, const Tensor& x_, Segments n_segment, int64_t kernel_size) {
  const DeviceGuard guard(x_);
  const Clip x = clips(x_, n_segment);
  const int64_t radius = radius_of(x, kernel_size);
  const Clip dy = gradient_of(x, grad);
  const Clip dx = empty_like(x);
  if (dx.empty()) return dx.tensor;
  by_dtype(x.dtype, [&](auto* type) {
    using scalar = std::remove_pointer_t<decltype(type)>;
    const Elements<scalar> to(dx);
    const Elements<const scalar> from_dy(dy), from_x(x);
    if (radius != 1)
      return launch(guard, gather_windows_kernel<scalar>, {blocks_for(x.C * x.P), x.N * x.T}, to, from_dy, from_x,
                    Shape(x), radius);
    if (const int margin = planar_margin<scalar>(2, x, dx, dy))
      return by_parity<scalar>(x.W, [&](auto odd) {
        launch(guard, enhance_planar_backward_kernel<scalar, odd>, {planar_blocks<scalar>(x, margin), x.N}, to, from_dy,
               from_x, Shape(x), margin);
      });
    // Half of what one load may have, for the registers' sake.
    by_pack<scalar, kWidestBytes / 2 / sizeof(scalar)>([&](auto V) {
      const Tiles tiles(x, V, true);
      launch(guard, enhance_backward_kernel<scalar, V>, {tiles.count(), x.N}, to, from_dy, from_x, tiles);
    }, x, dx, dy);
  });
  return dx.tensor;
}

Tensor motion_enhance_gather(const Tensor& other_, const Tensor& x_, Segments n_segment, int64_t kernel_size) {
  const DeviceGuard guard(x_);
  const Clip x = clips(x_, n_segment);
  const int64_t radius = radius_of(x, kernel_size);
  const Clip other = clips_like(other_, x, "other");
  const Clip y = empty_clips(x, x.T - 1, x.C, x.H, x.W);
  if (y.empty()) return y.tensor;
  by_dtype(x.dtype, [&](auto* type) { gather<std::remove_pointer_t<decltype(type)>>(guard, y, other, x, radius); });
  return y.tensor;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tempops, CUDA, m) {
  m.impl("motion_enhance", TORCH_BOX(&motion_enhance));
  m.impl("motion_enhance_backward", TORCH_BOX(&motion_enhance_backward));
  m.impl("motion_enhance_gather", TORCH_BOX(&motion_enhance_gather));
}

}  // namespace tempops
