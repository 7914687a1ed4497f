// Runs a CUDA kernel on the host: the threads of a block are fibres, switched round-robin at barriers and warp
// collectives. One block runs at a time, on an operating system thread of its own, so that `__shared__` (thread_local
// here) belongs to the block. A block whose threads only spin on a global counter lets other blocks start or go on, up
// to as many as are resident at once. Stricter than the hardware: a barrier that a thread has left the kernel without
// reaching, a barrier met at two places, and a warp mask that names lanes which do not exist end the process.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cxxabi.h>
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

// Fills this library's thread_local segment, on a thread that runs nothing but kernels, with NaN.
inline void poison_static_shared() {
  tls_marker = 1;  // the segment exists from the first touch on
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void*) {
        const auto begin = reinterpret_cast<std::uintptr_t>(info->dlpi_tls_data);
        const auto marker = reinterpret_cast<std::uintptr_t>(&tls_marker);
        for (unsigned n = 0; n < info->dlpi_phnum; ++n) {
          const auto& segment = info->dlpi_phdr[n];
          if (segment.p_type != PT_TLS || begin == 0 || marker < begin || marker >= begin + segment.p_memsz) continue;
          std::memset(info->dlpi_tls_data, kPoison, segment.p_memsz);
          return 1;
        }
        return 0;
      },
      nullptr);
}

// Hands the turn to another worker, a new one if there are blocks left and room for one, and waits for it to come back.
inline void let_other_blocks_run(Launch& launch, std::unique_lock<std::mutex>& lock, unsigned self);

inline void run_block(Launch& launch, Block& self, unsigned long long number, std::unique_lock<std::mutex>& lock,
                      unsigned worker) {
  const auto enter = [&] {
    block = &self;
    blockIdx = self.index;
  };
  self.index = {static_cast<unsigned>(number % launch.grid.x),
                static_cast<unsigned>(number / launch.grid.x % launch.grid.y),
                static_cast<unsigned>(number / launch.grid.x / launch.grid.y)};
  enter();
  poison_static_shared();
  std::memset(self.shared, kPoison, launch.shared + kGuardBytes);
  for (auto& one : self.fibres) {
    one->state = State::ready;
    one->copies.assign(1, {});
  }
  self.waiting = self.votes = 0;
  const std::size_t count = self.fibres.size();
  for (std::size_t finished = 0; finished < count;) {
    bool resumed = false, progress = false;
    for (std::size_t n = 0; n < count; ++n) {
      Fibre& next = *self.fibres[launch.reversed ? count - 1 - n : n];
      if (next.state != State::ready && next.state != State::spinning) continue;
      next.state = State::ready;
      resume(next);
      resumed = true;
      progress |= next.state != State::spinning;
      finished += next.state == State::finished;
    }
    if (!resumed) fail_with_threads("deadlock: every thread waits, and none of them can go on");
    if (progress) {
      launch.idle_spins = 0;
    } else {
      if (++launch.idle_spins > kMaxIdleSpins) fail_with_threads("threads spin on something that never comes");
      let_other_blocks_run(launch, lock, worker);
      enter();
    }
  }
  for (std::size_t n = launch.shared; n < launch.shared + kGuardBytes; ++n) {
    if (self.shared[n] != kPoison) fail("a thread wrote beyond the block's dynamic shared memory");
  }
}

inline void prepare_block(Launch& launch, Block& self) {
  self.launch = &launch;
  const std::size_t count = std::size_t{launch.block.x} * launch.block.y * launch.block.z;
  self.storage.resize(launch.shared + kGuardBytes + 128);
  self.shared = self.storage.data() + (128 - reinterpret_cast<std::uintptr_t>(self.storage.data()) % 128);
  self.warps.resize((count + 31) / 32);
  self.stacks = static_cast<unsigned char*>(
      mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (self.stacks == MAP_FAILED) fail("no memory for the threads' stacks");
  for (unsigned n = 0; n < count; ++n) {
    self.fibres.push_back(std::make_unique<Fibre>());
    Fibre& one = *self.fibres.back();
    one.number = n;
    one.index = {n % launch.block.x, n / launch.block.x % launch.block.y, n / launch.block.x / launch.block.y};
    one.stack = self.stacks + n * kStackBytes;
    std::memcpy(one.stack, &kStackMark, sizeof(kStackMark));
    getcontext(&one.entry);
    one.entry.uc_stack.ss_sp = one.stack;
    one.entry.uc_stack.ss_size = kStackBytes;
    one.entry.uc_link = nullptr;
    makecontext(&one.entry, &fibre_main, 0);
  }
}

inline void work(Launch& launch, unsigned self) {
  std::unique_lock<std::mutex> lock(launch.mutex);
  launch.changed.wait(lock, [&] { return launch.turn == self; });
  Block mine;
  prepare_block(launch, mine);
  while (launch.next_block < launch.blocks) run_block(launch, mine, launch.next_block++, lock, self);
  munmap(mine.stacks, mine.fibres.size() * kStackBytes);
  block = nullptr;
  launch.alive[self] = false;
  for (unsigned n = 0; n < launch.alive.size(); ++n) {
    if (launch.alive[n]) launch.turn = n;
  }
  launch.changed.notify_all();
}

inline void start_worker(Launch& launch) {
  const auto self = static_cast<unsigned>(launch.workers.size());
  launch.alive.push_back(true);
  launch.turn = self;
  launch.workers.emplace_back([&launch, self] { work(launch, self); });
}

inline void let_other_blocks_run(Launch& launch, std::unique_lock<std::mutex>& lock, unsigned self) {
  if (launch.next_block < launch.blocks && launch.workers.size() < kMultiprocessors * kBlocksPerMultiprocessor) {
    start_worker(launch);
  } else {
    do {
      launch.turn = (launch.turn + 1) % static_cast<unsigned>(launch.alive.size());
    } while (!launch.alive[launch.turn]);
  }
  if (launch.turn == self) return;
  launch.changed.notify_all();
  launch.changed.wait(lock, [&] { return launch.turn == self; });
}

inline std::string kernel_name(void* kernel) {
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "(unnamed)";
  int status = 0;
  char* plain = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string name = status == 0 ? plain : info.dli_sname;
  std::free(plain);
  return name;
}

inline void run(std::function<void()> body, void* kernel, dim3 grid, dim3 threads, std::size_t shared) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  const char* order = std::getenv("COMEBA_EMULATION_ORDER");
  Launch launch;
  launch.body = std::move(body);
  launch.name = kernel_name(kernel);
  launch.grid = gridDim = grid;
  launch.block = blockDim = threads;
  launch.shared = shared;
  launch.reversed = order != nullptr && std::string(order) == "reversed";
  launch.blocks = static_cast<unsigned long long>(grid.x) * grid.y * grid.z;
  {
    const std::lock_guard<std::mutex> lock(launch.mutex);
    start_worker(launch);
  }
  // More workers may be started by the ones that run: the vector is read under the mutex.
  for (std::size_t n = 0;; ++n) {
    std::thread* next = nullptr;
    {
      std::unique_lock<std::mutex> lock(launch.mutex);
      launch.changed.wait(lock, [&] {
        for (const bool one : launch.alive) {
          if (one) return false;
        }
        return true;
      });
      if (n == launch.workers.size()) break;
      next = &launch.workers[n];
    }
    next->join();
  }
}

}  // namespace COMEBA_HIDDEN emulation
}  // namespace comeba
