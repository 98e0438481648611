// What crosses between the devices of a mesh. Sums add the ranks in their order, so that their bits depend on nothing else.
#include <cstring>

#include "ops.h"
#include "transport.h"

namespace grokmesh {
namespace {

using Bytes = std::pair<int64_t, int64_t>;

constexpr int64_t kSmall = 32 << 10;  // bytes that each rank adds up by itself; of more, it adds a part for all
constexpr int64_t kLane = 64;         // bytes; parts begin at multiples

ffi::Error broken(Mesh& mesh) { return ffi::Error(ffi::ErrorCode::kUnavailable, "a host of the mesh is lost: " + mesh.why_broken()); }

// A rank's exchanges at a site, one after the other.
class Exchange {
 public:
  Exchange(Mesh& mesh, int64_t site, int64_t rank, const Group& group) : mesh_(mesh), site_(site), rank_(rank), group_(group) {}

  int64_t place() const { return group_.place(rank_); }
  char* begin() { return mesh_.piece(site_, rank_, number_ = mesh_.next(site_, rank_)); }
  // Makes what was written known, and waits for the others'. See Mesh::publish.
  template <typename Range>
  bool complete(Range range) {
    if (!mesh_.publish(site_, rank_, number_, group_, range)) return false;
    for (int64_t i = 0; i < group_.size; i++)
      if (!mesh_.wait(site_, at(i), number_)) return false;
    return true;
  }
  const char* of(int64_t place) const { return mesh_.piece(site_, at(place), number_); }

 private:
  int64_t at(int64_t place) const { return group_.first(rank_) + place * group_.stride; }

  Mesh& mesh_;
  int64_t site_, rank_;
  Group group_;
  uint32_t number_ = 0;
};

// y [count] = the floats of `size` places, added up in order.
#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void add(const float* const* places, int64_t size, int64_t count, float* y) {
  constexpr int64_t kBatch = 1024;
  for (int64_t from = 0; from < count; from += kBatch) {
    const int64_t n = std::min(kBatch, count - from);
    std::memcpy(y + from, places[0] + from, n * 4);
    for (int64_t i = 1; i < size; i++)
      for (int64_t k = 0; k < n; k++) y[from + k] += places[i][from + k];
  }
}

// y [end - begin] = bytes [begin, end) of the pieces of all places, as floats, added up.
void add(const Exchange& exchange, int64_t size, int64_t begin, int64_t end, char* y) {
  std::vector<const float*> places;
  for (int64_t i = 0; i < size; i++) places.push_back(reinterpret_cast<const float*>(exchange.of(i) + begin));
  add(places.data(), size, (end - begin) / 4, reinterpret_cast<float*>(y));
}

// x, added up over a group.
ffi::Error sum(F32 x, S32 rank, int64_t world, int64_t site, int64_t size, int64_t stride, Result y) {
  Mesh* mesh = mesh_of(world);
  if (mesh == nullptr) return ffi::Error::Internal("no memory for a mesh");
  Exchange exchange(*mesh, site, rank.typed_data()[0], {size, stride});
  const int64_t bytes = x.size_bytes(), place = exchange.place();
  const auto* in = reinterpret_cast<const char*>(x.typed_data());
  auto* out = reinterpret_cast<char*>(y->typed_data());
  for (int64_t from = 0; from < bytes; from += kPiece) {
    const int64_t count = std::min(kPiece, bytes - from);
    std::memcpy(exchange.begin(), in + from, count);
    if (bytes <= kSmall) {
      if (!exchange.complete([&](int64_t, int64_t) { return Bytes(0, count); })) return broken(*mesh);
      add(exchange, size, 0, count, out + from);
      continue;
    }
    const int64_t part = (count + size * kLane - 1) / (size * kLane) * kLane;
    const auto range = [&](int64_t first, int64_t last) { return Bytes(std::min(first * part, count), std::min(last * part, count)); };
    if (!exchange.complete(range)) return broken(*mesh);
    const auto [begin, end] = range(place, place + 1);
    add(exchange, size, begin, end, out + from + begin);
    std::memcpy(exchange.begin() + begin, out + from + begin, end - begin);
    if (!exchange.complete([&](int64_t, int64_t) { return Bytes(begin, end); })) return broken(*mesh);
    for (int64_t i = 0; i < size; i++) {
      const auto [first, last] = range(i, i + 1);
      if (i != place) std::memcpy(out + from + first, exchange.of(i) + first, last - first);
    }
  }
  return ffi::Error::Success();
}

// x of each place of a group, in order.
ffi::Error gather(ffi::AnyBuffer x, S32 rank, int64_t world, int64_t site, int64_t size, int64_t stride, ffi::Result<ffi::AnyBuffer> y) {
  Mesh* mesh = mesh_of(world);
  if (mesh == nullptr) return ffi::Error::Internal("no memory for a mesh");
  Exchange exchange(*mesh, site, rank.typed_data()[0], {size, stride});
  const int64_t bytes = x.size_bytes();
  const auto* in = static_cast<const char*>(x.untyped_data());
  auto* out = static_cast<char*>(y->untyped_data());
  for (int64_t from = 0; from < bytes; from += kPiece) {
    const int64_t count = std::min(kPiece, bytes - from);
    std::memcpy(exchange.begin(), in + from, count);
    if (!exchange.complete([&](int64_t, int64_t) { return Bytes(0, count); })) return broken(*mesh);
    for (int64_t i = 0; i < size; i++) std::memcpy(out + i * bytes + from, exchange.of(i), count);
  }
  return ffi::Error::Success();
}

// Of rows [B, columns], whose columns lie side by side over a group, to B / size whole rows for each: [B / size, size * columns].
ffi::Error exchange(ffi::AnyBuffer x, S32 rank, int64_t world, int64_t site, int64_t size, int64_t stride, ffi::Result<ffi::AnyBuffer> y) {
  Mesh* mesh = mesh_of(world);
  if (mesh == nullptr) return ffi::Error::Internal("no memory for a mesh");
  Exchange exchange(*mesh, site, rank.typed_data()[0], {size, stride});
  const int64_t part = x.size_bytes() / size, row = x.size_bytes() / x.dimensions()[0], most = kPiece / size / kLane * kLane;
  const auto* in = static_cast<const char*>(x.untyped_data());
  auto* out = static_cast<char*>(y->untyped_data());
  for (int64_t from = 0; from < part; from += most) {
    const int64_t count = std::min(most, part - from);
    char* piece = exchange.begin();
    for (int64_t i = 0; i < size; i++) std::memcpy(piece + i * count, in + i * part + from, count);
    if (!exchange.complete([&](int64_t first, int64_t last) { return Bytes(first * count, last * count); })) return broken(*mesh);
    for (int64_t i = 0; i < size; i++) {
      const char* own = exchange.of(i) + exchange.place() * count;
      for (int64_t at = from, run; at < from + count; at += run, own += run) {
        run = std::min(row - at % row, from + count - at);
        std::memcpy(out + (at / row * size + i) * row + at % row, own, run);
      }
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace grokmesh

#define COLLECTIVE(X, Y) \
  ffi::Ffi::Bind().Arg<X>().Arg<grokmesh::S32>().Attr<int64_t>("world").Attr<int64_t>("site").Attr<int64_t>("size").Attr<int64_t>("stride").Ret<Y>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(grokmesh_sum, grokmesh::sum, COLLECTIVE(grokmesh::F32, grokmesh::F32));
XLA_FFI_DEFINE_HANDLER_SYMBOL(grokmesh_gather, grokmesh::gather, COLLECTIVE(ffi::AnyBuffer, ffi::AnyBuffer));
XLA_FFI_DEFINE_HANDLER_SYMBOL(grokmesh_exchange, grokmesh::exchange, COLLECTIVE(ffi::AnyBuffer, ffi::AnyBuffer));
