// Puts weights into the order in which the kernels read them: see workers/kernels/packing.py, which says the same in NumPy.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

// Emitted twice, and chosen from when the library is loaded.
#if defined(__x86_64__)
#define GROKMESH_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define GROKMESH_CLONES
#endif

namespace {

constexpr int64_t kRun = 64;         // values of a column that follow each other in a strip
constexpr int64_t kSide = 64;        // of a square tile
constexpr int64_t kTile = kSide * kSide;
constexpr int64_t kStripRun = grokmesh::kStrip * kRun;
constexpr float kTwoPlanes = 32512;  // the largest magnitude of 256 * high + low

// Every second byte of `to` from each half of `from`. Of a tile's twelve bits of index this makes the first the last one.
inline void interleave(const uint8_t* __restrict__ from, uint8_t* __restrict__ to) {
  for (int64_t i = 0; i < kTile / 2; i++) {
    to[2 * i] = from[i];
    to[2 * i + 1] = from[kTile / 2 + i];
  }
}

// Transposes a tile, with another one to work in: six of the bits change places with the other six.
inline void transpose(uint8_t* tile, uint8_t* other) {
  for (int64_t side = kSide; side > 1; side /= 4) {
    interleave(tile, other);
    interleave(other, tile);
  }
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float widened(float x) { return x; }
inline float widened(uint16_t bfloat16) { return from_bits(static_cast<uint32_t>(bfloat16) << 16); }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// The bits of x rounded to bfloat16, to even.
inline uint32_t rounded_bits(float x) {
  const uint32_t bits = bits_of(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
}

// Nearest, to even, for magnitudes up to 2^22.
inline float nearest(float x) {
  constexpr float shift = 0x1.8p23f;
  return (x + shift) - shift;
}

// table [rows, width] -> values [blocks, strips, 2 * size] and scales [rows]; what is filled up is zero.
template <typename Number>
void pack_table(const Number* table, int8_t* values, float* scales, int64_t rows, int64_t width, int64_t blocks, int64_t strips,
                int64_t size) {
  const int64_t block = size / grokmesh::kStrip;
  for (int64_t row = 0; row < strips * grokmesh::kStrip; row++) {
    const Number* from = table + std::min(row, rows - 1) * width;
    float largest = 0;
    for (int64_t i = 0; i < width; i++) largest = std::max(largest, std::fabs(widened(from[i])));
    const float scale = largest / kTwoPlanes, divisor = scale > 0 ? scale : 1.0f;
    if (row < rows) scales[row] = scale;
    for (int64_t first = 0; first < blocks * block; first += kRun) {
      const int64_t count = row < rows ? std::clamp<int64_t>(width - first, 0, kRun) : 0;
      int8_t* high = values + 2 * ((first / block * strips + row / grokmesh::kStrip) * size +
                                   first % block / kRun * kStripRun) + row % grokmesh::kStrip * kRun;
      int8_t* low = high + kStripRun;
      for (int64_t i = 0; i < count; i++) {
        const int32_t quantized = static_cast<int32_t>(nearest(widened(from[first + i]) / divisor));
        const int32_t upper = (quantized + 128) >> 8;
        high[i] = static_cast<int8_t>(upper);
        low[i] = static_cast<int8_t>(quantized - 256 * upper);
      }
      std::memset(high + count, 0, kRun - count);
      std::memset(low + count, 0, kRun - count);
    }
  }
}

}  // namespace

// weight [count, rows, columns] with `groups` groups of rows -> packed [count, blocks, strips, size]; what is filled up is zero.
extern "C" GROKMESH_CLONES void grokmesh_pack(const int8_t* weight, int8_t* packed, int64_t count, int64_t rows, int64_t columns, int64_t groups,
                              int64_t blocks, int64_t strips, int64_t size) {
  const int64_t depth = rows / groups, block_rows = size / grokmesh::kStrip, group_blocks = blocks / groups;
  alignas(64) uint8_t tile[kTile], other[kTile];
  for (int64_t m = 0; m < count; m++) {
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t end = (b / group_blocks + 1) * depth;
      for (int64_t run = 0; run < block_rows; run += kRun) {
        const int64_t first = b / group_blocks * depth + b % group_blocks * block_rows + run;
        const int64_t valid = std::clamp<int64_t>(end - first, 0, kRun);
        for (int64_t column = 0; column < columns; column += kSide) {
          const int64_t width = std::min(kSide, columns - column);
          const int8_t* from = weight + (m * rows + first) * columns + column;
          if (valid < kRun || width < kSide) std::memset(tile, 0, kTile);
          for (int64_t i = 0; i < valid; i++) {
            __builtin_prefetch(from + i * columns + 2 * kSide);  // so many rows are too many for the processor to foresee
            if (width == kSide) {
              std::memcpy(tile + i * kSide, from + i * columns, kSide);
            } else {
              std::memcpy(tile + i * kSide, from + i * columns, width);
            }
          }
          transpose(tile, other);
          int8_t* to = packed + ((m * blocks + b) * strips + column / grokmesh::kStrip) * size + run * grokmesh::kStrip;
          const int64_t filled = (width + grokmesh::kStrip - 1) / grokmesh::kStrip;
          for (int64_t s = 0; s < filled; s++) std::memcpy(to + s * size, tile + s * kStripRun, kStripRun);
        }
      }
    }
  }
}

// weight [count, rows, columns], and factors [count, factor_groups, columns] bfloat16, of which group_of [rows] says whose is a row's ->
// 4-bit values [count, blocks, strips, size] and scales [count, rows / 128 rounded up, columns] bfloat16 of the products: the largest
// of 128 rows becomes 7; what is filled up is zero. See workers/kernels/int4.py.
extern "C" GROKMESH_CLONES void grokmesh_pack_int4(const int8_t* weight, const uint16_t* factors, const int64_t* group_of, int8_t* packed,
                                                   uint16_t* scales, int64_t count, int64_t rows, int64_t columns, int64_t factor_groups,
                                                   int64_t blocks, int64_t strips, int64_t size) {
  constexpr int64_t kScaled = grokmesh::kScaled;
  const int64_t runs = (rows + kScaled - 1) / kScaled, block_runs = size / kStripRun;
  alignas(64) uint8_t tile[kTile], other[kTile];
  alignas(64) float products[kScaled][kSide];
  if (runs < blocks * block_runs) std::memset(packed, 0, count * blocks * strips * size);
  for (int64_t m = 0; m < count; m++)
    for (int64_t run = 0; run < runs; run++)
      for (int64_t column = 0; column < columns; column += kSide) {
        const int64_t first = run * kScaled, valid = std::min(kScaled, rows - first), width = std::min(kSide, columns - column);
        std::memset(products, 0, sizeof products);
        uint32_t largest[kSide] = {};  // bits, of which those of NaN are larger than all
        for (int64_t i = 0; i < valid; i++) {
          const int8_t* from = weight + (m * rows + first + i) * columns + column;
          const uint16_t* factor = factors + (m * factor_groups + group_of[first + i]) * columns + column;
          for (int64_t c = 0; c < width; c++) {
            const uint32_t bits = rounded_bits(static_cast<float>(from[c]) * widened(factor[c]));
            products[i][c] = from_bits(bits);
            largest[c] = std::max(largest[c], bits & 0x7fffffff);
          }
        }
        float divisors[kSide];
        for (int64_t c = 0; c < kSide; c++) {
          const uint32_t scale = rounded_bits(from_bits(largest[c]) / 7.0f);
          divisors[c] = from_bits(scale) > 0 ? from_bits(scale) : 1.0f;
          if (c < width) scales[(m * runs + run) * columns + column + c] = static_cast<uint16_t>(scale >> 16);
        }
        const auto quantized = [&](int64_t i, int64_t c) {
          return static_cast<int32_t>(std::max(-7.0f, std::min(7.0f, nearest(products[i][c] / divisors[c])))) + 8;
        };
        std::memset(tile, 0, kTile);
        for (int64_t i = 0; i < kSide; i++)
          for (int64_t c = 0; c < width; c++) tile[i * kSide + c] = static_cast<uint8_t>(quantized(i, c) | quantized(i + kSide, c) << 4);
        transpose(tile, other);
        int8_t* to = packed + ((m * blocks + run / block_runs) * strips + column / grokmesh::kStrip) * size + run % block_runs * kStripRun;
        const int64_t filled = (width + grokmesh::kStrip - 1) / grokmesh::kStrip;
        for (int64_t s = 0; s < filled; s++) std::memcpy(to + s * size, tile + s * kStripRun, kStripRun);
      }
}

// table [rows, width], float32 or bfloat16 -> values [blocks, strips, 2 * size] of a matrix of two planes, and scales [rows].
extern "C" void grokmesh_pack_table(const void* table, int8_t* values, float* scales, bool bfloat16, int64_t rows, int64_t width,
                                    int64_t blocks, int64_t strips, int64_t size) {
  if (bfloat16) {
    pack_table(static_cast<const uint16_t*>(table), values, scales, rows, width, blocks, strips, size);
  } else {
    pack_table(static_cast<const float*>(table), values, scales, rows, width, blocks, strips, size);
  }
}
