// What each instruction set implements. See vector.inc (any machine, by the compiler's vectors) and vnni.cc (AVX-512).
#pragma once
#include <cstddef>
#include <cstdint>

namespace grokmesh {

constexpr int64_t kStrip = 4;     // columns of a packed weight that lie side by side
constexpr int64_t kBlock = 1024;  // at most as many values of a column are a block
constexpr int64_t kScaled = 128;  // 4-bit values of a column that share a scale

// A column of a packed weight has `groups` groups of `depth` int8 values, each cut into equal blocks, filled up with zeros.
// The weight is a block of all columns after another; a block is made of strips of four columns (the last one filled up
// with zeros); of a strip, 64 values of each column follow each other in turn. So who multiplies many columns with a block
// of x that stays in cache reads memory in order. As in workers/kernels/packing.py.
// 4-bit values are one group, in runs of 128: 64 bytes with the first half in their low bits, the second in their high ones.
struct Layout {
  int64_t groups, depth, run = 64;
  int64_t blocks_per_group() const { return (depth + kBlock - 1) / kBlock; }
  int64_t block() const {
    const int64_t runs = (depth + run - 1) / run;
    return (runs + blocks_per_group() - 1) / blocks_per_group() * run;
  }
  int64_t blocks() const { return groups * blocks_per_group(); }
  int64_t stride() const { return blocks() * block(); }
};

enum class Kind { kRounded, kUnrounded, kTwoPlanes, kInt4 };

// A matrix as the products read it.
//   kRounded: value = round_to_bf16(q * scale), scale bfloat16 [groups, columns].
//   kUnrounded: value = q * scale.
//   kTwoPlanes: value = (256 * high + low) * scale, scale float32 [columns, groups]; each run of 4 * 64 values of
//     the high plane is followed by that of the low plane.
//   kInt4: value = (q - 8) * scale, scale bfloat16 [runs, columns].
struct Matrix {
  const int8_t* values;
  const void* scales;
  int64_t columns;
  Kind kind;
  Layout layout;
  int planes() const { return kind == Kind::kTwoPlanes ? 2 : 1; }
  int64_t strip_bytes() const { return planes() * kStrip * layout.block() * 64 / layout.run; }
  // The strip of a column, a multiple of 4, in a block.
  const int8_t* strip(int64_t block, int64_t column) const {
    return values + (block * ((columns + kStrip - 1) / kStrip) + column / kStrip) * strip_bytes();
  }
};

enum class PageType { kFloat32, kBfloat16 };

// Keys of a head in a page are [size, page], values [page, size].
struct Pages {
  void* keys;
  void* values;
  int64_t heads, page, size;
  PageType type;
};

// One sequence's stretch of attention: `rows` queries of `group` heads each, all over positions [first, last).
struct Stretch {
  const float* const* queries;  // of each position: [group, size], rotated and scaled
  const int32_t* positions;     // of each query
  const int32_t* table;
  int64_t rows, group, head, first, last;
  float* weighted;  // [rows * group, size], added to
  float* total;     // [rows * group], added to
  float* scratch;   // attend_scratch() floats
};

struct Kernels {
  const char* name;
  // Bytes of one prepared row, and the preparation of x [groups * depth].
  int64_t (*prepared_bytes)(const Layout&);
  void (*prepare)(const Layout&, const float* x, void* prepared);
  // y[r * y_stride + n - first] = x_r . column n, for columns [first, last), first a multiple of 4. A row's result depends on that row alone.
  void (*multiply)(const Matrix&, const char* prepared, int64_t prepared_stride, int64_t rows, int64_t first,
                   int64_t last, float* y, int64_t y_stride);
  void (*attend)(const Pages&, const Stretch&, float cap);
  void (*norm)(const float* x, const float* scale, float epsilon, float* y, int64_t size);
  void (*gated)(const float* gate, const float* up, float* y, int64_t size);  // gelu(gate) * up
  // softmax over `experts` of x [size] . weight [size, experts]
  void (*route)(const float* x, const float* weight, int64_t size, int64_t experts, float* probabilities);
  // y[i] = exp(x[i] - shift); returns the sum
  float (*exponentials)(const float* x, float shift, float factor, float* y, int64_t size);
};

constexpr int64_t kTile = 32;       // positions of one turn of attention
constexpr int64_t kQueries = 16;    // queries that share a tile
constexpr int64_t kSegment = 1024;  // positions summed before they join the total; tasks may split here
inline int64_t attend_scratch(int64_t size, int64_t group) {
  return (2 * size + kQueries * group) * kTile + kQueries * group * size;
}

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& vnni_kernels();  // those of avx512, with products of integers

}  // namespace grokmesh
