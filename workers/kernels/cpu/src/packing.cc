// Puts weights into the order in which the kernels read them: see workers/kernels/packed.py, which says the same in NumPy.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace {

constexpr int64_t kRunRows = 64, kStripColumns = 4;

// 64 rows of four columns, `stride` bytes apart, to four runs of 64.
inline void turn(const int8_t* from, int64_t stride, int8_t* to) {
  for (int64_t i = 0; i < kRunRows; i++) {
    int8_t four[kStripColumns];
    std::memcpy(four, from + i * stride, kStripColumns);
    for (int64_t c = 0; c < kStripColumns; c++) to[c * kRunRows + i] = four[c];
  }
}

}  // namespace

// weight [count, rows, columns] with `groups` groups of rows -> packed [count, blocks, strips, size]; what is filled up is zero.
extern "C" void grokmesh_pack(const int8_t* weight, int8_t* packed, int64_t count, int64_t rows, int64_t columns, int64_t groups,
                              int64_t blocks, int64_t strips, int64_t size) {
  const int64_t depth = rows / groups, block_rows = size / kStripColumns, group_blocks = blocks / groups;
  for (int64_t m = 0; m < count; m++) {
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t end = (b / group_blocks + 1) * depth;
      for (int64_t run = 0; run < block_rows; run += kRunRows) {
        const int64_t first = b / group_blocks * depth + b % group_blocks * block_rows + run;
        const int64_t valid = std::clamp<int64_t>(end - first, 0, kRunRows);
        const int8_t* from = weight + (m * rows + first) * columns;
        for (int64_t s = 0; s < strips; s++) {
          int8_t* to = packed + ((m * blocks + b) * strips + s) * size + run * kStripColumns;
          const int64_t width = std::min(kStripColumns, columns - s * kStripColumns);
          if (valid == kRunRows && width == kStripColumns) {
            turn(from + s * kStripColumns, columns, to);
            continue;
          }
          std::memset(to, 0, kRunRows * kStripColumns);
          for (int64_t i = 0; i < valid; i++)
            for (int64_t c = 0; c < width; c++) to[c * kRunRows + i] = from[i * columns + s * kStripColumns + c];
        }
      }
    }
  }
}
