// What devices of a mesh publish for each other: in memory that all processes of a machine share, over TCP between machines.
//
// A rank is a device's place in the mesh. At each site of a program (the sum behind attention, say) a rank publishes pieces, numbered
// from 1, and reads what the others publish under the same number. It publishes a piece only when it has read the one before from
// all that it exchanges with: so two buffers a site are enough, and who publishes need not wait for readers.
#pragma once
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace grokmesh {

constexpr int64_t kSites = 16;         // as in workers/kernels/interface.py
constexpr int64_t kPiece = 256 << 10;  // bytes of a piece at most

// How far a rank is at a site, for all who read it.
struct alignas(64) Progress {
  std::atomic<uint32_t> published;  // number of the last piece
  std::atomic<uint32_t> sleepers;   // readers that wait for more in the kernel
};

// What a rank publishes. Zeros are an empty one.
struct Region {
  Progress progress[kSites];
  alignas(64) char nonce[64];  // by which a process that maps it knows that it is the right one
  cpu_set_t processors;        // that its process may use; of a process's first rank
  alignas(4096) char pieces[kSites][2][kPiece];
};

// The ranks that exchange something: `size` ranks, each a `stride` from the next.
struct Group {
  int64_t size, stride;
  int64_t place(int64_t rank) const { return rank / stride % size; }
  int64_t first(int64_t rank) const { return rank - place(rank) * stride; }
};

// Another process of the mesh.
struct Peer {
  int socket = -1;      // none for this process itself
  bool shares = false;  // whether both read what the other publishes where it lies
  std::string name;
  std::mutex sending;
  std::atomic<int64_t> silent{0};  // turns of the keeper in which nothing came
  // What is being received.
  struct Header {
    uint32_t site, rank, number, offset, bytes;
  } header{};
  int64_t received = 0;  // bytes, of the header and then of the piece
};

class Mesh {
 public:
  // `regions` of all ranks; `peers` are the processes, each with as many ranks, of which `process` is this one. Who sends
  // nothing for `silence` seconds while it is waited for is lost.
  Mesh(std::vector<Region*> regions, std::unique_ptr<Peer[]> peers, int64_t processes, int64_t process, double silence);

  // The number of this rank's next piece at a site. Only its own thread asks.
  uint32_t next(int64_t site, int64_t rank) { return ++numbers_[rank * kSites + site]; }
  char* piece(int64_t site, int64_t rank, uint32_t number) const { return regions_[rank]->pieces[site][number % 2]; }
  // Makes bytes of a rank's piece known: `range(first, last)` are [begin, end) of what the ranks [first, last) read of it.
  template <typename Range>
  bool publish(int64_t site, int64_t rank, uint32_t number, const Group& group, Range range) {
    announce(regions_[rank]->progress[site], number);
    for (int64_t p = 0; p < processes_; p++) {
      if (peers_[p].socket < 0 || peers_[p].shares) continue;
      // Of the group, the places [first, last) lie there.
      const int64_t base = group.first(rank), from = p * devices_ - base, to = from + devices_;
      const int64_t first = from <= 0 ? 0 : (from + group.stride - 1) / group.stride;
      const int64_t last = to <= 0 ? 0 : std::min(group.size, (to + group.stride - 1) / group.stride);
      if (first >= last) continue;
      const std::pair<int64_t, int64_t> bytes = range(first, last);
      if (!send(peers_[p], {static_cast<uint32_t>(site), static_cast<uint32_t>(rank), number, static_cast<uint32_t>(bytes.first),
                            static_cast<uint32_t>(bytes.second - bytes.first)}))
        return false;
    }
    return true;
  }
  // Waits until a rank has published a piece. False if the mesh is broken.
  bool wait(int64_t site, int64_t rank, uint32_t number);
  std::string why_broken();

 private:
  static void announce(Progress& progress, uint32_t number);
  void rouse_receivers();
  bool send(Peer& peer, Peer::Header header);
  bool send(Peer& peer, Peer::Header header, const std::lock_guard<std::mutex>&);
  void deliver();
  void try_deliver();
  void receive(Peer& peer);
  void give_up(const std::string& reason);
  void keep();

  std::vector<Region*> regions_;
  std::vector<uint32_t> numbers_;
  std::unique_ptr<Peer[]> peers_;
  int64_t processes_, process_, devices_;
  int64_t silent_turns_;
  bool far_ = false;      // whether anything comes over TCP
  bool crowded_ = false;  // whether this machine has more ranks than processors
  std::atomic<int64_t> waiting_{0};  // threads that can't go on without a peer
  std::mutex receiving_;
  Progress delivered_{};  // a number that rises with what comes over TCP, and when nobody receives any more
  std::atomic<bool> broken_{false};
  std::mutex breaking_;
  std::string reason_;
};

// The mesh of so many ranks; one of this process alone if no other was made known. Null if it can't be had.
Mesh* mesh_of(int64_t world);

}  // namespace grokmesh
