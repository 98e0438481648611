// The operations as XLA calls them: shapes, tasks and the choice of an instruction set.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <string_view>

#include "ops.h"

namespace grokmesh {
namespace {

const Kernels* best_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) return &vnni_kernels();
    return &avx512_kernels();
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2_kernels();
#endif
  return &portable_kernels();
}

}  // namespace

const Kernels* chosen = best_kernels();
int64_t devices = 1;

namespace {

ffi::Error misfit(const char* what) { return ffi::Error::InvalidArgument(std::string("shapes of ") + what + " do not fit"); }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::vector<int64_t> valid_rows(const Mask& valid) {
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < static_cast<int64_t>(valid.element_count()); r++)
    if (valid.typed_data()[r]) rows.push_back(r);
  return rows;
}

// Zeros for the rows of y [.., columns] that are not valid.
void clear_invalid(const Mask& valid, int64_t columns, float* y) {
  for (int64_t r = 0; r < static_cast<int64_t>(valid.element_count()); r++)
    if (!valid.typed_data()[r]) std::memset(y + r * columns, 0, columns * 4);
}

// Memory for the prepared form of rows, each at a multiple of 64 bytes.
class Prepared {
 public:
  Prepared(const Layout& layout, int64_t rows)
      : layout_(layout), stride_(ceil_div(chosen->prepared_bytes(layout), 64) * 64),
        data_(static_cast<char*>(std::aligned_alloc(64, std::max<int64_t>(rows, 1) * stride_)), std::free) {}
  void row(int64_t i, const float* x) const { chosen->prepare(layout_, x, data_.get() + i * stride_); }
  const char* at(int64_t i) const { return data_.get() + i * stride_; }
  int64_t stride() const { return stride_; }

 private:
  Layout layout_;
  int64_t stride_;
  std::shared_ptr<char> data_;
};

int64_t strips(int64_t columns) { return ceil_div(columns, kStrip); }

// values [L, ..., blocks, strips, bytes of a strip], scales [L, ..., G, N] of all layers' weights with `rows` rows, in a form that
// workers/kernels/packed.py names.
struct Packed {
  const int8_t* values;
  const char* scales;
  int64_t columns, groups;
  Kind kind;
  Layout layout;
  bool fits;
  Packed(const S8& w, const BF16& s, int64_t rows, std::string_view form)
      : values(w.typed_data()), scales(static_cast<const char*>(s.untyped_data())),
        kind(form == "int4" ? Kind::kInt4 : form == "rounded" ? Kind::kRounded : Kind::kUnrounded) {
    const auto w_dims = w.dimensions(), s_dims = s.dimensions();
    columns = s_dims.back();
    groups = s_dims[s_dims.size() - 2];
    if (kind == Kind::kInt4) {
      layout = {1, rows, kScaled};
    } else {
      layout = {groups, rows / groups};
    }
    fits = w_dims.back() == at(0).strip_bytes() && w_dims[w_dims.size() - 2] == strips(columns) &&
           w_dims[w_dims.size() - 3] == layout.blocks() &&
           (kind == Kind::kInt4 ? groups == ceil_div(rows, kScaled) : layout.depth * groups == rows);
  }
  Matrix at(int64_t i) const {
    Matrix matrix{values, scales + i * groups * columns * 2, columns, kind, layout};
    matrix.values += i * layout.blocks() * strips(columns) * matrix.strip_bytes();
    return matrix;
  }
};

// Columns of a task, so that each thread has several tasks, and a task is worth its while.
int64_t columns_per_task(int64_t columns, int64_t threads) {
  return std::clamp<int64_t>(ceil_div(ceil_div(columns, threads * 8), 8) * 8, 8, 128);
}

// x [M, D] -> norm(x) * scale, added to a residual [M, D] if there is one. Rows that are not valid give zeros.
ffi::Error norm(ffi::ThreadPool pool, F32 x, Mask valid, F32 scale, float epsilon, ffi::RemainingArgs more, Result y) {
  const int64_t size = scale.element_count(), rows = x.element_count() / size;
  const float* residual = nullptr;
  if (more.size()) {
    auto given = more.get<F32>(0);
    if (!given) return misfit("the residual");
    residual = given->typed_data();
  }
  parallel_phases(pool, {ceil_div(rows, 16)}, [&](int, int64_t task) {
    for (int64_t r = task * 16; r < std::min(rows, task * 16 + 16); r++) {
      float* out = y->typed_data() + r * size;
      if (!valid.typed_data()[r]) {
        std::memset(out, 0, size * 4);
        continue;
      }
      chosen->norm(x.typed_data() + r * size, scale.typed_data(), epsilon, out, size);
      if (residual)
        for (int64_t i = 0; i < size; i++) out[i] += residual[r * size + i];
    }
  });
  return ffi::Error::Success();
}

// x [M, D], weight [D, E] -> probabilities [M, E], gates [M, S], experts [M, S]: the largest, the first of equals.
ffi::Error route(ffi::ThreadPool pool, F32 x, Mask valid, F32 weight, Result probabilities, Result gates, ffi::ResultBuffer<ffi::S32> experts) {
  const int64_t rows = x.dimensions()[0], size = x.dimensions()[1], count = weight.dimensions()[1], selected = gates->dimensions()[1];
  parallel_phases(pool, {ceil_div(rows, 16)}, [&](int, int64_t task) {
    for (int64_t r = task * 16; r < std::min(rows, task * 16 + 16); r++) {
      float* p = probabilities->typed_data() + r * count;
      if (!valid.typed_data()[r]) {
        std::memset(p, 0, count * 4);
        std::memset(gates->typed_data() + r * selected, 0, selected * 4);
        std::memset(experts->typed_data() + r * selected, 0, selected * 4);
        continue;
      }
      chosen->route(x.typed_data() + r * size, weight.typed_data(), size, count, p);
      std::vector<bool> taken(count);
      for (int64_t s = 0; s < selected; s++) {
        int64_t best = -1;
        for (int64_t e = 0; e < count; e++)
          if (!taken[e] && (best < 0 || p[e] > p[best])) best = e;
        taken[best] = true;
        gates->typed_data()[r * selected + s] = p[best];
        experts->typed_data()[r * selected + s] = static_cast<int32_t>(best);
      }
    }
  });
  return ffi::Error::Success();
}

// Multiplies prepared rows with columns [first, last) of a matrix; rows go to `rows[i]` of y [.., columns].
void multiply_to_rows(const Matrix& w, const Prepared& x, const std::vector<int64_t>& rows, int64_t first, int64_t last, float* y) {
  const int64_t width = last - first, count = rows.size();
  std::vector<float> block(count * width);
  chosen->multiply(w, x.at(0), x.stride(), count, first, last, block.data(), width);
  for (int64_t i = 0; i < count; i++) std::memcpy(y + rows[i] * w.columns + first, block.data() + i * width, width * 4);
}

// x [M, K] times one layer's matrices of several weights of as many groups; rows that are not valid give zeros.
ffi::Error dense(ffi::ThreadPool pool, F32 x, Mask valid, S32 layer, std::string_view form, ffi::RemainingArgs weights, ffi::RemainingRets results) {
  const int64_t depth = x.dimensions().back();
  const std::vector<int64_t> rows = valid_rows(valid);
  std::vector<Packed> packed;
  std::vector<float*> out;
  for (size_t i = 0; i < results.size(); i++) {
    auto w = weights.get<S8>(2 * i);
    auto s = weights.get<BF16>(2 * i + 1);
    auto y = results.get<F32>(i);
    if (!w || !s || !y) return misfit("a weight");
    packed.emplace_back(*w, *s, depth, form);
    out.push_back((*y)->typed_data());
    if (!packed.back().fits) return misfit("a weight");
  }
  int64_t columns = 0;
  for (const Packed& p : packed) columns += p.columns;
  const int64_t per_task = columns_per_task(columns, pool.num_threads());
  std::vector<std::pair<size_t, int64_t>> tasks;
  for (size_t i = 0; i < packed.size(); i++)
    for (int64_t n = 0; n < packed[i].columns; n += per_task) tasks.emplace_back(i, n);
  const Prepared prepared(packed[0].layout, rows.size());
  for (const Packed& p : packed)
    if (p.groups != packed[0].groups) return misfit("the weights' groups");
  parallel_phases(pool, {ceil_div(rows.size(), 8), static_cast<int64_t>(rows.empty() ? 0 : tasks.size())},
                  [&](int phase, int64_t task) {
                    if (phase == 0) {
                      for (int64_t r = task * 8; r < std::min<int64_t>(rows.size(), task * 8 + 8); r++)
                        prepared.row(r, x.typed_data() + rows[r] * depth);
                      return;
                    }
                    const auto [i, n] = tasks[task];
                    multiply_to_rows(packed[i].at(layer.typed_data()[0]), prepared, rows, n, std::min(n + per_task, packed[i].columns), out[i]);
                  });
  for (size_t i = 0; i < packed.size(); i++) clear_invalid(valid, packed[i].columns, out[i]);
  return ffi::Error::Success();
}

// x [M, D] times a table of two planes [blocks, strips, 2 * 4 * block] with scales [V, 1] -> [M, V]; rows that are not valid give zeros.
ffi::Error logits(ffi::ThreadPool pool, F32 x, Mask valid, S8 table, F32 scales, Result y) {
  const int64_t depth = x.dimensions().back(), columns = scales.dimensions()[0];
  const Layout layout{1, depth};
  const auto dims = table.dimensions();
  if (dims[0] != layout.blocks() || dims[1] != strips(columns) || dims[2] != 2 * kStrip * layout.block()) return misfit("the table");
  const Matrix matrix{table.typed_data(), scales.untyped_data(), columns, Kind::kTwoPlanes, layout};
  const std::vector<int64_t> rows = valid_rows(valid);
  const int64_t per_task = columns_per_task(columns, pool.num_threads());
  const Prepared prepared(layout, rows.size());
  parallel_phases(pool, {ceil_div(rows.size(), 8), rows.empty() ? 0 : ceil_div(columns, per_task)}, [&](int phase, int64_t task) {
    if (phase == 0) {
      for (int64_t r = task * 8; r < std::min<int64_t>(rows.size(), task * 8 + 8); r++) prepared.row(r, x.typed_data() + rows[r] * depth);
      return;
    }
    const int64_t first = task * per_task, last = std::min(first + per_task, columns);
    multiply_to_rows(matrix, prepared, rows, first, last, y->typed_data());
  });
  clear_invalid(valid, columns, y->typed_data());
  return ffi::Error::Success();
}

// One layer's mixture of experts: x [M, D] -> [M, D]. Weights are [L, E, ...].
ffi::Error experts(ffi::ThreadPool pool, F32 x, F32 gates, S32 chosen_experts, Mask valid, S32 layer, S8 gate_w, BF16 gate_s, S8 up_w,
                   BF16 up_s, S8 down_w, BF16 down_s, std::string_view form, Result y) {
  const int64_t rows = x.dimensions()[0], size = x.dimensions()[1], selected = gates.dimensions()[1];
  const int64_t count = gate_w.dimensions()[1], hidden = gate_s.dimensions().back(), first = layer.typed_data()[0] * count;
  const Packed gate(gate_w, gate_s, size, form), up(up_w, up_s, size, form), down(down_w, down_s, hidden, form);
  if (!gate.fits || !up.fits || !down.fits || gate.groups != up.groups) return misfit("the experts");
  // Places sorted by expert; an expert's rows keep their order.
  std::vector<std::vector<int64_t>> places(count);
  for (int64_t i = 0; i < rows * selected; i++) {
    const int64_t e = chosen_experts.typed_data()[i];
    if (valid.typed_data()[i / selected] && 0 <= e && e < count) places[e].push_back(i);
  }
  struct Group {
    int64_t expert, begin, count;
  };
  std::vector<Group> groups;
  std::vector<int64_t> sorted, position(rows * selected, -1);
  for (int64_t e = 0; e < count; e++) {
    if (places[e].empty()) continue;
    groups.push_back({e, static_cast<int64_t>(sorted.size()), static_cast<int64_t>(places[e].size())});
    for (int64_t i : places[e]) {
      position[i] = sorted.size();
      sorted.push_back(i);
    }
  }
  const int64_t total = sorted.size(), threads = pool.num_threads(), active = groups.size();
  const Prepared inputs(gate.layout, total), middles(down.layout, total);
  std::unique_ptr<float[]> middle(new float[total * hidden]), result(new float[total * size]);
  const int64_t wide = columns_per_task(hidden * active, threads), narrow = columns_per_task(size * active, threads);
  const int64_t wide_tasks = ceil_div(hidden, wide), narrow_tasks = ceil_div(size, narrow);
  parallel_phases(
      pool,
      {ceil_div(total, 8), active * wide_tasks, ceil_div(total, 2), active * narrow_tasks, ceil_div(rows, 16)},
      [&](int phase, int64_t task) {
        if (phase == 0) {
          for (int64_t i = task * 8; i < std::min(total, task * 8 + 8); i++)
            inputs.row(i, x.typed_data() + sorted[i] / selected * size);
        } else if (phase == 1) {
          const Group& g = groups[task / wide_tasks];
          const int64_t n = task % wide_tasks * wide, width = std::min(wide, hidden - n);
          std::vector<float> blocks(2 * g.count * width);
          float *gated = blocks.data(), *lifted = gated + g.count * width;
          chosen->multiply(gate.at(first + g.expert), inputs.at(g.begin), inputs.stride(), g.count, n, n + width, gated, width);
          chosen->multiply(up.at(first + g.expert), inputs.at(g.begin), inputs.stride(), g.count, n, n + width, lifted, width);
          for (int64_t r = 0; r < g.count; r++)
            chosen->gated(gated + r * width, lifted + r * width, middle.get() + (g.begin + r) * hidden + n, width);
        } else if (phase == 2) {
          for (int64_t i = task * 2; i < std::min(total, task * 2 + 2); i++) middles.row(i, middle.get() + i * hidden);
        } else if (phase == 3) {
          const Group& g = groups[task / narrow_tasks];
          const int64_t n = task % narrow_tasks * narrow, last = std::min(n + narrow, size);
          chosen->multiply(down.at(first + g.expert), middles.at(g.begin), middles.stride(), g.count, n, last,
                           result.get() + g.begin * size + n, size);
        } else {
          for (int64_t r = task * 16; r < std::min(rows, task * 16 + 16); r++) {
            float* out = y->typed_data() + r * size;
            std::memset(out, 0, size * 4);
            for (int64_t s = 0; s < selected; s++) {
              const int64_t at = position[r * selected + s];
              if (at < 0) continue;
              const float weight = gates.typed_data()[r * selected + s];
              const float* in = result.get() + at * size;
              for (int64_t d = 0; d < size; d++) out[d] += weight * in[d];
            }
          }
        }
      });
  return ffi::Error::Success();
}

// cos and sin of position * base^(-2 i / size) [positions][size], grown as positions come.
class Rotations {
 public:
  static std::shared_ptr<const std::vector<float>> get(int64_t size, float base, int64_t positions) {
    static std::mutex mutex;
    struct Known {
      int64_t size;
      float base;
      std::shared_ptr<const std::vector<float>> table;
    };
    static std::vector<Known> tables;
    std::lock_guard<std::mutex> lock(mutex);
    for (const Known& known : tables)
      if (known.size == size && known.base == base && static_cast<int64_t>(known.table->size()) >= positions * size) return known.table;
    const int64_t rows = std::max<int64_t>(1024, 2 * positions);
    auto table = std::make_shared<std::vector<float>>(rows * size);
    for (int64_t i = 0; i < size / 2; i++) {
      const float frequency = 1.0f / std::pow(base, static_cast<float>(2 * i) / static_cast<float>(size));
      for (int64_t p = 0; p < rows; p++) {
        const float angle = static_cast<float>(p) * frequency;
        (*table)[p * size + i] = std::cos(angle);
        (*table)[p * size + size / 2 + i] = std::sin(angle);
      }
    }
    tables.push_back({size, base, table});
    return table;
  }
};

void rotate(const float* x, const float* table, int64_t size, float factor, float* y) {
  const int64_t half = size / 2;
  const float *cosine = table, *sine = table + half;
  for (int64_t i = 0; i < half; i++) {
    y[i] = (x[i] * cosine[i] - x[half + i] * sine[i]) * factor;
    y[half + i] = (x[half + i] * cosine[i] + x[i] * sine[i]) * factor;
  }
}

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::isnan(x) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// See workers/kernels/xla/paged_attention.py. Pages are updated in place: results alias the arguments.
ffi::Error attend(ffi::ThreadPool pool, F32 q, F32 k, F32 v, ffi::AnyBuffer, ffi::AnyBuffer, S32 table, S32 positions, float scale,
                  float cap, float rope_base, Result y, ffi::Result<ffi::AnyBuffer> key_pages, ffi::Result<ffi::AnyBuffer> value_pages) {
  const int64_t batch = q.dimensions()[0], length = q.dimensions()[1], heads = q.dimensions()[2], size = q.dimensions()[3];
  const int64_t kv_heads = k.dimensions()[2], group = heads / kv_heads, page = value_pages->dimensions()[2], width = table.dimensions()[1];
  const bool narrow = key_pages->element_type() == ffi::BF16;
  const Pages pages{key_pages->untyped_data(), value_pages->untyped_data(), kv_heads, page, size,
                    narrow ? PageType::kBfloat16 : PageType::kFloat32};
  const int32_t* at = positions.typed_data();
  int64_t most = 0;
  for (int64_t i = 0; i < batch * length; i++) most = std::max<int64_t>(most, at[i] + 1);
  if (most > width * page) return misfit("positions and pages");
  const auto rotations = Rotations::get(size, rope_base, most);
  std::unique_ptr<float[]> turned(new float[batch * length * heads * size]);

  struct Part {  // queries [begin, begin + count) of a sequence and one head, over positions [first, last)
    int64_t sequence, begin, count, head, first, last, result;
  };
  struct Query {  // what becomes of a head's queries: the sum of consecutive parts
    int64_t sequence, begin, count, head, part, parts;
  };
  std::vector<Part> parts;
  std::vector<Query> queries;
  int64_t results = 0;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t t = 0; t < length; t += kQueries) {
      const int64_t count = std::min(kQueries, length - t);
      int64_t last = 0;
      for (int64_t i = t; i < t + count; i++) last = std::max<int64_t>(last, at[b * length + i] + 1);
      if (last == 0) continue;
      // One query's segments are tasks of their own; a block's are not, as there are blocks enough.
      const int64_t span = length == 1 ? kSegment : last;
      for (int64_t h = 0; h < kv_heads; h++) {
        queries.push_back({b, t, count, h, static_cast<int64_t>(parts.size()), ceil_div(last, span)});
        for (int64_t first = 0; first < last; first += span) {
          parts.push_back({b, t, count, h, first, std::min(first + span, last), results});
          results += count * group;
        }
      }
    }
  std::unique_ptr<float[]> weighted(new float[results * size]()), totals(new float[results]());
  std::memset(y->typed_data(), 0, y->size_bytes());
  const int64_t rows = batch * length;
  parallel_phases(
      pool, {ceil_div(rows, 8), static_cast<int64_t>(parts.size()), ceil_div(queries.size(), 4)}, [&](int phase, int64_t task) {
        if (phase == 0) {
          std::vector<float> key(size);
          for (int64_t r = task * 8; r < std::min(rows, task * 8 + 8); r++) {
            if (at[r] < 0) continue;
            const float* turn = rotations->data() + at[r] * size;
            for (int64_t h = 0; h < heads; h++)
              rotate(q.typed_data() + (r * heads + h) * size, turn, size, scale, turned.get() + (r * heads + h) * size);
            const int64_t owner = table.typed_data()[r / length * width + at[r] / page], place = at[r] % page;
            for (int64_t h = 0; h < kv_heads; h++) {
              rotate(k.typed_data() + (r * kv_heads + h) * size, turn, size, 1.0f, key.data());
              const float* value = v.typed_data() + (r * kv_heads + h) * size;
              const int64_t base = (owner * kv_heads + h) * page * size;
              if (narrow) {
                auto *keys = static_cast<uint16_t*>(pages.keys) + base, *values = static_cast<uint16_t*>(pages.values) + base;
                for (int64_t d = 0; d < size; d++) keys[d * page + place] = to_bfloat16(key[d]);
                for (int64_t d = 0; d < size; d++) values[place * size + d] = to_bfloat16(value[d]);
              } else {
                auto *keys = static_cast<float*>(pages.keys) + base, *values = static_cast<float*>(pages.values) + base;
                for (int64_t d = 0; d < size; d++) keys[d * page + place] = key[d];
                std::memcpy(values + place * size, value, size * 4);
              }
            }
          }
        } else if (phase == 1) {
          const Part& p = parts[task];
          const int64_t r = p.sequence * length + p.begin;
          std::vector<const float*> of(p.count);
          for (int64_t i = 0; i < p.count; i++) of[i] = turned.get() + ((r + i) * heads + p.head * group) * size;
          thread_local std::vector<float> scratch;
          scratch.resize(attend_scratch(size, group));
          chosen->attend(pages,
                         {of.data(), at + r, table.typed_data() + p.sequence * width, p.count, group, p.head, p.first, p.last,
                          weighted.get() + p.result * size, totals.get() + p.result, scratch.data()},
                         cap);
        } else {
          for (int64_t i = task * 4; i < std::min<int64_t>(queries.size(), task * 4 + 4); i++) {
            const Query& u = queries[i];
            const int64_t rows = u.count * group, begin = parts[u.part].result;
            for (int64_t j = 1; j < u.parts; j++)
              for (int64_t n = 0; n < rows; n++) {
                totals[begin + n] += totals[begin + j * rows + n];
                for (int64_t d = 0; d < size; d++) weighted[(begin + n) * size + d] += weighted[(begin + j * rows + n) * size + d];
              }
            for (int64_t n = 0; n < rows; n++) {
              const int64_t r = u.sequence * length + u.begin + n / group;
              if (at[r] < 0) continue;
              float* out = y->typed_data() + (r * heads + u.head * group + n % group) * size;
              for (int64_t d = 0; d < size; d++) out[d] = weighted[(begin + n) * size + d] / totals[begin + n];
            }
          }
        }
      });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace grokmesh

// The instruction set in use, and a choice of another by name (for tests); false if this machine lacks it.
extern "C" const char* grokmesh_instruction_set() { return grokmesh::chosen->name; }
extern "C" void grokmesh_share(int64_t devices) { grokmesh::devices = devices; }
extern "C" bool grokmesh_use(const char* name) {
  using namespace grokmesh;
  const Kernels* best = best_kernels();
  #if defined(__x86_64__)
  const std::vector<const Kernels*> known{&portable_kernels(), &avx2_kernels(), &avx512_kernels(), &vnni_kernels()};
#else
  const std::vector<const Kernels*> known{&portable_kernels()};
#endif
  for (const Kernels* kernels : known) {
    if (std::string(name) == kernels->name) {
      chosen = kernels;
      return true;
    }
    if (kernels == best) return false;
  }
  return false;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(grokmesh_norm, grokmesh::norm, BIND.Arg<grokmesh::F32>().Arg<grokmesh::Mask>().Arg<grokmesh::F32>().Attr<float>("epsilon").RemainingArgs().Ret<grokmesh::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(grokmesh_route, grokmesh::route,
                              BIND.Arg<grokmesh::F32>().Arg<grokmesh::Mask>().Arg<grokmesh::F32>().Ret<grokmesh::F32>().Ret<grokmesh::F32>().Ret<grokmesh::S32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(grokmesh_dense, grokmesh::dense, BIND.Arg<grokmesh::F32>().Arg<grokmesh::Mask>().Arg<grokmesh::S32>().Attr<std::string_view>("form").RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(grokmesh_logits, grokmesh::logits,
                              BIND.Arg<grokmesh::F32>().Arg<grokmesh::Mask>().Arg<grokmesh::S8>().Arg<grokmesh::F32>().Ret<grokmesh::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(grokmesh_experts, grokmesh::experts,
                              BIND.Arg<grokmesh::F32>().Arg<grokmesh::F32>().Arg<grokmesh::S32>().Arg<grokmesh::Mask>().Arg<grokmesh::S32>()
                                  .Arg<grokmesh::S8>().Arg<grokmesh::BF16>().Arg<grokmesh::S8>().Arg<grokmesh::BF16>()
                                  .Arg<grokmesh::S8>().Arg<grokmesh::BF16>().Attr<std::string_view>("form").Ret<grokmesh::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(grokmesh_attend, grokmesh::attend,
                              BIND.Arg<grokmesh::F32>().Arg<grokmesh::F32>().Arg<grokmesh::F32>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                                  .Arg<grokmesh::S32>().Arg<grokmesh::S32>().Attr<float>("scale").Attr<float>("cap").Attr<float>("rope_base")
                                  .Ret<grokmesh::F32>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
