// SPDX-License-Identifier: Apache-2.0
//
// y = W x + bias on CPUs for a few tokens, W stored [K, N] as the sparse route needs it;
// called by vllm_rsparse/op/cpu.py. torch's product transposes such a weight at every call,
// which costs as much as reading it twice; measured in docs/cpu.md.
//
// W is read as the sparse route reads it, a few rows at a time along their columns, and
// never rearranged in memory: a strip of columns is widened or interleaved in
// registers, and multiplied there for up to TOKENS tokens, while the next rows are
// fetched into the second-level cache. Where there are more tokens, the first ones leave
// their registers in the first-level cache for the others.
//
// Results are the same bits for any number of threads and tokens in the call: blocks and
// parts depend on the shape alone, and every sum has one order.

#include <omp.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "elements.h"

namespace {

using namespace rsparse;

// Rows of one pass over the sums, and its columns: what is kept for the other tokens, 16
// KiB of bfloat16, shares the first-level cache with the sums. 32 rows take 1.2 times as
// long (Zen 5): at a stride of 32 KiB they do not fit into the cache's sets.
constexpr int64_t ROWS = 16;
constexpr int64_t COLUMNS = 512;

#ifdef __AVX512F__
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
// Tokens whose sums, two vectors each, are in registers: 32 of them, or 16 before AVX-512.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TOKENS = 8;
#else
constexpr int TOKENS = 4;
#endif

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
constexpr int64_t LANES = VECTOR_BYTES / sizeof(float);
constexpr int64_t STRIP = 2 * LANES;  // columns of two vectors of sums
constexpr int64_t STRIPS = COLUMNS / STRIP;

inline Vector load(const float *from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

// STEP rows of a strip as two registers, and their product with STEP values of x.
template <typename T> struct Step {
  using Register = Vector;
  using Element = float;
  static constexpr int64_t STEP = 1;

  static Element element(T value) { return to_float(value); }

  static void read(const T *row, int64_t, Register (&two)[2]) {
    for (int h = 0; h < 2; ++h)
      for (int64_t i = 0; i < LANES; ++i) two[h][i] = to_float(row[h * LANES + i]);
  }

  static void add(Vector (&sums)[2], const Register (&two)[2], const float *x) {
    for (int h = 0; h < 2; ++h) sums[h] += two[h] * *x;
  }
};

#ifdef __AVX512BF16__
// Pairs of rows side by side, for the instruction that adds two products at once.
template <> struct Step<Bfloat16> {
  using Register = __m512i;
  using Element = uint16_t;
  static constexpr int64_t STEP = 2;

  static Element element(Bfloat16 value) { return value.bits; }

  static void read(const Bfloat16 *row, int64_t next, Register (&two)[2]) {
    alignas(LINE) static constexpr uint16_t ORDER[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(ORDER);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(row + next);
    two[0] = _mm512_permutex2var_epi16(a, low, b);
    two[1] = _mm512_permutex2var_epi16(a, high, b);
  }

  static void add(Vector (&sums)[2], const Register (&two)[2], const uint16_t *x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
    for (int h = 0; h < 2; ++h)
      sums[h] = (Vector)_mm512_dpbf16_ps((__m512)sums[h], (__m512bh)two[h], both);
  }
};
#endif

template <typename T> using Register = typename Step<T>::Register;
template <typename T> using Element = typename Step<T>::Element;
template <typename T> constexpr int64_t STEPS = ROWS / Step<T>::STEP;
// A strip of all rows, as registers.
template <typename T> using Kept = Register<T>[STEPS<T>][2];

// Where a group of tokens takes the rows from: memory, memory and leave them for the next
// group, or what the first group left.
enum class From { MEMORY, MEMORY_AND_KEEP, KEPT };

// sums [M, strips * STRIP], `stride` apart, += ROWS rows at w, n apart, times x [STEPS, M,
// STEP]. `ahead` is the address of the rows that come next; it may lie beyond W, where
// prefetching does nothing.
template <typename T, int M, From FROM>
[[gnu::noinline]] void add_rows(const T *w, int64_t n, const Element<T> *x, int64_t strips,
                                float *sums, int64_t stride, Kept<T> *kept,
                                uintptr_t ahead) {
  for (int64_t strip = 0; strip < strips; ++strip, w += STRIP, sums += STRIP, ++kept) {
    // Otherwise GCC fills registers and stack with x before the loop: 1.2 times as long.
    asm volatile("" : "+r"(x));
    Vector total[M][2];
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < 2; ++h) total[m][h] = load(sums + m * stride + h * LANES);
    if (FROM != From::KEPT) {
      // Row by row: a line of each row in every strip took 1.06 times as long.
      const int64_t end = (strip + 1) * ROWS / STRIPS;
      for (int64_t row = strip * ROWS / STRIPS; row < end; ++row)
        for (int64_t at = 0; at < COLUMNS * int64_t(sizeof(T)); at += LINE)
          __builtin_prefetch(
              reinterpret_cast<const void *>(ahead + row * n * sizeof(T) + at), 0, 1);
    }
#pragma GCC unroll 1
    for (int64_t step = 0; step < STEPS<T>; ++step) {
      Register<T> two[2];
      if (FROM != From::KEPT) Step<T>::read(w + step * Step<T>::STEP * n, n, two);
      for (int h = 0; h < 2; ++h) {
        if (FROM == From::KEPT) two[h] = (*kept)[step][h];
        if (FROM == From::MEMORY_AND_KEEP) (*kept)[step][h] = two[h];
      }
      for (int m = 0; m < M; ++m)
        Step<T>::add(total[m], two, x + (step * M + m) * Step<T>::STEP);
    }
    for (int m = 0; m < M; ++m)
      std::memcpy(sums + m * stride, total[m], sizeof total[m]);
  }
}

template <typename T, From FROM>
void add_rows(int64_t tokens, const T *w, int64_t n, const Element<T> *x, int64_t strips,
              float *sums, int64_t stride, Kept<T> *kept, uintptr_t ahead) {
  switch (tokens) {
#define CASE(M)                                                               \
  case M:                                                                     \
    add_rows<T, M, FROM>(w, n, x, strips, sums, stride, kept, ahead);         \
    break;
    CASE(1) CASE(2) CASE(3) CASE(4)
#if defined(__AVX512F__) || defined(__aarch64__)
    CASE(5) CASE(6) CASE(7) CASE(8)
#endif
#undef CASE
  }
}

// The same for any number of tokens; x [tokens * ROWS], a group of TOKENS after another.
template <typename T>
void add_rows(int64_t tokens, const T *w, int64_t n, const Element<T> *x, int64_t strips,
              float *sums, int64_t stride, uintptr_t ahead) {
  Kept<T> kept[STRIPS];
  if (tokens <= TOKENS) {
    add_rows<T, From::MEMORY>(tokens, w, n, x, strips, sums, stride, kept, ahead);
    return;
  }
  add_rows<T, TOKENS, From::MEMORY_AND_KEEP>(w, n, x, strips, sums, stride, kept, ahead);
  for (int64_t m = TOKENS; m < tokens; m += TOKENS)
    add_rows<T, From::KEPT>(std::min<int64_t>(TOKENS, tokens - m), w, n, x + m * ROWS,
                            strips, sums + m * stride, stride, kept, ahead);
}

// The same for `rows` rows and `columns` columns, of which some may be missing.
template <typename T>
void add_block(int64_t tokens, const T *w, int64_t n, int64_t rows, int64_t columns,
               const Element<T> *x, float *sums, int64_t stride, uintptr_t ahead) {
  const int64_t whole = rows == ROWS ? columns / STRIP : 0;
  add_rows<T>(tokens, w, n, x, whole, sums, stride, ahead);
  for (int64_t c = whole * STRIP; c < columns; c += STRIP) {
    T edge[ROWS * STRIP] = {};
    for (int64_t row = 0; row < rows; ++row)
      std::copy_n(w + row * n + c, std::min(STRIP, columns - c), edge + row * STRIP);
    add_rows<T>(tokens, edge, STRIP, x, 1, sums + c, stride, ahead);
  }
}

template <typename T>
void dense_linear(int64_t tokens, int64_t n, int64_t k, int64_t x_stride, const T *x,
                  const T *weight, const T *bias, T *out) {
  // Kept between calls; the team's threads are too, so theirs serve every call.
  static thread_local std::vector<float> own_sums;
  static thread_local std::vector<Element<T>> own_x;
  const int64_t blocks = (k + ROWS - 1) / ROWS, strips = (n + STRIP - 1) / STRIP;
  // A last strip is written whole. Lines between tokens, whose sums would else fall into
  // the same sets of the cache: 1.08 times as long at 16 tokens.
  const int64_t stride = strips * STRIP + 3 * LINE;
  const int64_t parts = part_count(n * int64_t(sizeof(T)), blocks);
  grow(own_sums, parts * tokens * stride);
  grow(own_x, blocks * tokens * ROWS);
  float *const sums = own_sums.data();
  Element<T> *const values = own_x.data();  // a block after another, each as add_rows says
#pragma omp parallel if (n * k * int64_t(sizeof(T)) >= 2 * MIN_BYTES_PER_THREAD)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t m = 0; m < tokens; ++m) {
        const int64_t first = m / TOKENS * TOKENS;
        const int64_t group = std::min<int64_t>(TOKENS, tokens - first);
        Element<T> *to = values + (block * tokens + first) * ROWS;
        for (int64_t i = 0; i < ROWS; ++i) {
          const int64_t j = block * ROWS + i, step = i / Step<T>::STEP;
          to[(step * group + m - first) * Step<T>::STEP + i % Step<T>::STEP] =
              j < k ? Step<T>::element(x[m * x_stride + j]) : Element<T>(0);
        }
      }
    // The parts' strips end to end, cut evenly: this thread's are [begin, end).
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t begin = parts * strips * thread / threads;
    const int64_t end = parts * strips * (thread + 1) / threads;
    for (int64_t at = begin; at < end;) {
      const int64_t part = at / strips, strip = at % strips;
      const int64_t count = std::min({STRIPS, strips - strip, end - at});
      const int64_t column = strip * STRIP, columns = std::min(count * STRIP, n - column);
      const int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
      float *const mine = sums + part * tokens * stride + column;
      for (int64_t m = 0; m < tokens; ++m)
        std::fill_n(mine + m * stride, count * STRIP, 0.0f);
      for (int64_t block = first; block < last; ++block) {
        const int64_t next = block + 1 < last ? (block + 1) * ROWS * n + column
                                              : first * ROWS * n + column + COLUMNS;
        add_block<T>(tokens, weight + block * ROWS * n + column, n,
                     std::min(ROWS, k - block * ROWS), columns,
                     values + block * tokens * ROWS, mine, stride,
                     uintptr_t(weight) + next * sizeof(T));
      }
      at += count;
    }
#pragma omp barrier
    finish<T>(tokens, n, sums, parts, stride, nullptr, bias, out);
  }
}

}  // namespace

// Element types as in with_element, whose result is returned. Layouts, row-major:
//   x [tokens, K] with rows x_stride apart, weight [K, N], bias [N] or null, out
//   [tokens, N]. Pointers need no alignment beyond their element's.
extern "C" int vllm_rsparse_dense_linear(int element, int64_t tokens, int64_t n,
                                         int64_t k, int64_t x_stride, const void *x,
                                         const void *weight, const void *bias,
                                         void *out) {
  return with_element(element, [&](auto like) {
    using T = decltype(like);
    dense_linear(tokens, n, k, x_stride, static_cast<const T *>(x),
                 static_cast<const T *>(weight), static_cast<const T *>(bias),
                 static_cast<T *>(out));
  });
}
