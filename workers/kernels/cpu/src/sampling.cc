// From logits to tokens; see workers/kernels/sampling.py.
#include <cmath>
#include <cstring>

#include "ops.h"

namespace grokmesh {
namespace {

constexpr int kCandidates = 64;
constexpr int64_t kRun = 64, kSumRun = 1024;
constexpr int32_t kBiased = 1, kPenalized = 2, kMasked = 4, kGenerated = (1 << 30) - 1;

// The `count` largest of x, the first of equals first, in order.
class Largest {
 public:
  Largest(const float* x, int64_t size, int64_t count) : count_(std::min(count, size)) {
    for (int64_t begin = 0; begin < size; begin += kRun) {
      const int64_t end = std::min(begin + kRun, size);
      if (static_cast<int64_t>(ids.size()) == count_) {
        float most = x[begin];
        for (int64_t i = begin + 1; i < end; i++) most = x[i] > most ? x[i] : most;
        if (!(most > x[ids.back()])) continue;
      }
      for (int64_t i = begin; i < end; i++) {
        if (static_cast<int64_t>(ids.size()) == count_) {
          if (!(x[i] > x[ids.back()])) continue;
          ids.pop_back();
        }
        const auto at = std::upper_bound(ids.begin(), ids.end(), i, [x](int64_t a, int64_t b) { return x[a] > x[b]; });
        ids.insert(at, static_cast<int32_t>(i));
      }
    }
  }
  std::vector<int32_t> ids;

 private:
  int64_t count_;
};

struct Draw {
  float temperature, top_p, min_p, uniform;
  int64_t top_k;
};

// Draws from e^((x - most) / temperature), filtered. `weights` is room for x.
int32_t draw(const float* x, int64_t size, const Draw& d, std::vector<float>& weights) {
  weights.resize(size);
  const float most = *std::max_element(x, x + size);
  std::vector<double> sums;
  double total = 0.0;
  for (int64_t begin = 0; begin < size; begin += kSumRun) {
    const int64_t count = std::min(kSumRun, size - begin);
    total += chosen->exponentials(x + begin, most, 1.0f / d.temperature, weights.data() + begin, count);
    sums.push_back(total);
  }
  if (d.top_p >= 1.0f && d.top_k == 0 && d.min_p == 0.0f) {
    const double target = d.uniform * total;
    const int64_t run = std::min<int64_t>(std::upper_bound(sums.begin(), sums.end(), target) - sums.begin(), sums.size() - 1);
    double sum = run ? sums[run - 1] : 0.0;
    int64_t last = run * kSumRun;
    for (int64_t i = run * kSumRun; i < std::min(size, (run + 1) * kSumRun); i++) {
      if (weights[i] > 0.0f) last = i;
      sum += weights[i];
      if (sum > target) return static_cast<int32_t>(i);
    }
    return static_cast<int32_t>(last);
  }
  // Among the largest kCandidates if they are sure to hold all that is kept, else among all.
  const int64_t most_kept = d.top_k ? d.top_k : size;
  for (int64_t candidates = kCandidates;; candidates = size) {
    Largest largest(weights.data(), size, candidates);
    auto& ids = largest.ids;
    const bool all = static_cast<int64_t>(ids.size()) == size;
    const int64_t limit = std::min<int64_t>(most_kept, ids.size());
    double among = total;
    if (most_kept < size) {
      if (limit < most_kept && !all) continue;
      among = 0.0;
      for (int64_t i = 0; i < limit; i++) among += weights[ids[i]];
    }
    double before = 0.0;
    int64_t kept = 0;
    while (kept < limit && (kept == 0 || (before < d.top_p * among && weights[ids[kept]] >= d.min_p && weights[ids[kept]] > 0.0f)))
      before += weights[ids[kept++]];
    if (kept == static_cast<int64_t>(ids.size()) && kept < most_kept && !all) continue;
    const double target = d.uniform * before;
    double sum = 0.0;
    // Among more than the candidates in the order of the vocabulary, as on platforms where sorting is dear.
    if (candidates > kCandidates) std::sort(ids.begin(), ids.begin() + kept);
    for (int64_t i = 0; i < kept; i++) {
      sum += weights[ids[i]];
      if (sum > target) return ids[i];
    }
    return ids[kept - 1];
  }
}

// What the model makes of a row of logits, and where that is written: `first`, logprob, 8 ids, 8 logprobs as int32 bits.
class Row {
 public:
  Row(const float* x, int64_t size, int64_t width, std::vector<float>& room) : x_(x), alternatives_((width - 2) / 2), top_(x, size, alternatives_) {
    room.resize(size);
    for (int64_t begin = 0; begin < size; begin += kSumRun)
      total_ += chosen->exponentials(x + begin, x[most()], 1.0f, room.data(), std::min(kSumRun, size - begin));
  }
  int32_t most() const { return top_.ids[0]; }
  void write(int32_t first, int64_t token, int32_t* out) const {
    out[0] = first;
    put(out + 1, token);
    for (int64_t i = 0; i < static_cast<int64_t>(top_.ids.size()); i++) {
      out[2 + i] = top_.ids[i];
      put(out + 2 + alternatives_ + i, top_.ids[i]);
    }
  }

 private:
  void put(int32_t* out, int64_t token) const {
    const float logprob = static_cast<float>(static_cast<double>(x_[token]) - x_[most()] - std::log(total_));
    std::memcpy(out, &logprob, 4);
  }
  const float* x_;
  int64_t alternatives_;
  Largest top_;
  double total_ = 0.0;
};

// logits [B, V], floats [B, 7] (temperature, top_p, min_p, repetition, presence, frequency, uniform), ints [B, 4] (slot, active,
// flags, top_k), bias and counts [slots, V], mask [slots, V / 32] -> [B, 18]: token, logprob, 8 ids, 8 logprobs as int32 bits.
ffi::Error sample(ffi::ThreadPool pool, F32 logits, F32 floats, S32 ints, F32 bias, S32 counts, S32 mask,
                  ffi::ResultBuffer<ffi::S32> packed) {
  const int64_t rows = logits.dimensions()[0], size = logits.dimensions()[1], words = mask.dimensions()[1];
  const int64_t width = packed->dimensions()[1];
  std::memset(packed->typed_data(), 0, packed->size_bytes());
  parallel_phases(pool, {rows}, [&](int, int64_t r) {
    const int32_t* whole = ints.typed_data() + r * 4;
    if (!whole[1]) return;
    const float* number = floats.typed_data() + r * 7;
    const float* x = logits.typed_data() + r * size;
    const int64_t slot = whole[0];
    thread_local std::vector<float> changed, room;
    const Row row(x, size, width, room);
    const float* adjusted = x;
    if (const int32_t flags = whole[2]) {
      changed.assign(x, x + size);
      if (flags & kPenalized) {
        const int32_t* seen = counts.typed_data() + slot * size;
        for (int64_t i = 0; i < size; i++) {
          if (!seen[i]) continue;
          changed[i] = changed[i] > 0 ? changed[i] / number[3] : changed[i] * number[3];
          if (const int32_t generated = seen[i] & kGenerated) changed[i] -= number[4] + number[5] * static_cast<float>(generated);
        }
      }
      if (flags & kBiased)
        for (int64_t i = 0; i < size; i++) changed[i] += bias.typed_data()[slot * size + i];
      if (flags & kMasked)
        for (int64_t i = 0; i < size; i++)
          if (!(mask.typed_data()[slot * words + i / 32] >> (i % 32) & 1)) changed[i] = -INFINITY;
      adjusted = changed.data();
    }
    const int32_t token = number[0] > 0.0f ? draw(adjusted, size, {number[0], number[1], number[2], number[6], whole[3]}, room)
                                           : adjusted == x ? row.most() : Largest(adjusted, size, 1).ids[0];
    row.write(token, token, packed->typed_data() + r * width);
  });
  return ffi::Error::Success();
}

// logits [B, V], tokens [B], -1 for rows that are not used -> [B, 18]: as `sample`, with the token's place among all, from 1, in its
// stead.
ffi::Error score(ffi::ThreadPool pool, F32 logits, S32 tokens, ffi::ResultBuffer<ffi::S32> packed) {
  const int64_t rows = logits.dimensions()[0], size = logits.dimensions()[1], width = packed->dimensions()[1];
  std::memset(packed->typed_data(), 0, packed->size_bytes());
  parallel_phases(pool, {rows}, [&](int, int64_t r) {
    const int64_t token = tokens.typed_data()[r];
    if (token < 0) return;
    const float* x = logits.typed_data() + r * size;
    thread_local std::vector<float> room;
    const auto place = 1 + std::count_if(x, x + size, [&](float other) { return other > x[token]; });
    Row(x, size, width, room).write(static_cast<int32_t>(place), token, packed->typed_data() + r * width);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace grokmesh

XLA_FFI_DEFINE_HANDLER_SYMBOL(grokmesh_sample, grokmesh::sample,
                              BIND.Arg<grokmesh::F32>().Arg<grokmesh::F32>().Arg<grokmesh::S32>().Arg<grokmesh::F32>().Arg<grokmesh::S32>()
                                  .Arg<grokmesh::S32>().Ret<ffi::Buffer<ffi::S32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(grokmesh_score, grokmesh::score,
                              BIND.Arg<grokmesh::F32>().Arg<grokmesh::S32>().Ret<ffi::Buffer<ffi::S32>>());
