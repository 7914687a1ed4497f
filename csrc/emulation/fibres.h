// The threads of a block as fibres: what each one waits for, barriers and collectives of a warp, and how a kernel that
// does what the hardware forbids ends the process. scheduler.h lets them run.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "number_types.h"

// Hidden: every library that is compiled with this header has its own emulation and its own shared memory.
#define COMEBA_HIDDEN __attribute__((visibility("hidden")))

COMEBA_HIDDEN inline uint3 threadIdx{}, blockIdx{};
COMEBA_HIDDEN inline dim3 blockDim{}, gridDim{};
constexpr int warpSize = 32;

namespace comeba {
namespace COMEBA_HIDDEN emulation {

constexpr unsigned kMultiprocessors = 3, kBlocksPerMultiprocessor = 2;  // as many blocks are resident at once
constexpr std::size_t kStackBytes = 128 << 10, kMaxSharedBytes = 227 << 10, kGuardBytes = 256;
// What a block may have: a large GPU's, or what another one has, in KiB.
inline std::size_t max_shared_bytes() {
  const char* const given = std::getenv("COMEBA_EMULATION_SHARED");
  return given == nullptr ? kMaxSharedBytes : std::strtoul(given, nullptr, 10) << 10;
}
constexpr unsigned kMaxIdleSpins = 1000000;
constexpr unsigned kStackMark = 0xc0ebau;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type

struct Place {
  const char* what;
  const char* file;
  int line;
};

enum class State { ready, spinning, barrier, collective, finished };

struct PendingCopy {
  void* to;
  const void* from;
  bool valid;
};

struct Fibre {
  jmp_buf registers;
  ucontext_t entry;
  bool entered = false;
  State state = State::ready;
  Place place{};
  unsigned number = 0;
  uint3 index{};
  unsigned char* stack = nullptr;
  std::vector<std::vector<PendingCopy>> copies{1};  // cp.async: the groups, the open one last
};

struct Collective {  // lanes of one warp on their way to meet
  unsigned mask = 0, arrived = 0;
  Place place{};
  void* lanes[32]{};
};

struct Launch {
  std::function<void()> body;
  std::string name;
  dim3 grid, block;
  std::size_t shared = 0;
  bool reversed = false;  // threads run in descending order: results that depend on the order differ
  unsigned long long blocks = 0, next_block = 0;
  unsigned idle_spins = 0;
  // Whose turn it is; the mutex is held by the worker whose turn it is.
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::thread> workers;
  std::vector<bool> alive;
  unsigned turn = 0;
};

struct Block {
  Launch* launch = nullptr;
  std::vector<std::unique_ptr<Fibre>> fibres;
  std::vector<std::vector<Collective>> warps;
  std::vector<unsigned char> storage;
  unsigned char* shared = nullptr;  // dynamic shared memory, inside storage, and kGuardBytes after it
  unsigned char* stacks = nullptr;
  jmp_buf scheduler;
  unsigned waiting = 0;  // threads at the barrier
  Place barrier{};
  unsigned votes = 0, votes_done = 0;  // of __syncthreads_count and its kin
  uint3 index{};
};

inline Block* block = nullptr;  // running now
inline Fibre* fibre = nullptr;
inline thread_local unsigned char tls_marker = 0;  // tells this library's thread_local segment from all others

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "comeba emulation: %s\n", message.c_str());
  if (block != nullptr) {
    std::fprintf(stderr, "  in kernel %s, block (%u, %u, %u) of (%u, %u, %u)\n", block->launch->name.c_str(),
                 block->index.x, block->index.y, block->index.z, block->launch->grid.x, block->launch->grid.y,
                 block->launch->grid.z);
  }
  std::fflush(stderr);
  std::abort();
}

inline std::string text(const Place& place) {
  return std::string(place.what) + " (" + place.file + ":" + std::to_string(place.line) + ")";
}

inline const char* state_name(State state) {
  switch (state) {
    case State::ready:
      return "runnable";
    case State::spinning:
      return "spins at";
    case State::barrier:
      return "waits at";
    case State::collective:
      return "waits in";
    default:
      return "has left the kernel";
  }
}

[[noreturn]] inline void fail_with_threads(const std::string& message) {
  std::string all = message;
  unsigned shown = 0;
  for (std::size_t first = 0; first < block->fibres.size() && shown < 12;
       ++shown) {  // neighbours in one state together
    const Fibre& one = *block->fibres[first];
    std::size_t last = first;
    const auto same = [&](const Fibre& other) {
      return other.state == one.state && (one.state == State::finished || other.place.line == one.place.line);
    };
    while (last + 1 < block->fibres.size() && same(*block->fibres[last + 1])) ++last;
    all += "\n  threads " + std::to_string(first) + " to " + std::to_string(last) + ": " + state_name(one.state);
    if (one.state != State::finished && one.place.what != nullptr) all += " " + text(one.place);
    first = last + 1;
  }
  fail(all);
}

__attribute__((noinline)) inline void switch_to_scheduler() {
  Fibre* self = fibre;
  if (_setjmp(self->registers) == 0) _longjmp(block->scheduler, 1);
}

inline void fibre_main() {
  for (;;) {  // a fibre is used again for the next block
    block->launch->body();
    fibre->state = State::finished;
    switch_to_scheduler();
  }
}

__attribute__((noinline)) inline void resume(Fibre& next) {
  fibre = &next;
  threadIdx = next.index;
  if (_setjmp(block->scheduler) == 0) {
    if (next.entered) _longjmp(next.registers, 1);
    next.entered = true;
    setcontext(&next.entry);
  }
  if (std::memcmp(next.stack, &kStackMark, sizeof(kStackMark)) != 0) {
    fail("a thread used more than " + std::to_string(kStackBytes) + " bytes of stack");
  }
}

// Other threads go on; called by whatever polls memory.
inline void spin(const Place& place) {
  fibre->place = place;
  fibre->state = State::spinning;
  switch_to_scheduler();
}

// Returns the sum of `vote` over the block.
inline unsigned barrier(const Place& place, unsigned vote = 0) {
  if (block->waiting == 0) {
    block->barrier = place;
  } else if (block->barrier.line != place.line || std::string(block->barrier.file) != place.file) {
    fail("threads of a block meet at two barriers: " + text(block->barrier) + " and " + text(place));
  }
  block->votes += vote;
  if (++block->waiting == block->fibres.size()) {
    for (auto& other : block->fibres) other->state = State::ready;
    block->waiting = 0;
    block->votes_done = block->votes;
    block->votes = 0;
  } else {
    fibre->place = place;
    fibre->state = State::barrier;
    switch_to_scheduler();
  }
  return block->votes_done;
}

// The lanes of `mask` meet; the last one to arrive calls complete(lanes, mask), where lanes[i] is lane i's `mine`.
inline void collective(unsigned mask, const Place& place, void* mine,
                       void (*complete)(void* const* lanes, unsigned mask)) {
  const unsigned warp = fibre->number / 32, lane = fibre->number % 32;
  const std::size_t size = block->fibres.size() - std::size_t{warp} * 32;
  const unsigned existing = size >= 32 ? 0xffffffffu : (1u << size) - 1;
  if ((mask & (1u << lane)) == 0)
    fail(text(place) + " by lane " + std::to_string(lane) + ", which its mask leaves out");
  if ((mask & ~existing) != 0) fail(text(place) + ": the mask names lanes that the block does not have");
  std::vector<Collective>& meetings = block->warps[warp];
  std::size_t at = 0;
  while (at < meetings.size() && meetings[at].mask != mask) ++at;
  if (at == meetings.size()) {
    meetings.emplace_back();
    meetings[at].mask = mask;
  }
  Collective& meeting = meetings[at];
  if (meeting.arrived == 0) meeting.place = place;
  if (std::string(meeting.place.what) != place.what) {
    fail("lanes of a warp meet in two collectives: " + text(meeting.place) + " and " + text(place));
  }
  meeting.arrived |= 1u << lane;
  meeting.lanes[lane] = mine;
  if (meeting.arrived != mask) {
    fibre->place = place;
    fibre->state = State::collective;
    switch_to_scheduler();
    return;
  }
  complete(meeting.lanes, mask);
  meeting.arrived = 0;
  for (unsigned other = 0; other < 32; ++other) {
    if ((mask >> other & 1u) != 0) block->fibres[warp * 32 + other]->state = State::ready;
  }
}

}  // namespace COMEBA_HIDDEN emulation
}  // namespace comeba
