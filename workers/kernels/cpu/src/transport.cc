#include "transport.h"

#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <thread>

#include "parallel.h"

namespace grokmesh {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kTurn = std::chrono::milliseconds(200);   // of the keeper
constexpr auto kSpin = std::chrono::microseconds(300);   // spent looking before a reader sleeps
constexpr int kNap = 20, kShortNap = 1;                  // milliseconds for which a reader sleeps at most
constexpr auto kLongest = std::chrono::minutes(5);       // that devices of one process wait for each other
constexpr uint32_t kAlive = kSites;                      // the site of messages that only show life

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Sleeps for some milliseconds, at most until more than `seen` is published.
void sleep_on(Progress& progress, uint32_t seen, int most) {
  const timespec limit{0, most * 1000000};
  progress.sleepers++;
  syscall(SYS_futex, &progress.published, FUTEX_WAIT, seen, &limit, nullptr, 0);
  progress.sleepers--;
}

void wake(Progress& progress) {
  if (progress.sleepers.load()) syscall(SYS_futex, &progress.published, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

// Whether a number has been reached; numbers start again at 0 after 2^32.
bool reached(uint32_t published, uint32_t number) { return static_cast<int32_t>(published - number) >= 0; }

Region* map(int fd, int64_t count) {
  void* memory = mmap(nullptr, count * sizeof(Region), PROT_READ | PROT_WRITE, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<Region*>(memory);
}

std::mutex meshes_mutex;
std::map<int64_t, Mesh*> meshes;  // by the number of ranks; never ended, as threads may wait in them to the last

}  // namespace

Mesh::Mesh(std::vector<Region*> regions, std::unique_ptr<Peer[]> peers, int64_t processes, int64_t process, double silence)
    : regions_(std::move(regions)), numbers_(regions_.size() * kSites), peers_(std::move(peers)), processes_(processes),
      process_(process), devices_(regions_.size() / processes) {
  silent_turns_ = std::max<int64_t>(silence / std::chrono::duration<double>(kTurn).count(), 1);
  cpu_set_t own, both;
  if (sched_getaffinity(0, sizeof own, &own)) CPU_ZERO(&own);
  int64_t beside = devices_;
  for (int64_t p = 0; p < processes; p++) {
    CPU_AND(&both, &own, &regions_[p * devices_]->processors);
    if (peers_[p].shares && CPU_COUNT(&both)) beside += devices_;
    if (peers_[p].socket >= 0 && !peers_[p].shares) far_ = true;
  }
  if (processes > 1) devices = beside;
  crowded_ = beside > CPU_COUNT(&own);
  if (processes > 1) std::thread([this] { keep(); }).detach();
}

void Mesh::announce(Progress& progress, uint32_t number) {
  progress.published.store(number);
  wake(progress);
}

void Mesh::rouse_receivers() {
  delivered_.published++;
  wake(delivered_);
}

bool Mesh::wait(int64_t site, int64_t rank, uint32_t number) {
  Progress& progress = regions_[rank]->progress[site];
  const auto done = [&] { return reached(progress.published.load(std::memory_order_acquire), number); };
  if (done()) return true;
  const Peer& peer = peers_[rank / devices_];
  const bool comes = peer.socket >= 0 && !peer.shares;
  waiting_++;
  const auto began = Clock::now(), awake = began + kSpin;
  while (!done() && !broken_.load(std::memory_order_relaxed)) {
    if (Clock::now() < awake) {
      if (far_) try_deliver();
      if (crowded_) sched_yield();
      else for (int i = 0; i < 16; i++) relax();
    } else if (comes) {
      // One of those who wait for other machines sleeps on the connections, and delivers what comes for all.
      const uint32_t before = delivered_.published.load();
      std::unique_lock<std::mutex> lock(receiving_, std::try_to_lock);
      if (lock) {
        deliver();
        if (!done()) {
          std::vector<pollfd> watched;
          for (int64_t p = 0; p < processes_; p++)
            if (peers_[p].socket >= 0) watched.push_back({peers_[p].socket, POLLIN, 0});
          poll(watched.data(), watched.size(), kNap);
          deliver();
        }
        lock.unlock();
        rouse_receivers();
      } else if (!done()) {
        sleep_on(delivered_, before, kNap);
      }
    } else {
      // Others on this machine may wait for one elsewhere, which can't go on before this process takes what it sends.
      const uint32_t published = progress.published.load();
      if (!reached(published, number)) sleep_on(progress, published, far_ ? kShortNap : kNap);
      if (far_) try_deliver();
      if (processes_ == 1 && Clock::now() - began > kLongest) give_up("a device of this process does not come");
    }
  }
  waiting_--;
  if (far_) rouse_receivers();  // this thread receives no more
  return done();
}

void Mesh::try_deliver() {
  std::unique_lock<std::mutex> lock(receiving_, std::try_to_lock);
  if (lock) deliver();
}

void Mesh::deliver() {
  for (int64_t p = 0; p < processes_; p++)
    if (peers_[p].socket >= 0) receive(peers_[p]);
}

void Mesh::receive(Peer& peer) {
  constexpr int64_t kHeader = sizeof(Peer::Header);
  const Peer::Header& header = peer.header;
  while (!broken_.load(std::memory_order_relaxed)) {
    const bool in_header = peer.received < kHeader;
    char* to = in_header ? reinterpret_cast<char*>(&peer.header) + peer.received
                         : piece(header.site, header.rank, header.number) + header.offset + peer.received - kHeader;
    const int64_t left = in_header ? kHeader - peer.received : kHeader + header.bytes - peer.received;
    const ssize_t got = recv(peer.socket, to, left, MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (got <= 0) return give_up(peer.name + (got ? std::string(": ") + strerror(errno) : " has ended"));
    peer.silent = 0;
    peer.received += got;
    if (peer.received < kHeader) continue;
    const bool alive = header.site == kAlive && header.bytes == 0;
    const bool known = header.site < kSites && header.rank < regions_.size() && &peers_[header.rank / devices_] == &peer &&
                       !peer.shares && header.offset <= kPiece && header.bytes <= kPiece - header.offset;
    if (!alive && !known) return give_up(peer.name + " sent what is no piece");
    if (peer.received < kHeader + header.bytes) continue;
    peer.received = 0;
    if (alive) continue;
    announce(regions_[header.rank]->progress[header.site], header.number);
    rouse_receivers();
  }
}

bool Mesh::send(Peer& peer, Peer::Header header) { return send(peer, header, std::lock_guard<std::mutex>(peer.sending)); }

bool Mesh::send(Peer& peer, Peer::Header header, const std::lock_guard<std::mutex>&) {
  iovec parts[2] = {{&header, sizeof header}, {nullptr, header.bytes}};
  if (header.bytes) parts[1].iov_base = piece(header.site, header.rank, header.number) + header.offset;
  for (iovec* part = parts; part < parts + 2;) {
    msghdr message{};
    message.msg_iov = part;
    message.msg_iovlen = parts + 2 - part;
    const ssize_t sent = sendmsg(peer.socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
      if (header.site == kAlive) return false;  // what it sent before it ended is still to be read
      give_up(peer.name + ": " + strerror(errno));
    }
    if (broken_.load(std::memory_order_relaxed)) return false;
    if (sent < 0) {  // its buffers are full, perhaps as it waits for ours
      waiting_++;
      try_deliver();
      rouse_receivers();
      pollfd watched{peer.socket, POLLOUT, 0};
      poll(&watched, 1, 1);
      waiting_--;
      continue;
    }
    for (size_t left = sent; part < parts + 2; part++) {
      const size_t taken = std::min(left, part->iov_len);
      part->iov_base = static_cast<char*>(part->iov_base) + taken;
      part->iov_len -= taken;
      left -= taken;
      if (part->iov_len) break;
    }
  }
  return true;
}

void Mesh::give_up(const std::string& reason) {
  std::lock_guard<std::mutex> lock(breaking_);
  if (broken_) return;
  reason_ = reason;
  broken_ = true;
  // So that the others know at once, even those that still hear the one that is lost.
  for (int64_t p = 0; p < processes_; p++)
    if (peers_[p].socket >= 0) shutdown(peers_[p].socket, SHUT_RDWR);
}

std::string Mesh::why_broken() {
  std::lock_guard<std::mutex> lock(breaking_);
  return reason_;
}

// Shows that this process lives, and notices which do not. What can't be sent at once need not be: a piece is under way.
void Mesh::keep() {
  while (!broken_) {
    for (int64_t p = 0; p < processes_; p++) {
      Peer& peer = peers_[p];
      if (peer.socket < 0 || !peer.sending.try_lock()) continue;
      std::lock_guard<std::mutex> lock(peer.sending, std::adopt_lock);
      pollfd watched{peer.socket, POLLOUT, 0};
      if (poll(&watched, 1, 0) == 1) send(peer, {kAlive, 0, 0, 0, 0}, lock);
    }
    std::this_thread::sleep_for(kTurn);
    try_deliver();
    rouse_receivers();
    for (int64_t p = 0; p < processes_; p++)
      if (peers_[p].socket >= 0 && ++peers_[p].silent > silent_turns_ && waiting_ > 0)
        give_up(peers_[p].name + " was silent for " + std::to_string(silent_turns_ * kTurn.count()) + " ms");
  }
}

Mesh* mesh_of(int64_t world) {
  std::lock_guard<std::mutex> lock(meshes_mutex);
  Mesh*& mesh = meshes[world];
  if (mesh == nullptr) {
    Region* memory = map(-1, world);
    if (memory == nullptr) return nullptr;
    std::vector<Region*> regions;
    for (int64_t rank = 0; rank < world; rank++) regions.push_back(memory + rank);
    mesh = new Mesh(std::move(regions), std::make_unique<Peer[]>(1), 1, 0, 0);
  }
  return mesh;
}

}  // namespace grokmesh

extern "C" int64_t grokmesh_region_bytes() { return sizeof(grokmesh::Region); }
extern "C" int64_t grokmesh_nonce_offset() { return offsetof(grokmesh::Region, nonce); }
extern "C" int64_t grokmesh_processors_offset() { return offsetof(grokmesh::Region, processors); }

// Makes this process one of a mesh. Of each process: a connected socket (-1 for this one), a file of its ranks' regions (-1 if it is on another
// machine), and a name for messages. The sockets are this library's from now on. False without memory.
extern "C" bool grokmesh_join(int64_t processes, int64_t process, int64_t devices, const int* sockets, const int* files,
                              const char* const* names, double silence) {
  using namespace grokmesh;
  auto peers = std::make_unique<Peer[]>(processes);
  std::vector<Region*> regions;
  for (int64_t p = 0; p < processes; p++) {
    peers[p].socket = sockets[p];
    peers[p].shares = p != process && files[p] >= 0;
    peers[p].name = names[p];
    Region* memory = map(files[p], devices);
    if (memory == nullptr) return false;
    for (int64_t d = 0; d < devices; d++) regions.push_back(memory + d);
  }
  std::lock_guard<std::mutex> lock(meshes_mutex);
  meshes[processes * devices] = new Mesh(std::move(regions), std::move(peers), processes, process, silence);
  return true;
}
