// SPDX-License-Identifier: Apache-2.0
//
// First step of the sparse linear layer on CPUs: which channels are kept, and which
// thread streams which rows over which columns (rsparse_linear.cpp).

#pragma once

#include "elements.h"

namespace rsparse {

// Channels of a block of the first step: fixed, since it sets the order of summation. A
// multiple of every group of channels that share a scale.
constexpr int64_t BLOCK = 256;

struct Problem {
  int64_t tokens, n, k, x_stride, shards, rank_sum, planes;
  const int64_t *sizes, *ranks;

  // Rows of thresholds: those of a plane's shards, plane by plane.
  int64_t selections() const { return planes * shards; }
};

// What the first step leaves for the second, per block and row of thresholds.
struct Selection {
  int64_t blocks, rows, tokens, rank_sum;
  std::vector<int32_t> counts;    // [blocks, rows]
  std::vector<int32_t> channels;  // [rows, blocks * BLOCK], each block from its start
  std::vector<float> values;      // [rows, blocks * BLOCK, tokens]
  std::vector<float> partial_z;   // [blocks, tokens, rank_sum]

  void resize(const Problem &p) {
    blocks = (p.k + BLOCK - 1) / BLOCK;
    rows = p.selections(), tokens = p.tokens, rank_sum = p.rank_sum;
    grow(counts, blocks * rows);
    grow(channels, rows * blocks * BLOCK);
    grow(values, rows * blocks * BLOCK * tokens);
    grow(partial_z, blocks * tokens * rank_sum);
  }

  int64_t slot(int64_t row, int64_t block) const {
    return (row * blocks + block) * BLOCK;
  }
};

template <typename T>
void select_block(const Problem &p, const T *x, const float *thresholds, const T *v,
                  int64_t block, Selection &out) {
  const int64_t begin = block * BLOCK, end = std::min(p.k, begin + BLOCK);
  float *z = out.partial_z.data() + block * p.tokens * p.rank_sum;
  std::fill_n(z, p.tokens * p.rank_sum, 0.0f);
  int64_t rank_start = 0;
  for (int64_t index = 0; index < out.rows; ++index) {
    const float *threshold = thresholds + index * p.k;
    // Factors stand in for what the first plane drops.
    const int64_t rank = index < p.shards ? p.ranks[index] : 0;
    int32_t *channels = out.channels.data() + out.slot(index, block);
    float *values = out.values.data() + out.slot(index, block) * p.tokens;
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
    out.counts[block * out.rows + index] = count;
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
  int64_t rows;  // kept channels of the part, by plane; in the last part, the rank too

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
        for (int64_t index = shard; index < selection.rows; index += p.shards)
          rows += selection.counts[block * selection.rows + index];
      cells.push_back({part, shard, first, last, column, p.sizes[shard], rows});
      column += p.sizes[shard];
    }
  }
  return cells;
}

// The channels of a cell that a plane keeps, in order.
struct Kept {
  std::vector<int32_t> channels;  // [count]
  std::vector<float> values;      // [count, tokens]
  int64_t count;

  void gather(const Problem &p, const Selection &selection, const Cell &cell,
              int64_t plane) {
    grow(channels, cell.rows);
    grow(values, cell.rows * p.tokens);
    count = 0;
    const int64_t index = plane * p.shards + cell.shard;
    for (int64_t block = cell.first_block; block < cell.last_block; ++block) {
      const int64_t slot = selection.slot(index, block);
      const int32_t kept = selection.counts[block * selection.rows + index];
      std::copy_n(selection.channels.data() + slot, kept, channels.data() + count);
      std::copy_n(selection.values.data() + slot * p.tokens, kept * p.tokens,
                  values.data() + count * p.tokens);
      count += kept;
    }
  }
};

}  // namespace rsparse
