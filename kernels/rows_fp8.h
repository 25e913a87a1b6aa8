// SPDX-License-Identifier: Apache-2.0
//
// Rows of float8_e4m3fn (vllm_rsparse/formats/fp8.py and fp8_block.py).

#pragma once

#include "rows_float.h"

namespace rsparse {

// A weight and its scales, whatever the format.
struct Stored {
  int format, scale_element;
  int64_t group;
  const void *data, *scales, *zeros;
};

// e4m3: 4 bits of exponent with a bias of 7, 3 of mantissa. Weights hold no NaN.
struct Float8 {
  uint8_t bits;
};

// The bits in a float's places stand for 2^-120 times the value, subnormal ones too. They
// are then subnormal floats as well: not for a thread that takes these for zero.
inline float to_float(Float8 value) {
  const uint32_t wide = uint32_t(int32_t(int8_t(value.bits))) << 20;
  return from_bits(wide & 0x87f00000) * 0x1p120f;
}

// A scale per output channel: it leaves the sum over input channels.
struct Fp8Weight {
  const Float8 *data;
  const float *scales;

  explicit Fp8Weight(const Stored &stored)
      : data(static_cast<const Float8 *>(stored.data)),
        scales(static_cast<const float *>(stored.scales)) {}

  static int64_t row_bytes(int64_t n) { return n; }

  void add(const Problem &p, const Kept &kept, int64_t begin, int64_t end,
           float *sums) const {
    FloatWeight<Float8>{data}.add(p, kept, begin, end, sums);
    for (int64_t m = 0; m < p.tokens; ++m) {
      float *__restrict own = sums + m * p.n;
      for (int64_t c = begin; c < end; ++c) own[c] *= scales[c];
    }
  }
};

// A scale per block: it multiplies x, once for the columns of a block.
struct Fp8BlockWeight {
  static constexpr int64_t SIDE = 128;
  const Float8 *data;
  const float *scales;

  explicit Fp8BlockWeight(const Stored &stored)
      : data(static_cast<const Float8 *>(stored.data)),
        scales(static_cast<const float *>(stored.scales)) {}

  static int64_t row_bytes(int64_t n) { return n; }

  void add(const Problem &p, const Kept &kept, int64_t begin, int64_t end,
           float *sums) const {
    int64_t row = 0;
    for (; row + ROWS <= kept.count; row += ROWS)
      add_some<ROWS>(p, kept, row, row + 2 * ROWS <= kept.count, begin, end, sums);
    for (; row < kept.count; ++row) add_some<1>(p, kept, row, false, begin, end, sums);
  }

 private:
  // R rows from `row`, block of columns by block of columns.
  template <int R>
  void add_some(const Problem &p, const Kept &kept, int64_t row, bool more, int64_t begin,
                int64_t end, float *sums) const {
    static thread_local std::vector<float> own_values;
    grow(own_values, R * p.tokens);
    float *values = own_values.data();
    const Float8 *rows[R], *next[R];
    const float *row_scales[R];
    const int64_t blocks = (p.n + SIDE - 1) / SIDE;
    for (int r = 0; r < R; ++r) {
      const int64_t channel = kept.channels[row + r];
      rows[r] = data + channel * p.n;
      row_scales[r] = scales + channel / SIDE * blocks;
      if (more) next[r] = data + kept.channels[row + R + r] * p.n;
    }
    for (int64_t column = begin; column < end;) {
      const int64_t block = column / SIDE, stop = std::min(end, (block + 1) * SIDE);
      for (int r = 0; r < R; ++r)
        for (int64_t m = 0; m < p.tokens; ++m)
          values[r * p.tokens + m] =
              kept.values[(row + r) * p.tokens + m] * row_scales[r][block];
      add_rows<Float8, R>(rows, more ? next : nullptr, values, p.tokens, column, stop,
                          sums + column, p.n);
      column = stop;
    }
  }
};

}  // namespace rsparse
