// Stands in for the CUDA runtime, so that g++ compiles csrc/cuda/*.cu and their kernels run on the host: the threads of
// a block are fibers, which take turns at every barrier and shuffle, in an order that changes from block to block. What
// is not emulated is the hardware: alignment faults are checked for, timing and memory ordering are not.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

struct Fiber {
  ucontext_t start;  // where the fiber begins; from then on it is switched by jumps, which make no system calls
  jmp_buf place;
  bool started = false;
  std::vector<char> stack = std::vector<char>(128 << 10);
  dim3 index;
  bool done = false;
};

// A block at a time; a kernel finds itself here through threadIdx and the like.
struct Machine {
  dim3 grid, block, block_index, thread_index;
  std::vector<std::unique_ptr<Fiber>> fibers;
  jmp_buf scheduler;
  Fiber* running = nullptr;
  std::function<void()> body;
  Barrier of_block, of_warp[32];
  double exchanged[1024];
  int64_t progress = 0;  // barriers passed and threads finished
  int64_t blocks_run = 0;

  static Machine& one() {
    static Machine machine;
    return machine;
  }

  // A fiber lives on from block to block.
  static void enter() {
    Machine& machine = one();
    for (;;) {
      machine.body();
      machine.running->done = true;
      ++machine.progress;
      machine.yield();
    }
  }

  void yield() {
    if (_setjmp(running->place) == 0) _longjmp(scheduler, 1);
  }

  void resume(Fiber& fiber) {
    running = &fiber;
    thread_index = fiber.index;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Machine::enter, 0);
    setcontext(&fiber.start);
  }

  int linear() const { return (thread_index.z * block.y + thread_index.y) * block.x + thread_index.x; }

  void wait(Barrier& barrier, int threads) {
    const int64_t generation = barrier.generation;
    if (++barrier.arrived == threads) {
      barrier.arrived = 0;
      ++barrier.generation;
      ++progress;
      return;
    }
    while (barrier.generation == generation)
      yield();
  }

  void run_block() {
    const int threads = block.x * block.y * block.z;
    if (threads < 1 || threads > 1024) fail("a block has 1 to 1024 threads");
    while (static_cast<int>(fibers.size()) < threads)
      fibers.push_back(std::make_unique<Fiber>());
    of_block = {};
    std::fill(std::begin(of_warp), std::end(of_warp), Barrier{});
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers[i];
      fiber.done = false;
      fiber.index = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    }
    // Odd strides visit all threads of a block whose size is a power of two, and the plain order any other. In every
    // other block each warp runs as far as it can before the next one does, so that one that passes a barrier too few
    // overtakes the rest.
    const int stride = (threads & (threads - 1)) == 0 ? static_cast<int>(2 * (blocks_run % 61) + 1) : 1;
    const bool greedy = blocks_run % 2 == 1;
    ++blocks_run;
    const auto visit = [&](int i) {
      Fiber& fiber = *fibers[i];
      if (fiber.done) return 0;
      resume(fiber);
      return static_cast<int>(fiber.done);
    };
    for (int left = threads; left > 0;) {
      const int64_t before = progress;
      if (greedy) {
        for (int warp = 0; warp < threads; warp += 32)
          for (int64_t reached = -1; reached != progress;) {
            reached = progress;
            for (int i = warp; i < std::min(warp + 32, threads); ++i)
              left -= visit(i);
          }
      } else {
        for (int i = 0; i < threads; ++i)
          left -= visit(static_cast<int>(static_cast<int64_t>(i) * stride % threads));
      }
      if (progress == before) fail("threads wait at a barrier that others of their block or warp never reach");
    }
  }
};

}  // namespace emulator

#define threadIdx (emulator::Machine::one().thread_index)
#define blockIdx (emulator::Machine::one().block_index)
#define blockDim (emulator::Machine::one().block)
#define gridDim (emulator::Machine::one().grid)

inline void __syncthreads() {
  auto& machine = emulator::Machine::one();
  const dim3 mine = machine.thread_index;
  machine.wait(machine.of_block, machine.block.x * machine.block.y * machine.block.z);
  machine.thread_index = mine;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  static_assert(sizeof(T) <= sizeof(double), "exchanged as a double, which holds every float");
  auto& machine = emulator::Machine::one();
  const dim3 mine = machine.thread_index;
  const int here = machine.linear(), warp = here / 32;
  if (mask != 0xffffffffu) emulator::fail("only whole warps are emulated");
  machine.exchanged[here] = value;
  machine.wait(machine.of_warp[warp], 32);
  machine.thread_index = mine;
  const T other = static_cast<T>(machine.exchanged[here ^ distance]);
  machine.wait(machine.of_warp[warp], 32);
  machine.thread_index = mine;
  return other;
}

template <class T>
T __ldg(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) emulator::fail("a load is not aligned to its size");
  return *pointer;
}

template <class To, class From>
To emulate_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(uint32_t bits) {
  return emulate_bits<float>(bits);
}
inline uint32_t __float_as_uint(float value) {
  return emulate_bits<uint32_t>(value);
}
inline double __hiloint2double(int high, int low) {
  return emulate_bits<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low));
}
inline int __double2loint(double value) {
  return static_cast<int>(emulate_bits<uint64_t>(value));
}
inline int __double2hiint(double value) {
  return static_cast<int>(emulate_bits<uint64_t>(value) >> 32);
}
