// SPDX-License-Identifier: Apache-2.0
//
// Second step of the sparse linear layer on CPUs: adding rows of floats, of W or of U, to
// sums. Rows of other formats: rows_fp8.h, rows_int4.h.

#pragma once

#include "selection.h"

namespace rsparse {

// Rows added in one pass over the sums. 4 reads a fifth slower on AMD Zen 4 (2 threads):
// the more rows are open, the more cache lines are on their way from memory.
constexpr int ROWS = 8;
// Tokens whose sums one pass updates: ROWS x TOKENS coefficients live in registers. GCC
// 12 does not vectorise the pass over 8 rows for 4 tokens: 3.4 times as slow.
constexpr int TOKENS = 2;

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

// Not inlined: it then has the registers, and the promise about `sums`, to itself.
template <typename T, int R, int M>
[[gnu::noinline]] void add_rows(const T *const *rows, const T *const *next,
                                const float *values, int64_t tokens, int64_t begin,
                                int64_t end, float *__restrict sums, int64_t stride) {
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
      CASE(1) CASE(2)
#undef CASE
    }
  }
}

// sums [tokens, stride] of columns [begin, end), the first at `sums`, += the rows' sum.
template <typename T>
void add_all(const T *const *starts, const float *values, int64_t count, int64_t tokens,
             int64_t begin, int64_t end, float *sums, int64_t stride) {
  int64_t row = 0;
  for (; row + ROWS <= count; row += ROWS) {
    const bool more = row + 2 * ROWS <= count;
    add_rows<T, ROWS>(starts + row, more ? starts + row + ROWS : nullptr,
                      values + row * tokens, tokens, begin, end, sums, stride);
  }
  for (; row < count; ++row)
    add_rows<T, 1>(starts + row, static_cast<const T *const *>(nullptr),
                   values + row * tokens, tokens, begin, end, sums, stride);
}

// A weight in the format float: [K, N].
template <typename T> struct FloatWeight {
  const T *data;

  static int64_t row_bytes(int64_t n) { return n * int64_t(sizeof(T)); }

  // sums [tokens, N] of columns [begin, end) += the kept channels' rows times x.
  void add(const Problem &p, const Kept &kept, int64_t begin, int64_t end,
           float *sums) const {
    static thread_local std::vector<const T *> starts;
    grow(starts, kept.count);
    for (int64_t i = 0; i < kept.count; ++i) starts[i] = data + kept.channels[i] * p.n;
    add_all(starts.data(), kept.values.data(), kept.count, p.tokens, begin, end,
            sums + begin, p.n);
  }
};

// The same for the factors of one shard: rows of U with z = V x as coefficients.
template <typename T>
void add_factors(const Problem &p, const Selection &selection, int64_t shard, const T *u,
                 int64_t begin, int64_t end, float *sums) {
  static thread_local std::vector<const T *> starts;
  static thread_local std::vector<float> values;
  const int64_t rank = p.ranks[shard];
  grow(starts, rank);
  grow(values, rank * p.tokens);
  int64_t rank_start = 0;
  for (int64_t s = 0; s < shard; ++s) rank_start += p.ranks[s];
  for (int64_t r = 0; r < rank; ++r) {
    starts[r] = u + r * p.n;
    for (int64_t m = 0; m < p.tokens; ++m) {
      float z = 0.0f;
      for (int64_t block = 0; block < selection.blocks; ++block)
        z += selection.partial_z[(block * p.tokens + m) * p.rank_sum + rank_start + r];
      values[r * p.tokens + m] = z;
    }
  }
  add_all(starts.data(), values.data(), rank, p.tokens, begin, end, sums + begin, p.n);
}

}  // namespace rsparse
