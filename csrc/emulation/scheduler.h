// Runs a CUDA kernel on the host: the threads of a block are fibres, switched round-robin at barriers and warp
// collectives. One block runs at a time, on an operating system thread of its own, so that `__shared__` (thread_local
// here) belongs to the block. A block whose threads only spin on a global counter lets other blocks start or go on, up
// to as many as are resident at once. Stricter than the hardware: a barrier that a thread has left the kernel without
// reaching, a barrier met at two places, and a warp mask that names lanes which do not exist end the process.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <cxxabi.h>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "fibres.h"

namespace comeba {
namespace COMEBA_HIDDEN emulation {

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
