// SPDX-License-Identifier: Apache-2.0
//
// Sparse-plus-low-rank linear layer on CPUs; what it computes: vllm_rsparse/op/reference.py,
// how fast and why so: docs/cpu.md. Compiled on the machine that runs it, for its
// instruction set (vllm_rsparse/op/cpu_build.py); called by vllm_rsparse/op/cpu.py. It includes
// nothing of torch: two seconds to compile, and a new torch needs no new build.
//
// Decoding is bound by memory, so the code is about reading weights. W is stored [K, N]:
// an input channel is one contiguous row. Three steps in one parallel region:
//
//   select   Blocks of channels are shared out over the threads. A block lists the
//            channels that any token keeps, shard by shard, with each token's x (0 where
//            that token drops the channel), and sums x V over the dropped ones.
//   stream   The rows of W, and then those of U with z = V x as coefficients, are added
//            to float32 sums, ROWS at a time, while the segments of the next ROWS are
//            prefetched. Narrow layers are cut into parts along K, so that threads read
//            long pieces of rows instead of sharing every short row.
//   finish   Sums of the parts, correction and bias are added up and rounded.
//
// Results are the same bits for any number of threads and tokens in the call: blocks and
// parts depend on the shape alone, every sum has one order, and a channel that a token
// drops adds an exact zero.

#include <omp.h>

#include "elements.h"

namespace {

using namespace rsparse;

// Rows added in one pass over the sums. 4 reads a fifth slower on AMD Zen 4 (2 threads):
// the more rows are open, the more cache lines are on their way from memory.
constexpr int ROWS = 8;
// Tokens whose sums one pass updates: ROWS x TOKENS coefficients live in registers. GCC
// 12 does not vectorise the pass over 8 rows for 4 tokens: 3.4 times as slow.
constexpr int TOKENS = 2;
// Channels of a block of the first step: fixed, since it sets the order of summation.
constexpr int64_t BLOCK = 256;

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

// Columns of one shard in one part: what a thread streams without interruption.
struct Cell {
  int64_t part, shard;
  int64_t first_block, last_block;
  int64_t first_column, columns;
  int64_t rows;  // kept channels of the part; in the last part, the rank too

  // One row more, for the sums: a cell without rows is written all the same.
  int64_t cost() const { return (rows + 1) * columns; }
};

std::vector<Cell> &list_cells(const Problem &p, const Selection &selection,
                              int64_t parts, std::vector<Cell> &cells) {
  cells.clear();
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = selection.blocks * part / parts;
    const int64_t last = selection.blocks * (part + 1) / parts;
    int64_t column = 0;
    for (int64_t shard = 0; shard < p.shards; ++shard) {
      int64_t rows = part + 1 == parts ? p.ranks[shard] : 0;
      for (int64_t block = first; block < last; ++block)
        rows += selection.counts[block * p.shards + shard];
      cells.push_back({part, shard, first, last, column, p.sizes[shard], rows});
      column += p.sizes[shard];
    }
  }
  return cells;
}

// The rows of a cell.
template <typename T> struct Rows {
  std::vector<const T *> starts;  // [count], each a row of N columns of W or U
  std::vector<float> values;      // [count, tokens]
  int64_t count;

  void gather(const Problem &p, const Selection &selection, const Cell &cell,
              bool last_part, const T *weight, const T *u) {
    grow(starts, cell.rows);
    grow(values, cell.rows * p.tokens);
    count = 0;
    for (int64_t block = cell.first_block; block < cell.last_block; ++block) {
      const int64_t slot = selection.slot(cell.shard, block);
      const int32_t *channels = selection.channels.data() + slot;
      const int32_t kept = selection.counts[block * p.shards + cell.shard];
      for (int32_t i = 0; i < kept; ++i) starts[count + i] = weight + channels[i] * p.n;
      std::copy_n(selection.values.data() + slot * p.tokens, kept * p.tokens,
                  values.data() + count * p.tokens);
      count += kept;
    }
    if (!last_part) return;
    int64_t rank_start = 0;
    for (int64_t s = 0; s < cell.shard; ++s) rank_start += p.ranks[s];
    for (int64_t r = 0; r < p.ranks[cell.shard]; ++r, ++count) {
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

// sums [tokens, N] of columns [begin, end) = the rows' sum.
template <typename T>
void stream(const Problem &p, const Rows<T> &rows, int64_t begin, int64_t end,
            float *sums) {
  for (int64_t m = 0; m < p.tokens; ++m)
    std::fill(sums + m * p.n + begin, sums + m * p.n + end, 0.0f);
  const T *const *starts = rows.starts.data();
  const float *values = rows.values.data();
  int64_t row = 0;
  for (; row + ROWS <= rows.count; row += ROWS) {
    const bool more = row + 2 * ROWS <= rows.count;
    add_rows<T, ROWS>(starts + row, more ? starts + row + ROWS : nullptr,
                      values + row * p.tokens, p.tokens, begin, end, sums + begin, p.n);
  }
  for (; row < rows.count; ++row)
    add_rows<T, 1>(starts + row, static_cast<const T *const *>(nullptr),
                   values + row * p.tokens, p.tokens, begin, end, sums + begin, p.n);
}

template <typename T>
void rsparse_linear(const Problem &p, const T *x, const T *weight,
                    const float *thresholds, const T *u, const T *v,
                    const float *correction, const T *bias, T *out) {
  // Kept between calls; the team's threads are too, so theirs serve every call.
  static thread_local Selection own_selection;
  static thread_local std::vector<float> own_sums;
  Selection &selection = own_selection;
  selection.resize(p);
  const int64_t parts = part_count(p.n, sizeof(T), selection.blocks);
  grow(own_sums, parts * p.tokens * p.n);
  float *sums = own_sums.data();
  const int64_t bytes = p.n * p.k * int64_t(sizeof(T));
#pragma omp parallel if (bytes >= 2 * MIN_BYTES_PER_THREAD)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < selection.blocks; ++block)
      select_block(p, x, thresholds, v, block, selection);

    static thread_local std::vector<Cell> own_cells;
    static thread_local Rows<T> rows;
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const std::vector<Cell> &cells = list_cells(p, selection, parts, own_cells);
    int64_t total = 0, start = 0;
    for (const Cell &cell : cells) total += cell.cost();
    // The cells end to end, cut into pieces of equal cost: this thread's is [begin, end).
    const int64_t begin = total * thread / threads;
    const int64_t end = total * (thread + 1) / threads;
    for (const Cell &cell : cells) {
      // Cuts fall on cache lines, so that no two threads read the same one.
      const auto column = [&](int64_t position) {
        const int64_t columns = (position - start) / (cell.rows + 1);
        if (columns >= cell.columns) return cell.first_column + cell.columns;
        const int64_t cut = (cell.first_column + std::max<int64_t>(columns, 0)) / LINE;
        return std::max(cell.first_column, cut * LINE);
      };
      const int64_t from = column(begin), to = column(end);
      start += cell.cost();
      if (from >= to) continue;
      rows.gather(p, selection, cell, cell.part + 1 == parts, weight, u);
      stream(p, rows, from, to, sums + cell.part * p.tokens * p.n);
    }
#pragma omp barrier
    finish(p.tokens, p.n, sums, parts, p.n, correction, bias, out);
  }
}

}  // namespace

// Element types as in with_element, whose result is returned. Layouts, row-major:
//   x [tokens, K] with rows x_stride apart, weight [K, N], thresholds float32 [S, K],
//   u [max rank, N], v [K, sum of ranks], correction float32 [N] or null, bias [N] or
//   null, out [tokens, N]; sizes and ranks [S]. Pointers need no alignment beyond their
//   element's.
extern "C" int vllm_rsparse_linear(int element, int64_t tokens, int64_t n, int64_t k,
                                   int64_t x_stride, int64_t shards,
                                   const int64_t *sizes, const int64_t *ranks,
                                   const void *x, const void *weight,
                                   const float *thresholds, const void *u,
                                   const void *v, const float *correction,
                                   const void *bias, void *out) {
  Problem p{tokens, n, k, x_stride, shards, 0, sizes, ranks};
  for (int64_t s = 0; s < shards; ++s) p.rank_sum += ranks[s];
  return with_element(element, [&](auto like) {
    using T = decltype(like);
    rsparse_linear(p, static_cast<const T *>(x), static_cast<const T *>(weight),
                   thresholds, static_cast<const T *>(u), static_cast<const T *>(v),
                   correction, static_cast<const T *>(bias), static_cast<T *>(out));
  });
}
