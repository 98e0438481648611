// Products of 8-bit weights as integers, for AVX-512 with VNNI and VBMI.
//
// A row of x becomes 256 * high + low times a scale a block, both halves int8: 15 bits, so that what is lost is 2^-16 of
// the block's largest value. A weight is round_to_bf16(q * scale), and a scale is m * 2^e with m in [128, 256). The rounded
// product is (q * m + error) * 2^e with an integer error of at most 64 that depends on |q| and m alone: a table look-up.
// So all sums are exact integers within a block, in any order, and only blocks are added as floats:
//   y = sum over blocks of 2^e * scale_x * (m * (256 H + L) + 256 E),  H = q.high, L = q.low, E = error.high
// (error.low is below 2^-17 of the product). A matrix of two planes is the same with m = 256 and its low plane as error;
// weights that are not rounded have no error, and take two products instead of three. Of 4-bit weights a scale holds for a run,
// so runs are added as floats, a lane each.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,fma")
// GCC 12 takes the undefined operands of its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "kernels.h"

namespace grokmesh {
namespace {

constexpr int64_t kPair = 128;    // bytes of 64 prepared values

constexpr int kMostRows = 8;      // of a tile

// Of a block: the scale of x, and what each lane's sum starts from to undo the offsets of the unsigned operands.
struct BlockHeader {
  float scale;
  int32_t start_high, start_low, start_error;
  float offsets[kBlock / kScaled];  // of each run: 8 times the sum of its values, of 4-bit weights
};

struct Tables {
  alignas(64) int8_t error[128][128];  // [m - 128][|q|], plus 64
  Tables() {
    for (int m = 128; m < 256; m++)
      for (int q = 0; q < 128; q++) {
        const int product = q * m;
        int drop = 0;
        while ((product >> drop) >= 256) drop++;
        int kept = product >> drop, rest = product - (kept << drop), half = drop ? 1 << (drop - 1) : 0;
        if (drop && (rest > half || (rest == half && (kept & 1)))) kept++;
        error[m - 128][q] = static_cast<int8_t>(64 + (kept << drop) - product);
      }
  }
};
const Tables tables;

// Of 128 prepared values.
int32_t run_sum(const int8_t* bytes) {
  __m512i high = _mm512_setzero_si512(), low = high;
  for (const int8_t* half : {bytes, bytes + kPair}) {
    high = _mm512_dpbusd_epi32(high, _mm512_set1_epi8(1), _mm512_loadu_si512(half));
    low = _mm512_dpbusd_epi32(low, _mm512_set1_epi8(1), _mm512_loadu_si512(half + 64));
  }
  return _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
}

int64_t prepared_bytes(const Layout& l) { return l.blocks() * 64 + 2 * l.stride(); }

// Headers first, 64 bytes each; then of each 64 values their high bytes and their low bytes.
void prepare(const Layout& l, const float* x, void* prepared) {
  auto* header = static_cast<char*>(prepared);
  auto* bytes = reinterpret_cast<int8_t*>(header + l.blocks() * 64);
  const int64_t padded = l.block();
  for (int64_t g = 0; g < l.groups; g++)
    for (int64_t b = 0; b < l.blocks_per_group(); b++, header += 64) {
      const int64_t from = b * padded;
      const int64_t size = std::clamp<int64_t>(l.depth - from, 0, padded);
      const float* in = x + g * l.depth + from;
      __m512 most = _mm512_setzero_ps();
      __mmask16 unordered = 0;  // the maximum loses them
      for (int64_t k = 0; k < size; k += 16) {
        const __mmask16 mask = size - k >= 16 ? 0xffff : (1u << (size - k)) - 1;
        const __m512 v = _mm512_maskz_loadu_ps(mask, in + k);
        most = _mm512_max_ps(most, _mm512_abs_ps(v));
        unordered |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      }
      const float largest = _mm512_reduce_max_ps(most);
      const bool finite = !unordered && std::isfinite(largest), usable = finite && largest >= 1e-30f;
      const __m512 factor = _mm512_set1_ps(usable ? 32512.0f / largest : 0.0f);
      const __m512i round = _mm512_set1_epi32(128);
      __m512i sum_high = _mm512_setzero_si512(), sum_low = sum_high;
      for (int64_t k = 0; k < padded; k += 16) {
        const __mmask16 mask = size - k >= 16 ? 0xffff : size > k ? (1u << (size - k)) - 1 : 0;
        const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, in + k), factor));
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(v, round), 8);
        const __m512i low = _mm512_sub_epi32(v, _mm512_slli_epi32(high, 8));
        sum_high = _mm512_add_epi32(sum_high, high);
        sum_low = _mm512_add_epi32(sum_low, low);
        int8_t* out = bytes + k / 64 * kPair + k % 64;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 64), _mm512_cvtepi32_epi8(low));
      }
      const int32_t high = _mm512_reduce_add_epi32(sum_high), low = _mm512_reduce_add_epi32(sum_low);
      // A NaN or an infinity in x must not pass for a number.
      const float scale = usable ? largest / 32512.0f : finite ? 0.0f : NAN;
      auto* of_block = reinterpret_cast<BlockHeader*>(header);
      *of_block = {scale, -8 * high, -8 * low, -4 * high, {}};
      if (l.run == kScaled)
        for (int64_t k = 0; k < padded; k += kScaled) of_block->offsets[k / kScaled] = 8.0f * static_cast<float>(run_sum(bytes + 2 * k));
      bytes += 2 * padded;
    }
}

// `kColumns` columns of a strip over a block: 64 values of each column of the strip in turn.
template <int kColumns>
struct Part {
  const int8_t* values;
  int64_t ahead;                  // bytes to what will be wanted soon
  const int8_t* error[kColumns];  // tables, of rounded weights
  float m[kColumns], power[kColumns];
};

template <int kColumns>
Part<kColumns> part(const Matrix& w, int64_t column, int64_t group, const int8_t* values, int64_t ahead) {
  Part<kColumns> p;
  p.values = values;
  p.ahead = ahead;
  for (int c = 0; c < kColumns; c++) {
    const int64_t n = std::min(column + c, w.columns - 1);
    if (w.kind == Kind::kTwoPlanes) {
      p.error[c] = nullptr;
      p.m[c] = 256.0f;
      p.power[c] = static_cast<const float*>(w.scales)[n * w.layout.groups + group];
      continue;
    }
    const uint16_t bits = static_cast<const uint16_t*>(w.scales)[group * w.columns + n];
    const uint32_t unit = static_cast<uint32_t>(bits & 0xff80) << 16;
    std::memcpy(&p.power[c], &unit, 4);
    p.power[c] /= 128.0f;
    p.m[c] = static_cast<float>(128 + (bits & 127));
    p.error[c] = tables.error[bits & 127];
  }
  return p;
}

// The unsigned operands of 64 weights: q + 128, and error + 64 or low + 128.
template <Kind kKind>
inline void decode(const int8_t* at, const __m512i* table, __m512i* values, __m512i* errors) {
  const __m512i q = _mm512_load_si512(at), offset = _mm512_set1_epi8(-128);
  *values = _mm512_xor_si512(q, offset);
  if constexpr (kKind == Kind::kTwoPlanes) {
    *errors = _mm512_xor_si512(_mm512_load_si512(at + 64 * kStrip), offset);
  } else if constexpr (kKind == Kind::kRounded) {
    const __m512i of_size = _mm512_permutex2var_epi8(table[0], _mm512_abs_epi8(q), table[1]);
    *errors = _mm512_mask_sub_epi8(of_size, _mm512_movepi8_mask(q), offset, of_size);  // 64 - error = 128 - (64 + error)
  }
}

// One row's 64 values times those of kColumns columns. In assembler with its loads, as GCC 12 moves loads ahead and then
// spills sums.
template <int kColumns, bool kErrors>
inline void multiply_add(const __m512i* x, const __m512i* values, const __m512i* errors, __m512i* high, __m512i* low, __m512i* error) {
  static_assert(kColumns == 1 || kColumns == 2);
  if constexpr (kColumns == 1 && kErrors) {
    asm("vmovdqa64 %[x], %%zmm31\n vpdpbusd %%zmm31, %[v], %[h]\n vpdpbusd %[y], %[v], %[l]\n vpdpbusd %%zmm31, %[e], %[s]"
        : [h] "+v"(high[0]), [l] "+v"(low[0]), [s] "+v"(error[0])
        : [x] "m"(x[0]), [y] "m"(x[1]), [v] "v"(values[0]), [e] "v"(errors[0])
        : "xmm31");
  } else if constexpr (kColumns == 1) {
    asm("vpdpbusd %[x], %[v], %[h]\n vpdpbusd %[y], %[v], %[l]"
        : [h] "+v"(high[0]), [l] "+v"(low[0])
        : [x] "m"(x[0]), [y] "m"(x[1]), [v] "v"(values[0]));
  } else if constexpr (kErrors) {
    asm("vmovdqa64 %[x], %%zmm31\n vmovdqa64 %[y], %%zmm30\n vpdpbusd %%zmm31, %[v], %[h]\n vpdpbusd %%zmm31, %[w], %[i]\n"
        "vpdpbusd %%zmm30, %[v], %[l]\n vpdpbusd %%zmm30, %[w], %[m]\n vpdpbusd %%zmm31, %[e], %[s]\n vpdpbusd %%zmm31, %[f], %[t]"
        : [h] "+v"(high[0]), [i] "+v"(high[1]), [l] "+v"(low[0]), [m] "+v"(low[1]), [s] "+v"(error[0]), [t] "+v"(error[1])
        : [x] "m"(x[0]), [y] "m"(x[1]), [v] "v"(values[0]), [w] "v"(values[1]), [e] "v"(errors[0]), [f] "v"(errors[1])
        : "xmm30", "xmm31");
  } else {
    asm("vmovdqa64 %[x], %%zmm31\n vmovdqa64 %[y], %%zmm30\n vpdpbusd %%zmm31, %[v], %[h]\n vpdpbusd %%zmm31, %[w], %[i]\n"
        "vpdpbusd %%zmm30, %[v], %[l]\n vpdpbusd %%zmm30, %[w], %[m]"
        : [h] "+v"(high[0]), [i] "+v"(high[1]), [l] "+v"(low[0]), [m] "+v"(low[1])
        : [x] "m"(x[0]), [y] "m"(x[1]), [v] "v"(values[0]), [w] "v"(values[1])
        : "xmm30", "xmm31");
  }
}

// The sums of the lanes of four vectors.
inline __m128 sums(const __m512* v) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Rows of a block beside each other: their headers, and of each 64 values those of all rows in turn.
struct Rows {
  BlockHeader headers[kMostRows];
  float scales[kMostRows];
  alignas(64) int8_t bytes[kMostRows * kBlock / 64 * kPair];
};

// y[kRows][kColumns] and up to three more: the products of kRows rows and kColumns columns over a block of `size` values. All sums live in
// registers, each weight is decoded once, and for each line of weights that is used another is asked for, so that memory
// never rests.
template <int kRows, Kind kKind, int kColumns>
__attribute__((noinline)) void tile(const Part<kColumns>& p, int64_t size, const Rows& rows, float* y) {
  constexpr int kPlanes = kKind == Kind::kTwoPlanes ? 2 : 1, kBeside = std::min(kColumns, 2);
  constexpr bool kErrors = kKind != Kind::kUnrounded;
  __m512i high[kRows][kColumns], low[kRows][kColumns], error[kRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) {
    const BlockHeader& h = rows.headers[r];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; c++) {
      high[r][c] = _mm512_set1_epi32(h.start_high);
      low[r][c] = _mm512_set1_epi32(h.start_low);
      error[r][c] = _mm512_set1_epi32(kKind == Kind::kTwoPlanes ? h.start_high : h.start_error);
    }
  }
  constexpr bool kHeld = kKind == Kind::kRounded && kRows <= 3;  // registers are left for the tables
  __m512i tables[kColumns][2];
  if constexpr (kHeld)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; c++)
      for (int i = 0; i < 2; i++) tables[c][i] = _mm512_load_si512(p.error[c] + 64 * i);
  const auto* x = reinterpret_cast<const __m512i*>(rows.bytes);
  for (int64_t k = 0; k < size; k += 64, x += 2 * kRows) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; c += kBeside) {
      __m512i values[kBeside], errors[kBeside];
#pragma GCC unroll 8
      for (int i = 0; i < kBeside; i++) {
        const int64_t at = kPlanes * kStrip * k + 64 * (c + i);
        _mm_prefetch(p.values + at + p.ahead, _MM_HINT_T1);
        if constexpr (kKind == Kind::kTwoPlanes) _mm_prefetch(p.values + at + p.ahead + 64 * kStrip, _MM_HINT_T1);
        decode<kKind>(p.values + at, kHeld ? tables[c + i] : reinterpret_cast<const __m512i*>(p.error[c + i]), &values[i], &errors[i]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) multiply_add<kBeside, kErrors>(x + 2 * r, values, errors, &high[r][c], &low[r][c], &error[r][c]);
    }
  }
  constexpr int kSums = kRows * kColumns, kPadded = (kSums + 3) / 4 * 4;
  __m512 totals[kPadded];
  float factors[kPadded] = {};
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i++) {
    const int r = i / kColumns, c = i % kColumns;
    const __m512 main = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[r][c], 8), low[r][c]));
    totals[i] = _mm512_mul_ps(main, _mm512_set1_ps(p.m[c]));
    if constexpr (kErrors) totals[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(error[r][c]), _mm512_set1_ps(256.0f), totals[i]);
    factors[i] = rows.scales[r] * p.power[c];
  }
#pragma GCC unroll 8
  for (int i = kSums; i < kPadded; i++) totals[i] = _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int i = 0; i < kPadded; i += 4) _mm_storeu_ps(y + i, _mm_mul_ps(sums(totals + i), _mm_loadu_ps(factors + i)));
}

// Of each run of a block and each column of a strip of 4-bit weights.
struct RunScales {
  float of[kBlock / kScaled + 1][kStrip];  // a row more, so that from any column four can be read
};

RunScales run_scales(const Matrix& w, int64_t block, int64_t column) {
  const int64_t runs = w.layout.block() / kScaled, last = (w.layout.depth - 1) / kScaled, here = w.columns - column;
  RunScales scales;
  for (int64_t i = 0; i < runs; i++) {
    const uint16_t* from = static_cast<const uint16_t*>(w.scales) + std::min(block * runs + i, last) * w.columns + column;
    uint64_t four = 0;
    if (here >= kStrip) {
      std::memcpy(&four, from, 8);
    } else {
      std::memcpy(&four, from, 2 * here);
    }
    _mm_storeu_ps(scales.of[i], _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(four)), 16)));
  }
  return scales;
}

// As `tile`, of 4-bit weights, with the scales of their runs.
template <int kRows, int kColumns>
__attribute__((noinline)) void tile_int4(const int8_t* values, int64_t ahead, int64_t runs, const float* scales, const Rows& rows,
                                         float* y) {
  constexpr int kSums = kRows * kColumns, kPadded = (kSums + 3) / 4 * 4;
  const __m512i low_bits = _mm512_set1_epi8(15);
  __m512 totals[kPadded];
  __m128 offsets[kRows];  // of the first columns
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) offsets[r] = _mm_setzero_ps();
#pragma GCC unroll 16
  for (int i = 0; i < kPadded; i++) totals[i] = _mm512_setzero_ps();
  const auto* x = reinterpret_cast<const __m512i*>(rows.bytes);
  for (int64_t run = 0; run < runs; run++, x += 4 * kRows, values += 64 * kStrip, scales += kStrip) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) {
      _mm_prefetch(values + 64 * c + ahead, _MM_HINT_T1);
      const __m512i pairs = _mm512_load_si512(values + 64 * c);
      const __m512i first = _mm512_and_si512(pairs, low_bits), second = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low_bits);
      const __m512 scale = _mm512_set1_ps(scales[c]);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        const __m512i *of_first = x + 2 * r, *of_second = x + 2 * (kRows + r);
        const __m512i high = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), first, of_first[0]), second, of_second[0]);
        const __m512i sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), first, of_first[1]), second, of_second[1]);
        totals[r * kColumns + c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, totals[r * kColumns + c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) offsets[r] = _mm_fmadd_ps(_mm_set1_ps(rows.headers[r].offsets[run]), _mm_loadu_ps(scales), offsets[r]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kPadded; i += 4) _mm_storeu_ps(y + i, sums(totals + i));
  for (int r = 0; r < kRows; r++)
    for (int c = 0; c < kColumns; c++) y[r * kColumns + c] = (y[r * kColumns + c] - offsets[r][c]) * rows.scales[r];
}

void gather(const Layout& l, int64_t block, const char* x, int64_t x_stride, int64_t rows, Rows* to) {
  const int64_t size = l.block(), start = l.blocks() * 64 + block * 2 * size;
  for (int64_t r = 0; r < rows; r++, x += x_stride) {
    std::memcpy(&to->headers[r], x + block * 64, sizeof(BlockHeader));
    to->scales[r] = to->headers[r].scale;
    for (int64_t i = 0; i < size / 64; i++) std::memcpy(to->bytes + (i * rows + r) * kPair, x + start + i * kPair, kPair);
  }
}

// kRows rows times the columns [first, last) over a block, added to y.
template <int kRows, Kind kKind>
void multiply_block(const Matrix& w, int64_t block, const Rows& rows, int64_t first, int64_t last, float* y, int64_t y_stride) {
  // As many sums as registers hold, with tables or without.
  constexpr int kColumns = kRows == 1 || (kKind == Kind::kInt4 && kRows <= 4) ? 4 : kRows <= 4 ? 2 : 1;
  const int64_t group = block / w.layout.blocks_per_group();
  for (int64_t n = first; n < last; n += kStrip) {
    // Two strips ahead: in this block, in the next one, or in the columns that follow.
    const int64_t valid = std::min(kStrip, last - n), soon = n + 2 * kStrip;
    const int8_t* wanted = soon < last                   ? w.strip(block, soon)
                           : block + 1 < w.layout.blocks() ? w.strip(block + 1, first + soon - last)
                                                           : w.strip(0, soon);
    const int64_t ahead = wanted - w.strip(block, n);
    [[maybe_unused]] RunScales scales;
    if constexpr (kKind == Kind::kInt4) scales = run_scales(w, block, n);
    for (int c = 0; c < kStrip; c += kColumns) {
      float sums[kRows * kColumns + 3];
      const int8_t* values = w.strip(block, n) + 64 * c;
      if constexpr (kKind == Kind::kInt4) {
        tile_int4<kRows, kColumns>(values, ahead, w.layout.block() / kScaled, scales.of[0] + c, rows, sums);
      } else {
        tile<kRows, kKind>(part<kColumns>(w, n + c, group, values, ahead), w.layout.block(), rows, sums);
      }
      const int64_t here = std::min<int64_t>(kColumns, valid - c);
      for (int r = 0; r < kRows; r++)
        for (int i = 0; i < here; i++) y[r * y_stride + n - first + c + i] += sums[r * kColumns + i];
    }
  }
}

template <Kind kKind>
void multiply_kind(const Matrix& w, const char* x, int64_t x_stride, int64_t rows, int64_t first, int64_t last, float* y,
                   int64_t y_stride) {
  static constexpr decltype(&multiply_block<1, kKind>) of_rows[] = {
      multiply_block<1, kKind>, multiply_block<2, kKind>, multiply_block<3, kKind>, multiply_block<4, kKind>,
      multiply_block<5, kKind>, multiply_block<6, kKind>, multiply_block<7, kKind>, multiply_block<8, kKind>};
  static_assert(std::size(of_rows) == kMostRows);
  // Where memory doesn't matter, fewer loads of x for a product do; else all rows at once, so that it never rests.
  const int64_t most = kKind == Kind::kUnrounded && rows > kMostRows ? 4 : kMostRows;
  Rows gathered;
  for (int64_t r = 0; r < rows; r++) std::memset(y + r * y_stride, 0, (last - first) * 4);
  for (int64_t block = 0; block < w.layout.blocks(); block++)
    for (int64_t r = 0; r < rows; r += most) {
      const int64_t count = std::min(most, rows - r);
      gather(w.layout, block, x + r * x_stride, x_stride, count, &gathered);
      of_rows[count - 1](w, block, gathered, first, last, y + r * y_stride, y_stride);
    }
}

void multiply(const Matrix& w, const char* x, int64_t x_stride, int64_t rows, int64_t first, int64_t last, float* y,
              int64_t y_stride) {
  switch (w.kind) {
    case Kind::kRounded: return multiply_kind<Kind::kRounded>(w, x, x_stride, rows, first, last, y, y_stride);
    case Kind::kUnrounded: return multiply_kind<Kind::kUnrounded>(w, x, x_stride, rows, first, last, y, y_stride);
    case Kind::kTwoPlanes: return multiply_kind<Kind::kTwoPlanes>(w, x, x_stride, rows, first, last, y, y_stride);
    case Kind::kInt4: return multiply_kind<Kind::kInt4>(w, x, x_stride, rows, first, last, y, y_stride);
  }
}

}  // namespace

const Kernels& vnni_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512_kernels();
    k.name = "avx512-vnni";
    k.prepared_bytes = prepared_bytes;
    k.prepare = prepare;
    k.multiply = multiply;
    return k;
  }();
  return kernels;
}

}  // namespace grokmesh

#endif  // x86-64
