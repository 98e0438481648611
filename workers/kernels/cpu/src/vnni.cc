// Products of 8-bit weights as integers, for AVX-512 with VNNI and VBMI.
//
// A row of x becomes 256 * high + low times a scale a block, both halves int8: 15 bits, so that what is lost is 2^-16 of
// the block's largest value. A weight is round_to_bf16(q * scale), and a scale is m * 2^e with m in [128, 256). The rounded
// product is (q * m + error) * 2^e with an integer error of at most 64 that depends on |q| and m alone: a table look-up.
// So all sums are exact integers within a block, in any order, and only blocks are added as floats:
//   y = sum over blocks of 2^e * scale_x * (m * (256 H + L) + 256 E),  H = q.high, L = q.low, E = error.high
// (error.low is below 2^-17 of the product). A matrix of two planes is the same with m = 256 and its low plane as error;
// weights that are not rounded have no error, and take two products instead of three.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,fma")
// GCC 12 takes the undefined operands of its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "kernels.h"

namespace grokmesh {
namespace {

constexpr int64_t kAhead = 4096;  // bytes that are asked for before they are needed
constexpr int64_t kBlock = 1024;  // values that share a scale of x; 16 int32 lanes of 64 products each can't overflow

struct Blocks {
  int64_t per_group, count;
  explicit Blocks(const Layout& l) : per_group((l.padded() + kBlock - 1) / kBlock), count(per_group * l.groups) {}
};

// Of a block: the scale of x, and what each lane's sum starts from to undo the offsets of the unsigned operands.
struct BlockHeader {
  float scale;
  int32_t start_high, start_low, start_error;
};

struct Tables {
  alignas(64) int8_t error[128][128];  // [m - 128][|q|]
  Tables() {
    for (int m = 128; m < 256; m++)
      for (int q = 0; q < 128; q++) {
        const int product = q * m;
        int drop = 0;
        while ((product >> drop) >= 256) drop++;
        int kept = product >> drop, rest = product - (kept << drop), half = drop ? 1 << (drop - 1) : 0;
        if (drop && (rest > half || (rest == half && (kept & 1)))) kept++;
        error[m - 128][q] = static_cast<int8_t>((kept << drop) - product);
      }
  }
};
const Tables tables;

int64_t prepared_bytes(const Layout& l) { return Blocks(l).count * 64 + 2 * l.stride(); }

// Headers first, 64 bytes each; then of each block its high bytes and its low bytes.
void prepare(const Layout& l, const float* x, void* prepared) {
  const Blocks blocks(l);
  auto* header = static_cast<char*>(prepared);
  auto* bytes = reinterpret_cast<int8_t*>(header + blocks.count * 64);
  for (int64_t g = 0; g < l.groups; g++)
    for (int64_t b = 0; b < blocks.per_group; b++, header += 64) {
      const int64_t from = b * kBlock, padded = std::min(kBlock, l.padded() - from);
      const int64_t size = std::min(padded, l.depth - from);
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
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + k), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + padded + k), _mm512_cvtepi32_epi8(low));
      }
      const int32_t high = _mm512_reduce_add_epi32(sum_high), low = _mm512_reduce_add_epi32(sum_low);
      // A NaN or an infinity in x must not pass for a number.
      const float scale = usable ? largest / 32512.0f : finite ? 0.0f : NAN;
      *reinterpret_cast<BlockHeader*>(header) = {scale, -8 * high, -8 * low, -4 * high};
      bytes += 2 * padded;
    }
}

// A strip of four columns over a block: 64 values of each in turn.
struct Strip {
  const int8_t* values;
  const int8_t* error[4];  // tables, of rounded weights
  int64_t next;            // bytes to the same place of the next strip
  float m[4], power[4];
};

inline Strip strip(const Matrix& w, int64_t index, int64_t group, int64_t offset) {
  Strip s;
  s.next = w.planes() * kStrip * w.layout.stride();
  s.values = w.values + w.planes() * kStrip * (index * w.layout.stride() + offset);
  for (int c = 0; c < kStrip; c++) {
    const int64_t n = std::min(index * kStrip + c, w.columns - 1);
    if (w.kind == Kind::kTwoPlanes) {
      s.error[c] = nullptr;
      s.m[c] = 256.0f;
      s.power[c] = static_cast<const float*>(w.scales)[n * w.layout.groups + group];
      continue;
    }
    const uint16_t bits = static_cast<const uint16_t*>(w.scales)[group * w.columns + n];
    const uint32_t unit = static_cast<uint32_t>(bits & 0xff80) << 16;
    std::memcpy(&s.power[c], &unit, 4);
    s.power[c] /= 128.0f;
    s.m[c] = static_cast<float>(128 + (bits & 127));
    s.error[c] = tables.error[bits & 127];
  }
  return s;
}

template <Kind kKind>
constexpr int kPlanes = kKind == Kind::kTwoPlanes ? 2 : 1;

// The unsigned operands of 64 weights: q + 128, and error + 64 or low + 128.
template <Kind kKind>
inline void decode(const Strip& s, int64_t k, int c, __m512i* values, __m512i* errors) {
  const int8_t* at = s.values + kPlanes<kKind> * kStrip * k + 64 * c;
  const __m512i q = _mm512_load_si512(at), offset = _mm512_set1_epi8(-128);
  *values = _mm512_xor_si512(q, offset);
  if constexpr (kKind == Kind::kTwoPlanes) {
    *errors = _mm512_xor_si512(_mm512_load_si512(at + 64 * kStrip), offset);
  } else if constexpr (kKind == Kind::kRounded) {
    const __m512i size = _mm512_permutex2var_epi8(_mm512_load_si512(s.error[c]), _mm512_abs_epi8(q),
                                                  _mm512_load_si512(s.error[c] + 64));
    const __m512i center = _mm512_set1_epi8(64);
    *errors = _mm512_mask_sub_epi8(_mm512_add_epi8(center, size), _mm512_movepi8_mask(q), center, size);
  }
}

// _mm512_dpbusd_epi32, as GCC 12 spills accumulators of the intrinsic.
inline void dot(__m512i& sum, __m512i values, const __m512i& x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(values), "vm"(x));
}

enum class Decode { kOnce, kStore, kStored };  // used up at once, kept for other rows, or kept already

// kRows rows times a strip over one block of `size` values, added to totals [kRows][kStrip] of 16 lanes.
template <int kRows, Kind kKind, Decode kDecode>
__attribute__((noinline)) void tile(const Strip& s, int8_t* decoded, int64_t size, const char* const* headers,
                                    const int8_t* const* bytes, __m512* totals) {
  __m512i high[kRows][kStrip], low[kRows][kStrip], error[kRows][kStrip];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) {
    const auto& h = *reinterpret_cast<const BlockHeader*>(headers[r]);
#pragma GCC unroll 8
    for (int c = 0; c < kStrip; c++) {
      high[r][c] = _mm512_set1_epi32(h.start_high);
      low[r][c] = _mm512_set1_epi32(h.start_low);
      error[r][c] = _mm512_set1_epi32(kKind == Kind::kTwoPlanes ? h.start_high : h.start_error);
    }
  }
  for (int64_t k = 0; k < size; k += 64) {
    __m512i x_high[kRows], x_low[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      x_high[r] = _mm512_loadu_si512(bytes[r] + k);
      x_low[r] = _mm512_loadu_si512(bytes[r] + size + k);
    }
#pragma GCC unroll 8
    for (int c = 0; c < kStrip; c++) {
      __m512i values, errors;
      int8_t* kept = decoded + 2 * (kStrip * k + 64 * c);
      if constexpr (kDecode == Decode::kStored) {
        values = _mm512_load_si512(kept);
        if constexpr (kKind != Kind::kUnrounded) errors = _mm512_load_si512(kept + 64);
        // Memory must not rest meanwhile: the next strip comes.
        const int8_t* soon = s.values + s.next + kPlanes<kKind> * kStrip * k + 64 * c;
        _mm_prefetch(soon, _MM_HINT_T1);
        if constexpr (kKind == Kind::kTwoPlanes) _mm_prefetch(soon + 64 * kStrip, _MM_HINT_T1);
      } else {
        const int8_t* soon = s.values + kPlanes<kKind> * kStrip * k + 64 * c + kAhead;
        _mm_prefetch(soon, _MM_HINT_T0);
        if constexpr (kKind == Kind::kTwoPlanes) _mm_prefetch(soon + 64 * kStrip, _MM_HINT_T0);
        decode<kKind>(s, k, c, &values, &errors);
        if constexpr (kDecode == Decode::kStore) {
          _mm512_store_si512(kept, values);
          if constexpr (kKind != Kind::kUnrounded) _mm512_store_si512(kept + 64, errors);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        dot(high[r][c], values, x_high[r]);
        dot(low[r][c], values, x_low[r]);
        if constexpr (kKind != Kind::kUnrounded) dot(error[r][c], errors, x_high[r]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) {
    const float scale = reinterpret_cast<const BlockHeader*>(headers[r])->scale;
#pragma GCC unroll 8
    for (int c = 0; c < kStrip; c++) {
      const float unit = scale * s.power[c];
      const __m512 main = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[r][c], 8), low[r][c]));
      __m512 total = totals[r * kStrip + c];
      total = _mm512_fmadd_ps(main, _mm512_set1_ps(unit * s.m[c]), total);
      if constexpr (kKind != Kind::kUnrounded)
        total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(error[r][c]), _mm512_set1_ps(unit * 256.0f), total);
      totals[r * kStrip + c] = total;
    }
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

// kRows rows times strip `index` over all blocks; `decoded` has room for the strip's whole decoded form unless kOnce.
template <int kRows, Kind kKind, Decode kDecode>
void walk(const Matrix& w, const char* x, int64_t x_stride, int64_t index, int8_t* decoded, float* y, int64_t y_stride, int64_t columns) {
  const Layout& l = w.layout;
  const Blocks blocks(l);
  __m512 totals[kRows * kStrip];
  for (auto& total : totals) total = _mm512_setzero_ps();
  int64_t block = 0;
  for (int64_t g = 0; g < l.groups; g++)
    for (int64_t b = 0; b < blocks.per_group; b++, block++) {
      const int64_t from = b * kBlock, size = std::min(kBlock, l.padded() - from), offset = g * l.padded() + from;
      const char* headers[kRows];
      const int8_t* bytes[kRows];
      for (int r = 0; r < kRows; r++) {
        headers[r] = x + r * x_stride + block * 64;
        bytes[r] = reinterpret_cast<const int8_t*>(x + r * x_stride + blocks.count * 64 + 2 * offset);
      }
      tile<kRows, kKind, kDecode>(strip(w, index, g, offset), decoded + 2 * kStrip * offset, size, headers, bytes, totals);
    }
  for (int r = 0; r < kRows; r++) {
    float four[kStrip];
    _mm_storeu_ps(four, sums(totals + r * kStrip));
    std::memcpy(y + r * y_stride, four, columns * 4);
  }
}

int8_t* decoded_strip(int64_t bytes) {
  thread_local std::unique_ptr<int8_t, void (*)(void*)> buffer(nullptr, std::free);
  thread_local int64_t size = 0;
  if (size < bytes) {
    buffer.reset(static_cast<int8_t*>(std::aligned_alloc(64, bytes)));
    size = bytes;
  }
  return buffer.get();
}

template <Kind kKind>
void multiply_kind(const Matrix& w, const char* x, int64_t x_stride, int64_t rows, int64_t first, int64_t last, float* y,
                     int64_t y_stride) {
  int8_t* decoded = rows > 2 ? decoded_strip(2 * kStrip * w.layout.stride()) : nullptr;
  for (int64_t n = first; n < last; n += kStrip, y += kStrip) {
    const int64_t index = n / kStrip, columns = std::min(kStrip, last - n);
    if (rows == 1) walk<1, kKind, Decode::kOnce>(w, x, x_stride, index, decoded, y, y_stride, columns);
    if (rows == 2) walk<2, kKind, Decode::kOnce>(w, x, x_stride, index, decoded, y, y_stride, columns);
    if (rows <= 2) continue;
    walk<2, kKind, Decode::kStore>(w, x, x_stride, index, decoded, y, y_stride, columns);
    int64_t r = 2;
    for (; r + 2 <= rows; r += 2)
      walk<2, kKind, Decode::kStored>(w, x + r * x_stride, x_stride, index, decoded, y + r * y_stride, y_stride, columns);
    if (r < rows)
      walk<1, kKind, Decode::kStored>(w, x + r * x_stride, x_stride, index, decoded, y + r * y_stride, y_stride, columns);
  }
}

void multiply(const Matrix& w, const char* x, int64_t x_stride, int64_t rows, int64_t first, int64_t last, float* y,
              int64_t y_stride) {
  switch (w.kind) {
    case Kind::kRounded: return multiply_kind<Kind::kRounded>(w, x, x_stride, rows, first, last, y, y_stride);
    case Kind::kUnrounded: return multiply_kind<Kind::kUnrounded>(w, x, x_stride, rows, first, last, y, y_stride);
    case Kind::kTwoPlanes: return multiply_kind<Kind::kTwoPlanes>(w, x, x_stride, rows, first, last, y, y_stride);
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
