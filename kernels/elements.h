// SPDX-License-Identifier: Apache-2.0
//
// Shared by the kernels for CPUs: element types, and how sums of parts become outputs.
// Like them it does not include torch (vllm_rsparse/op/cpu_build.py).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace rsparse {

// Bytes of a row below which K is cut, into parts that make up for it. 4 KiB rows read 6 to
// 17% faster whole than in halves (Zen 4, 2 threads); for 32 KiB rows it makes no difference.
constexpr int64_t PART_BYTES = 16 << 10;
// Bytes of weight below which waking other threads costs more than they save.
constexpr int64_t MIN_BYTES_PER_THREAD = 64 << 10;
// Bytes of a cache line; columns of a cut, as well.
constexpr int64_t LINE = 64;
// Columns that a thread finishes at a time.
constexpr int64_t CHUNK = 512;

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

// Call with a value of the element type of this number: 0 float32, 1 bfloat16, 2 float16.
// Returns 0, or 1 for an unknown number.
template <typename Call> int with_element(int number, Call call) {
  switch (number) {
    case 0: call(float()); return 0;
    case 1: call(Bfloat16()); return 0;
    case 2: call(Half()); return 0;
    default: return 1;
  }
}

// Sizes only grow, so that a warm engine allocates nothing.
template <typename V> void grow(V &vector, int64_t size) {
  if (int64_t(vector.size()) < size) vector.resize(size);
}

// Parts into which K is cut, by the bytes of a row; they depend on the shape alone.
inline int64_t part_count(int64_t row_bytes, int64_t blocks) {
  return std::clamp<int64_t>(PART_BYTES / row_bytes, 1, blocks);
}

// out [tokens, n] from the sums [parts, tokens, stride], divided among the threads of the
// parallel region that calls it.
template <typename T>
void finish(int64_t tokens, int64_t n, const float *sums, int64_t parts, int64_t stride,
            const float *correction, const T *bias, T *out) {
#pragma omp for schedule(static)
  for (int64_t chunk = 0; chunk < (n + CHUNK - 1) / CHUNK; ++chunk) {
    const int64_t begin = chunk * CHUNK, end = std::min(n, begin + CHUNK);
    for (int64_t m = 0; m < tokens; ++m) {
      for (int64_t c = begin; c < end; ++c) {
        float value = sums[m * stride + c];
        for (int64_t part = 1; part < parts; ++part)
          value += sums[(part * tokens + m) * stride + c];
        if (correction) value += correction[c];
        if (bias) value += to_float(bias[c]);
        store(out + m * n + c, value);
      }
    }
  }
}

}  // namespace rsparse
