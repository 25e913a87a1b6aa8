// SPDX-License-Identifier: Apache-2.0
//
// Rows of four-bit codes with a scale, and maybe a zero point, per group of channels
// (vllm_rsparse/formats/int4.py).
//
// Over a group, s (sum of x (q - 8) - (z - 8) sum of x) takes two operations for each
// weight less than the sum of x (q - z) s. Around 8, because the sums of x q are mostly 8
// times the sum of x, which they would lose digits to: where the mean of x is its deviation,
// 11 to 24 times the error. The sums keep low and high nibbles apart, the order in which they
// come out of the bytes, and are put together with the scales.

#pragma once

#include "rows_fp8.h"

namespace rsparse {

// sums [2, stride] for each token, of low and of high nibbles less 8, += R rows' times x.
template <int R, int M>
inline void add_nibbles_strip(const uint8_t *const *rows, const float *values,
                              int64_t tokens, int64_t byte, int64_t width,
                              float *__restrict low, float *__restrict high,
                              int64_t token_stride) {
  for (int64_t c = 0; c < width; ++c) {
    float lows[M], highs[M];
    for (int m = 0; m < M; ++m) lows[m] = low[m * token_stride + c];
    for (int m = 0; m < M; ++m) highs[m] = high[m * token_stride + c];
    for (int r = 0; r < R; ++r) {
      const int32_t pair = rows[r][byte + c];
      const float first = float((pair & 15) - 8), second = float((pair >> 4) - 8);
      for (int m = 0; m < M; ++m) lows[m] += values[r * tokens + m] * first;
      for (int m = 0; m < M; ++m) highs[m] += values[r * tokens + m] * second;
    }
    for (int m = 0; m < M; ++m) low[m * token_stride + c] = lows[m];
    for (int m = 0; m < M; ++m) high[m * token_stride + c] = highs[m];
  }
}

template <int R, int M>
[[gnu::noinline]] void add_nibbles(const uint8_t *const *rows, const uint8_t *const *next,
                                   const float *values, int64_t tokens, int64_t begin,
                                   int64_t bytes, float *__restrict sums) {
  int64_t done = 0;
  for (; done + LINE <= bytes; done += LINE) {
    for (int r = 0; next && r < R; ++r) __builtin_prefetch(next[r] + begin + done);
    add_nibbles_strip<R, M>(rows, values, tokens, begin + done, LINE, sums + done,
                            sums + bytes + done, 2 * bytes);
  }
  add_nibbles_strip<R, M>(rows, values, tokens, begin + done, bytes - done, sums + done,
                          sums + bytes + done, 2 * bytes);
}

template <typename Scale> struct Int4Weight {
  const uint8_t *data;
  const Scale *scales;
  const uint8_t *zeros;
  int64_t group;
  float step = 1.0f;  // of the codes, in scales

  explicit Int4Weight(const Stored &stored)
      : data(static_cast<const uint8_t *>(stored.data)),
        scales(static_cast<const Scale *>(stored.scales)),
        zeros(static_cast<const uint8_t *>(stored.zeros)),
        group(stored.group) {}

  static int64_t row_bytes(int64_t n) { return n / 2; }

  void add(const Problem &p, const Kept &kept, int64_t begin, int64_t end,
           float *sums) const {
    static thread_local std::vector<const uint8_t *> starts;
    static thread_local std::vector<float> own_codes;
    const int64_t bytes = (end - begin) / 2;
    grow(starts, kept.count);
    grow(own_codes, p.tokens * 2 * bytes);
    float *codes = own_codes.data();
    for (int64_t i = 0; i < kept.count; ++i)
      starts[i] = data + kept.channels[i] * (p.n / 2);
    for (int64_t row = 0; row < kept.count;) {
      const int64_t index = kept.channels[row] / group;
      int64_t stop = row + 1;
      while (stop < kept.count && kept.channels[stop] < (index + 1) * group) ++stop;
      std::fill_n(codes, p.tokens * 2 * bytes, 0.0f);
      add_group(p, starts.data(), kept, row, stop, begin / 2, bytes, codes);
      for (int64_t m = 0; m < p.tokens; ++m) {
        float total = 0.0f;
        for (int64_t i = row; i < stop; ++i) total += kept.values[i * p.tokens + m];
        scale(p.n, index, begin, bytes, total, codes + m * 2 * bytes, sums + m * p.n);
      }
      row = stop;
    }
  }

 private:
  // codes [tokens, 2, bytes] += rows [row, stop) of the kept ones.
  static void add_group(const Problem &p, const uint8_t *const *starts, const Kept &kept,
                        int64_t row, int64_t stop, int64_t begin, int64_t bytes,
                        float *codes) {
    for (; row + ROWS <= stop; row += ROWS)
      add_some<ROWS>(p, starts, kept, row, begin, bytes, codes);
    if (row + 4 <= stop) {
      add_some<4>(p, starts, kept, row, begin, bytes, codes);
      row += 4;
    }
    if (row + 2 <= stop) {
      add_some<2>(p, starts, kept, row, begin, bytes, codes);
      row += 2;
    }
    if (row < stop) add_some<1>(p, starts, kept, row, begin, bytes, codes);
  }

  template <int R>
  static void add_some(const Problem &p, const uint8_t *const *starts, const Kept &kept,
                       int64_t row, int64_t begin, int64_t bytes, float *codes) {
    const bool more = row + R + ROWS <= kept.count;
    for (int64_t m = 0; m < p.tokens; m += TOKENS) {
      // Later tokens find the rows in the cache; only the first ones fetch ahead.
      const uint8_t *const *next = m == 0 && more ? starts + row + R : nullptr;
      const float *values = kept.values.data() + row * p.tokens + m;
      float *mine = codes + m * 2 * bytes;
      if (p.tokens - m >= TOKENS)
        add_nibbles<R, TOKENS>(starts + row, next, values, p.tokens, begin, bytes, mine);
      else
        add_nibbles<R, 1>(starts + row, next, values, p.tokens, begin, bytes, mine);
    }
  }

  // sums of columns [begin, begin + 2 bytes) += scales x (codes - (zeros - 8) x total).
  void scale(int64_t n, int64_t index, int64_t begin, int64_t bytes, float total,
             const float *__restrict codes, float *__restrict sums) const {
    const Scale *factors = scales + index * n + begin;
    const uint8_t *pairs = zeros ? zeros + (index * n + begin) / 2 : nullptr;
    sums += begin;
    for (int64_t c = 0; c < bytes; ++c) {
      const int32_t pair = pairs ? pairs[c] : 0x88;
      const float low = codes[c] - float((pair & 15) - 8) * total;
      const float high = codes[bytes + c] - float((pair >> 4) - 8) * total;
      sums[2 * c] += to_float(factors[2 * c]) * step * low;
      sums[2 * c + 1] += to_float(factors[2 * c + 1]) * step * high;
    }
  }
};

// Two such weights over the same scales, each with channels of its own: the second holds
// sixteenths of the first one's step (vllm_rsparse/formats/int8_planes.py).
template <typename Scale> struct PlanesWeight {
  Int4Weight<Scale> first, second;

  PlanesWeight(const Problem &p, const Stored &stored) : first(stored), second(stored) {
    second.data += p.k * (p.n / 2);
    second.zeros = nullptr;
    second.step = 1.0f / 16;
  }

  static int64_t row_bytes(int64_t n) { return Int4Weight<Scale>::row_bytes(n); }
};

// sums of columns [begin, end) += the rows of a plane that are kept, times x.
template <typename Weight>
void add_plane(const Weight &weight, int64_t, const Problem &p, const Kept &kept,
               int64_t begin, int64_t end, float *sums) {
  weight.add(p, kept, begin, end, sums);
}

template <typename Scale>
void add_plane(const PlanesWeight<Scale> &weight, int64_t plane, const Problem &p,
               const Kept &kept, int64_t begin, int64_t end, float *sums) {
  (plane ? weight.second : weight.first).add(p, kept, begin, end, sums);
}

}  // namespace rsparse
