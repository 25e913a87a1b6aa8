// SPDX-License-Identifier: Apache-2.0
//
// Sparse-plus-low-rank linear layer on CPUs; what it computes: vllm_rsparse/reference.py,
// how fast and why so: docs/cpu.md. Compiled on the machine that runs it, for its
// instruction set (vllm_rsparse/cpu_build.py); called by vllm_rsparse/cpu.py. It includes
// nothing of torch: two seconds to compile, and a new torch needs no new build.
//
// Decoding is bound by memory, so the code is about reading weights. W is stored [K, N]:
// an input channel is one contiguous row. Two steps in one parallel region:
//
//   select   Blocks of channels are shared out over the threads. A block lists the
//            channels that any token keeps, shard by shard, with each token's x (0 where
//            that token drops the channel), and sums x V over the dropped ones.
//   stream   Columns are shared out over the threads in proportion to the rows that
//            their shard keeps. The rows of W, and then those of U with z = V x as
//            coefficients, are added to float32 sums, ROWS at a time, while the segments
//            of the next ROWS are prefetched.
//
// Results are the same bits for any number of threads and tokens in the call: each sum
// runs over channels in ascending order, in blocks of a fixed size, and a channel that a
// token drops adds an exact zero.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Rows added in one pass over the sums. 4 reads a fifth slower on AMD Zen 4 (2 threads):
// the more rows are open, the more cache lines are on their way from memory.
constexpr int ROWS = 8;
// Tokens whose sums one pass updates: ROWS x TOKENS coefficients live in registers.
constexpr int TOKENS = 4;
// Channels of a block of the first step: fixed, since it sets the order of summation.
constexpr int64_t BLOCK = 256;
// Bytes of weight below which waking other threads costs more than they save.
constexpr int64_t MIN_BYTES_PER_THREAD = 64 << 10;
constexpr int64_t LINE = 64;

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }

inline float to_float(Bfloat16 value) { return from_bits(uint32_t(value.bits) << 16); }

// In integers, because compilers vectorise this everywhere and _Float16 nowhere alike.
inline float to_float(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  const uint32_t rebias = magnitude >= 0x7c00 ? 224u << 23 : 112u << 23;  // inf, NaN
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t subnormal = bits_of(float(int32_t(magnitude)) * 0x1p-24f);
  return from_bits(sign | (magnitude < 0x0400 ? subnormal : normal));
}

// Rounding to nearest, ties to even; a NaN stays one.
inline void store(float *out, float value) { *out = value; }

inline void store(Bfloat16 *out, float value) {
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out->bits = nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store(Half *out, float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x47800000) {  // 65536 and above
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // the ulp of 0.5f is half's smallest number
    half = bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {  // a carry out of the mantissa ends in the exponent, where it belongs
    half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = uint16_t(half | (bits >> 16 & 0x8000));
}

struct Problem {
  int64_t tokens, n, k, x_stride, shards, rank_sum;
  const int64_t *sizes, *ranks;
};

// What the first step leaves for the second, per block and shard.
struct Selection {
  int64_t blocks, shards, tokens, rank_sum;
  std::vector<int32_t> counts;    // [blocks, shards]
  std::vector<int32_t> channels;  // [shards, blocks * BLOCK], each block from its start
  std::vector<float> values;      // [shards, blocks * BLOCK, tokens]
  std::vector<float> partial_z;   // [blocks, tokens, rank_sum]

  // Sizes only grow, so that a warm engine allocates nothing.
  void resize(const Problem &p) {
    blocks = (p.k + BLOCK - 1) / BLOCK;
    shards = p.shards, tokens = p.tokens, rank_sum = p.rank_sum;
    grow(counts, blocks * shards);
    grow(channels, shards * blocks * BLOCK);
    grow(values, shards * blocks * BLOCK * tokens);
    grow(partial_z, blocks * tokens * rank_sum);
  }

  int64_t slot(int64_t shard, int64_t block) const {
    return (shard * blocks + block) * BLOCK;
  }

  int64_t kept(int64_t shard) const {
    int64_t sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += counts[block * shards + shard];
    return sum;
  }

  template <typename V> static void grow(V &vector, int64_t size) {
    if (int64_t(vector.size()) < size) vector.resize(size);
  }
};

template <typename T>
void select_block(const Problem &p, const T *x, const float *thresholds, const T *v,
                  int64_t block, Selection &out) {
  const int64_t begin = block * BLOCK, end = std::min(p.k, begin + BLOCK);
  float *z = out.partial_z.data() + block * p.tokens * p.rank_sum;
  std::fill_n(z, p.tokens * p.rank_sum, 0.0f);
  int64_t rank_start = 0;
  for (int64_t shard = 0; shard < p.shards; ++shard) {
    const float *threshold = thresholds + shard * p.k;
    const int64_t rank = p.ranks[shard];
    int32_t *channels = out.channels.data() + out.slot(shard, block);
    float *values = out.values.data() + out.slot(shard, block) * p.tokens;
    int32_t count = 0;
    for (int64_t j = begin; j < end; ++j) {
      // Written always, counted if kept: a branch would be mispredicted half the time.
      channels[count] = int32_t(j);
      bool any = false;
      for (int64_t m = 0; m < p.tokens; ++m) {
        const float value = to_float(x[m * p.x_stride + j]);
        const bool keep = !(std::fabs(value) <= threshold[j]);  // a NaN is kept
        values[count * p.tokens + m] = keep ? value : 0.0f;
        any |= keep;
      }
      count += any;
    }
    out.counts[block * p.shards + shard] = count;
    for (int64_t j = begin; rank > 0 && j < end; ++j) {
      for (int64_t m = 0; m < p.tokens; ++m) {
        const float value = to_float(x[m * p.x_stride + j]);
        if (!(std::fabs(value) <= threshold[j])) continue;
        const T *row = v + j * p.rank_sum + rank_start;
        float *sums = z + m * p.rank_sum + rank_start;
        for (int64_t r = 0; r < rank; ++r) sums[r] += value * to_float(row[r]);
      }
    }
    rank_start += rank;
  }
}

// The rows that a thread adds up for one shard.
template <typename T> struct Rows {
  std::vector<const T *> starts;  // [count], each a row of N columns of W or U
  std::vector<float> values;      // [count, tokens]
  int64_t count;

  void gather(const Problem &p, const Selection &selection, int64_t shard,
              const T *weight, const T *u) {
    const int64_t rank = p.ranks[shard];
    const int64_t most = selection.kept(shard) + rank;
    Selection::grow(starts, most);
    Selection::grow(values, most * p.tokens);
    count = 0;
    for (int64_t block = 0; block < selection.blocks; ++block) {
      const int32_t *channels = selection.channels.data() + selection.slot(shard, block);
      const int32_t kept = selection.counts[block * p.shards + shard];
      for (int32_t i = 0; i < kept; ++i) starts[count + i] = weight + channels[i] * p.n;
      std::copy_n(selection.values.data() + selection.slot(shard, block) * p.tokens,
                  kept * p.tokens, values.data() + count * p.tokens);
      count += kept;
    }
    int64_t rank_start = 0;
    for (int64_t s = 0; s < shard; ++s) rank_start += p.ranks[s];
    for (int64_t r = 0; r < rank; ++r, ++count) {
      starts[count] = u + r * p.n;
      for (int64_t m = 0; m < p.tokens; ++m) {
        float z = 0.0f;
        for (int64_t block = 0; block < selection.blocks; ++block)
          z += selection.partial_z[(block * p.tokens + m) * p.rank_sum + rank_start + r];
        values[count * p.tokens + m] = z;
      }
    }
  }
};

// sums[m][0..width) += sum over R rows of values[row][m] * row. The loop over columns is
// the one that compilers vectorise; its length is a constant but for the last strip.
template <typename T, int R, int M>
inline void add_strip(const T *const *rows, const float *values, int64_t tokens,
                      int64_t column, int64_t width, float *__restrict sums,
                      int64_t stride) {
  for (int64_t c = 0; c < width; ++c) {
    float total[M];
    for (int m = 0; m < M; ++m) total[m] = sums[m * stride + c];
    for (int r = 0; r < R; ++r) {
      const float weight = to_float(rows[r][column + c]);
      for (int m = 0; m < M; ++m) total[m] += values[r * tokens + m] * weight;
    }
    for (int m = 0; m < M; ++m) sums[m * stride + c] = total[m];
  }
}

template <typename T, int R, int M>
void add_rows(const T *const *rows, const T *const *next, const float *values,
              int64_t tokens, int64_t begin, int64_t end, float *sums, int64_t stride) {
  constexpr int64_t STRIP = LINE / sizeof(T);
  int64_t column = begin;
  for (; column + STRIP <= end; column += STRIP, sums += STRIP) {
    for (int r = 0; next && r < R; ++r) __builtin_prefetch(next[r] + column);
    add_strip<T, R, M>(rows, values, tokens, column, STRIP, sums, stride);
  }
  add_strip<T, R, M>(rows, values, tokens, column, end - column, sums, stride);
}

template <typename T, int R>
void add_rows(const T *const *rows, const T *const *next, const float *values,
              int64_t tokens, int64_t begin, int64_t end, float *sums, int64_t stride) {
  for (int64_t m = 0; m < tokens; m += TOKENS) {
    // Later tokens find the rows in the cache; only the first ones fetch ahead.
    const T *const *ahead = m == 0 ? next : nullptr;
    float *mine = sums + m * stride;
    switch (std::min<int64_t>(TOKENS, tokens - m)) {
#define CASE(M)                                                                    \
  case M:                                                                          \
    add_rows<T, R, M>(rows, ahead, values + m, tokens, begin, end, mine, stride);  \
    break;
      CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
    }
  }
}

template <typename T>
void stream(const Problem &p, const Rows<T> &rows, int64_t begin, int64_t end,
            const float *correction, const T *bias, T *out, std::vector<float> &scratch) {
  const int64_t width = end - begin;
  Selection::grow(scratch, p.tokens * width);
  float *sums = scratch.data();
  std::fill_n(sums, p.tokens * width, 0.0f);
  const T *const *starts = rows.starts.data();
  const float *values = rows.values.data();
  int64_t row = 0;
  for (; row + ROWS <= rows.count; row += ROWS) {
    const bool more = row + 2 * ROWS <= rows.count;
    add_rows<T, ROWS>(starts + row, more ? starts + row + ROWS : nullptr,
                      values + row * p.tokens, p.tokens, begin, end, sums, width);
  }
  for (; row < rows.count; ++row)
    add_rows<T, 1>(starts + row, static_cast<const T *const *>(nullptr),
                   values + row * p.tokens, p.tokens, begin, end, sums, width);
  for (int64_t m = 0; m < p.tokens; ++m) {
    for (int64_t c = 0; c < width; ++c) {
      float value = sums[m * width + c];
      if (correction) value += correction[begin + c];
      if (bias) value += to_float(bias[begin + c]);
      store(out + m * p.n + begin + c, value);
    }
  }
}

// First column of a thread: columns are weighed by the rows of their shard, and cuts fall
// on multiples of a cache line so that no two threads read the same one.
int64_t first_column(const Problem &p, const Selection &selection, int thread,
                     int threads) {
  // One row more, for the sums: a shard that keeps nothing is written all the same.
  const auto cost = [&](int64_t shard) {
    return selection.kept(shard) + p.ranks[shard] + 1;
  };
  if (thread == threads) return p.n;
  int64_t total = 0;
  for (int64_t s = 0; s < p.shards; ++s) total += cost(s) * p.sizes[s];
  int64_t wanted = total / threads * thread, column = 0;
  for (int64_t s = 0; s < p.shards; ++s) {
    if (wanted < cost(s) * p.sizes[s]) {
      column += wanted / cost(s);
      return column / LINE * LINE;
    }
    wanted -= cost(s) * p.sizes[s];
    column += p.sizes[s];
  }
  return p.n;
}

template <typename T>
void rsparse_linear(const Problem &p, const T *x, const T *weight,
                    const float *thresholds, const T *u, const T *v,
                    const float *correction, const T *bias, T *out) {
  // Kept between calls. The team's threads are, too, so theirs serve every call.
  static thread_local Selection shared;
  Selection &selection = shared;
  selection.resize(p);
  const int64_t bytes = p.n * p.k * int64_t(sizeof(T));
  const int64_t useful = std::max<int64_t>(1, bytes / MIN_BYTES_PER_THREAD);
#pragma omp parallel if (useful > 1)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < selection.blocks; ++block)
      select_block(p, x, thresholds, v, block, selection);
    static thread_local Rows<T> rows;
    static thread_local std::vector<float> scratch;
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t begin = first_column(p, selection, thread, threads);
    const int64_t end = first_column(p, selection, thread + 1, threads);
    int64_t start = 0;
    for (int64_t shard = 0; shard < p.shards; start += p.sizes[shard++]) {
      const int64_t from = std::max(begin, start);
      const int64_t to = std::min(end, start + p.sizes[shard]);
      if (from >= to) continue;
      rows.gather(p, selection, shard, weight, u);
      stream(p, rows, from, to, correction, bias, out, scratch);
    }
  }
}

}  // namespace

// Element types by number: 0 float32, 1 bfloat16, 2 float16. Layouts, row-major:
//   x [tokens, K] with rows x_stride apart, weight [K, N], thresholds float32 [S, K],
//   u [max rank, N], v [K, sum of ranks], correction float32 [N] or null, bias [N] or
//   null, out [tokens, N]; sizes and ranks [S]. Pointers need no alignment beyond their
//   element's. Returns 0, or 1 for an unknown element type.
extern "C" int vllm_rsparse_linear(int element, int64_t tokens, int64_t n, int64_t k,
                                   int64_t x_stride, int64_t shards,
                                   const int64_t *sizes, const int64_t *ranks,
                                   const void *x, const void *weight,
                                   const float *thresholds, const void *u,
                                   const void *v, const float *correction,
                                   const void *bias, void *out) {
  Problem p{tokens, n, k, x_stride, shards, 0, sizes, ranks};
  for (int64_t s = 0; s < shards; ++s) p.rank_sum += ranks[s];
#define CASE(number, T)                                                              \
  case number:                                                                       \
    rsparse_linear(p, static_cast<const T *>(x), static_cast<const T *>(weight),     \
                   thresholds, static_cast<const T *>(u), static_cast<const T *>(v), \
                   correction, static_cast<const T *>(bias), static_cast<T *>(out)); \
    return 0;
  switch (element) {
    CASE(0, float)
    CASE(1, Bfloat16)
    CASE(2, Half)
    default:
      return 1;
  }
#undef CASE
}
