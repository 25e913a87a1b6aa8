// SPDX-License-Identifier: Apache-2.0
//
// Sparse-plus-low-rank linear layer on CPUs, as defined in vllm_rsparse/op/reference.py;
// speed and design: docs/cpu.md. Compiled on the machine that runs it, for its instruction
// set (vllm_rsparse/op/cpu_build.py); called by vllm_rsparse/op/cpu.py. It does not include
// torch, so it compiles in seconds, and a new torch needs no new build.
//
// Decoding is bound by memory, so the code is about reading weights. W is stored [K, N]:
// an input channel is one contiguous row. Three steps in one parallel region:
//
//   select   Blocks of channels are divided among the threads. A block lists the
//            channels that any token keeps, for each shard (and plane of the weight), with
//            each token's x (0 where that token drops the channel), and sums x V over the
//            ones that the first plane drops.
//   stream   The rows of W (rows_*.h has a reader per format), and then those of U with
//            z = V x as coefficients, are added to float32 sums, ROWS at a time, while the
//            segments of the next ROWS are prefetched. Narrow layers are split into parts
//            along K, so that threads read long pieces of rows instead of sharing every
//            short row.
//   finish   Sums of the parts, correction and bias are added up and rounded.
//
// Results are the same bits for any number of threads and tokens in the call: blocks and
// parts depend on the shape alone, every sum has one order, and a channel that a token
// drops adds an exact zero.

#include <omp.h>

#include "rows_float.h"
#include "rows_fp8.h"
#include "rows_int4.h"

namespace {

using namespace rsparse;

template <typename T, typename Weight>
void rsparse_linear(const Problem &p, const T *x, const Weight &weight,
                    const float *thresholds, const T *u, const T *v,
                    const float *correction, const T *bias, T *out) {
  // Kept between calls; the team's threads are too, so theirs serve every call.
  static thread_local Selection own_selection;
  static thread_local std::vector<float> own_sums;
  Selection &selection = own_selection;
  selection.resize(p);
  const int64_t row_bytes = Weight::row_bytes(p.n);
  const int64_t parts = part_count(row_bytes, selection.blocks);
  grow(own_sums, parts * p.tokens * p.n);
  float *sums = own_sums.data();
#pragma omp parallel if (row_bytes * p.k >= 2 * MIN_BYTES_PER_THREAD)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < selection.blocks; ++block)
      select_block(p, x, thresholds, v, block, selection);

    static thread_local std::vector<Cell> own_cells;
    static thread_local Kept kept;
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
      float *own = sums + cell.part * p.tokens * p.n;
      for (int64_t m = 0; m < p.tokens; ++m)
        std::fill(own + m * p.n + from, own + m * p.n + to, 0.0f);
      for (int64_t plane = 0; plane < p.planes; ++plane) {
        kept.gather(p, selection, cell, plane);
        add_plane(weight, plane, p, kept, from, to, own);
      }
      if (cell.part + 1 == parts)
        add_factors(p, selection, cell.shard, u, from, to, own);
    }
#pragma omp barrier
    finish(p.tokens, p.n, sums, parts, p.n, correction, bias, out);
  }
}

constexpr int INT8_PLANES = 4;

// Call with the weight of this format, or return 1.
template <typename T, typename Call>
int with_weight(const Problem &p, const Stored &stored, Call call) {
  switch (stored.format) {
    case 0: call(FloatWeight<T>{static_cast<const T *>(stored.data)}); return 0;
    case 1: call(Fp8Weight(stored)); return 0;
    case 2: call(Fp8BlockWeight(stored)); return 0;
    case 3:
      return with_element(stored.scale_element, [&](auto like) {
        call(Int4Weight<decltype(like)>(stored));
      });
    case INT8_PLANES:
      return with_element(stored.scale_element, [&](auto like) {
        call(PlanesWeight<decltype(like)>(p, stored));
      });
    default: return 1;
  }
}

}  // namespace

// Element types as in with_element. Returns 0, or 1 for an unknown number. Layouts,
// row-major:
//   x [tokens, K] with rows x_stride apart, thresholds float32 [planes * S, K], u [max
//   rank, N], v [K, sum of ranks], correction float32 [N] or null, bias [N] or null, out [tokens, N];
//   sizes and ranks [S]. Pointers need no alignment beyond their element's.
// The weight, by the number of its format (vllm_rsparse/formats):
//   0 float: [K, N] in x's type.
//   1 fp8: e4m3 [K, N], scales float32 [N].
//   2 fp8-block: e4m3 [K, N], scales float32 [ceil(K/128), ceil(N/128)].
//   3 int4: nibbles [K, N], the low one first, scales of scale_element [K/group, N], zeros
//     nibbles [K/group, N] or null for 8. N and the sizes are multiples of 8; group
//     divides K, and is 32, 64, 128 or K.
//   4 int8-planes: nibbles [2, K, N], scales and zeros as for int4; group is not K. It has
//     two planes, the others one.
extern "C" int vllm_rsparse_linear(int element, int format, int scale_element,
                                   int64_t tokens, int64_t n, int64_t k,
                                   int64_t x_stride, int64_t group, int64_t shards,
                                   const int64_t *sizes, const int64_t *ranks,
                                   const void *x, const void *data, const void *scales,
                                   const void *zeros, const float *thresholds,
                                   const void *u, const void *v,
                                   const float *correction, const void *bias,
                                   void *out) {
  const int64_t planes = format == INT8_PLANES ? 2 : 1;
  Problem p{tokens, n, k, x_stride, shards, 0, planes, sizes, ranks};
  for (int64_t s = 0; s < shards; ++s) p.rank_sum += ranks[s];
  const Stored stored{format, scale_element, group, data, scales, zeros};
  int unknown_format = 0;
  const int unknown_element = with_element(element, [&](auto like) {
    using T = decltype(like);
    unknown_format = with_weight<T>(p, stored, [&](const auto &weight) {
      rsparse_linear(p, static_cast<const T *>(x), weight, thresholds,
                     static_cast<const T *>(u), static_cast<const T *>(v), correction,
                     static_cast<const T *>(bias), static_cast<T *>(out));
    });
  });
  return unknown_element | unknown_format;
}
