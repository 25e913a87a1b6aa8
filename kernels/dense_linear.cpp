// SPDX-License-Identifier: Apache-2.0
//
// y = W x + bias on CPUs for a few tokens, W stored [K, N] as the sparse route needs it;
// called by vllm_rsparse/cpu.py. torch's product turns such a weight over at every call,
// which costs as much as reading it twice; measured in docs/cpu.md.
//
// A tile of W, BLOCK_ROWS x BLOCK_COLUMNS, is laid out in panels of a few columns, and
// multiplied panel by panel with the sums of up to TOKENS tokens in registers, while the
// next tile is fetched into the second-level cache. Prefetched into the first level it
// takes 1.4 times as long at 4 tokens (Zen 4): too few lines can be on their way there.
//
// Results are the same bits for any number of threads and tokens in the call: tiles and
// parts depend on the shape alone, and every sum has one order.

#include <omp.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "elements.h"

namespace {

using namespace rsparse;

constexpr int64_t BLOCK_ROWS = 128;
constexpr int64_t BLOCK_COLUMNS = 256;

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

inline Vector load(const float *from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

// How a tile is laid out and multiplied. A panel holds COLUMNS columns of `depth` rows,
// STEP rows at a time; x holds STEP values a step likewise.
template <typename T> struct Tile {
  using Element = float;
  static constexpr int64_t COLUMNS = 2 * LANES, STEP = 1;

  static Element element(T value) { return to_float(value); }

  // Two vectors of the panel from one row.
  static void pack(const T *row, int64_t, float *to) {
    for (int64_t c = 0; c < COLUMNS; ++c) to[c] = to_float(row[c]);
  }

  static void add(Vector (&sums)[2], const float *panel, const float *x) {
    for (int h = 0; h < 2; ++h) sums[h] += load(panel + h * LANES) * *x;
  }
};

#ifdef __AVX512BF16__
// Pairs of rows side by side, for the instruction that adds two products at once.
template <> struct Tile<Bfloat16> {
  using Element = uint16_t;
  static constexpr int64_t COLUMNS = 2 * LANES, STEP = 2;

  static Element element(Bfloat16 value) { return value.bits; }

  static void pack(const Bfloat16 *row, int64_t next, uint16_t *to) {
    alignas(LINE) static constexpr uint16_t ORDER[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(ORDER);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(row + next);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a, high, b));
  }

  static void add(Vector (&sums)[2], const uint16_t *panel, const uint16_t *x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
    for (int h = 0; h < 2; ++h)
      sums[h] = (Vector)_mm512_dpbf16_ps(
          (__m512)sums[h], (__m512bh)_mm512_loadu_si512(panel + 32 * h), both);
  }
};
#endif

template <typename T> struct Shape {
  using Element = typename Tile<T>::Element;
  static constexpr int64_t COLUMNS = Tile<T>::COLUMNS, STEP = Tile<T>::STEP;
  static constexpr int64_t PANELS = BLOCK_COLUMNS / COLUMNS;
  // Elements from panel to panel. Two lines more than its contents: at a power of two
  // all panels would fall into the same sets of the cache.
  static constexpr int64_t PANEL = BLOCK_ROWS * COLUMNS + 2 * LINE / sizeof(Element);
  // Cache lines of W that a panel stands for, and of one row of a tile.
  static constexpr int64_t PANEL_LINES = BLOCK_ROWS * COLUMNS * sizeof(T) / LINE;
  static constexpr int64_t ROW_LINES = BLOCK_COLUMNS * sizeof(T) / LINE;
};

// The tile that comes next. It may reach beyond W: prefetching there does nothing.
template <typename T> struct Ahead {
  const T *start;
  int64_t n;

  void fetch(int64_t line) const {
    const int64_t row = line / Shape<T>::ROW_LINES, at = line % Shape<T>::ROW_LINES;
    const uintptr_t address = uintptr_t(start) + row * n * sizeof(T) + at * LINE;
    __builtin_prefetch(reinterpret_cast<const void *>(address), 0, 1);
  }
};

// The first `rows` rows and `columns` columns at w [., n] as panels, the rest of the last
// step and panel zeros.
template <typename T>
void pack_tile(const T *w, int64_t n, int64_t rows, int64_t columns,
               typename Tile<T>::Element *tile) {
  using S = Shape<T>;
  for (int64_t r = 0; r < rows; r += S::STEP) {
    for (int64_t c = 0; c < columns; c += S::COLUMNS) {
      auto *to = tile + c / S::COLUMNS * S::PANEL + r * S::COLUMNS;
      const int64_t width = std::min(S::COLUMNS, columns - c);
      if (width == S::COLUMNS && r + S::STEP <= rows) {
        Tile<T>::pack(w + r * n + c, n, to);
        continue;
      }
      T edge[S::STEP * S::COLUMNS] = {};
      for (int64_t i = 0; i < std::min(S::STEP, rows - r); ++i)
        std::copy_n(w + (r + i) * n + c, width, edge + i * S::COLUMNS);
      Tile<T>::pack(edge, S::COLUMNS, to);
    }
  }
}

// sums [M, COLUMNS], rows `stride` apart, (+)= a panel times x [M, BLOCK_ROWS].
template <typename T, int M>
[[gnu::noinline]] void multiply(const typename Tile<T>::Element *panel,
                                const typename Tile<T>::Element *x, int64_t rows,
                                bool first, float *sums, int64_t stride,
                                const Ahead<T> *ahead, int64_t line) {
  using S = Shape<T>;
  constexpr int64_t STEPS = BLOCK_ROWS / S::STEP;
  Vector total[M][2] = {};
  for (int m = 0; !first && m < M; ++m)
    for (int h = 0; h < 2; ++h) total[m][h] = load(sums + m * stride + h * LANES);
  for (int64_t step = 0; step * S::STEP < rows; ++step) {
    if (ahead) {
      const int64_t end = line + (step + 1) * S::PANEL_LINES / STEPS;
      for (int64_t i = line + step * S::PANEL_LINES / STEPS; i < end; ++i) ahead->fetch(i);
    }
    const auto *two = panel + step * S::STEP * S::COLUMNS;
    for (int m = 0; m < M; ++m)
      Tile<T>::add(total[m], two, x + m * BLOCK_ROWS + step * S::STEP);
  }
  for (int m = 0; m < M; ++m)
    std::memcpy(sums + m * stride, total[m], sizeof total[m]);
}

template <typename T>
void multiply(int64_t tokens, const typename Tile<T>::Element *panel,
              const typename Tile<T>::Element *x, int64_t rows, bool first, float *sums,
              int64_t stride, const Ahead<T> &next, int64_t line) {
  for (int64_t m = 0; m < tokens; m += TOKENS) {
    const Ahead<T> *ahead = m == 0 ? &next : nullptr;
    switch (std::min<int64_t>(TOKENS, tokens - m)) {
#define CASE(M)                                                                       \
  case M:                                                                             \
    multiply<T, M>(panel, x + m * BLOCK_ROWS, rows, first, sums + m * stride, stride, \
                   ahead, line);                                                      \
    break;
      CASE(1) CASE(2) CASE(3) CASE(4)
#if defined(__AVX512F__) || defined(__aarch64__)
      CASE(5) CASE(6) CASE(7) CASE(8)
#endif
#undef CASE
    }
  }
}

template <typename T>
void dense_linear(int64_t tokens, int64_t n, int64_t k, int64_t x_stride, const T *x,
                  const T *weight, const T *bias, T *out) {
  using S = Shape<T>;
  // Kept between calls; the team's threads are too, so theirs serve every call.
  static thread_local std::vector<float> own_sums;
  static thread_local std::vector<typename S::Element> own_x;
  const int64_t blocks = (k + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const int64_t panels = (n + S::COLUMNS - 1) / S::COLUMNS;
  const int64_t stride = panels * S::COLUMNS;  // a last panel is written whole
  const int64_t parts = part_count(n, sizeof(T), blocks);
  grow(own_sums, parts * tokens * stride);
  grow(own_x, blocks * tokens * BLOCK_ROWS);
  float *const sums = own_sums.data();
  auto *const values = own_x.data();  // [blocks, tokens, BLOCK_ROWS]
#pragma omp parallel if (n * k * int64_t(sizeof(T)) >= 2 * MIN_BYTES_PER_THREAD)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t m = 0; m < tokens; ++m)
        for (int64_t i = 0; i < BLOCK_ROWS; ++i) {
          const int64_t j = block * BLOCK_ROWS + i;
          values[(block * tokens + m) * BLOCK_ROWS + i] =
              j < k ? Tile<T>::element(x[m * x_stride + j]) : typename S::Element(0);
        }

    static thread_local std::vector<typename S::Element> tile;
    grow(tile, S::PANELS * S::PANEL);
    // The parts' panels end to end, cut evenly: this thread's are [begin, end).
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t begin = parts * panels * thread / threads;
    const int64_t end = parts * panels * (thread + 1) / threads;
    for (int64_t at = begin; at < end;) {
      const int64_t part = at / panels, panel = at % panels;
      const int64_t count = std::min({S::PANELS, panels - panel, end - at});
      const int64_t column = panel * S::COLUMNS;
      const int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
      for (int64_t block = first; block < last; ++block) {
        const int64_t row = block * BLOCK_ROWS, rows = std::min(BLOCK_ROWS, k - row);
        const T *start = weight + row * n + column;
        pack_tile(start, n, rows, std::min(count * S::COLUMNS, n - column), tile.data());
        const bool more = block + 1 < last;
        const Ahead<T> next{more ? start + BLOCK_ROWS * n
                                 : weight + first * BLOCK_ROWS * n + column + BLOCK_COLUMNS,
                            n};
        for (int64_t p = 0; p < count; ++p)
          multiply<T>(tokens, tile.data() + p * S::PANEL,
                      values + block * tokens * BLOCK_ROWS, rows, block == first,
                      sums + part * tokens * stride + column + p * S::COLUMNS, stride,
                      next, p * S::PANEL_LINES);
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
