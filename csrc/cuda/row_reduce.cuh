// The kernel of every op that needs sums over a row of channels before it can write the row, and that may add up
// something over the rows: norms and their gradients.
//
// A block has a few rows of one group (rows.h) and takes one after the other; its threads stand side by side over the
// channels, 8 each. A row of up to held_channels (4,096 in fp32, 2,048 in fp64) is read once and stays in registers
// until it is written. A longer one is read once for every round of sums and once more to be written, the later times
// from the cache where that is large enough: of N bytes of input, N * (1 + rounds) are asked for instead of N.
//
// Sums over a row: 8 channels in a thread, the threads of a warp pairwise, the warps in order. Sums over rows: the rows
// of a task in order, in the arithmetic type; column_sums.cuh adds up the tasks in fp64.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/column_sums.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.h"
#include "cuda/vector_io.cuh"

namespace apex_fast::cuda {

// A body:
//   static constexpr int inputs, outputs, parameters;
//   static constexpr int columns;        // sums over rows
//   static constexpr int rounds, count;  // count sums over the row in each round; a round knows the results before it
//   struct State;                        // what a thread knows of its row
//   __device__ State begin(int64_t row) const;
//   template <int Round> __device__ void add(const State&, const C (&in)[inputs], const C (&k)[parameters],
//                                            C (&sums)[count]) const;
//   template <int Round> __device__ void finish(State&, const C (&totals)[count]) const;
//   __device__ void row_done(const State&, int64_t row) const;  // called by one thread
//   __device__ void write(const State&, const C (&in)[inputs], const C (&k)[parameters], C (&out)[outputs]) const;
//   __device__ void column(const State&, const C (&in)[inputs], const C (&k)[parameters],
//                          C (&terms)[columns]) const;
// where k are the parameters of the channel.
template <class C, class Body>
struct RowProblem {
  static constexpr int places = Body::columns > 0 ? Body::columns : 1;
  RowTasks tasks;
  int64_t channels;
  Operand in[Body::inputs];    // [groups, rows, channels], dense; one without data is not read, and counts as 0
  Operand out[Body::outputs];  // like in; one without data is not written
  Operand parameters[Body::parameters];  // outer_stride between channels, 0: a number; batch_stride between groups
  C* partials[places];                   // [tasks, channels] or [tasks]; nullptr: not wanted
  bool is_vector[places];
  Body body;
};

constexpr int most_row_warps = most_row_threads<float> / warp_size;

// Adds up `Count` numbers over the threads of the block; every thread gets the sums. The caller alternates between two
// places in shared memory: who writes to one has passed a barrier that no thread reaches before it has read the other.
template <int Count, class T>
__device__ __forceinline__ void add_threads(T (&values)[Count], T (&shared)[most_row_warps][Count]) {
  const int warp = threadIdx.x / warp_size, warps = blockDim.x / warp_size;
#pragma unroll
  for (int k = 0; k < Count; ++k)
    values[k] = add_lanes(values[k]);
  if (threadIdx.x % warp_size == 0) {
#pragma unroll
    for (int k = 0; k < Count; ++k)
      shared[warp][k] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < Count; ++k)
    values[k] = 0;
  for (int w = 0; w < warps; ++w) {
#pragma unroll
    for (int k = 0; k < Count; ++k)
      values[k] += shared[w][k];
  }
}

// A thread's channels.
struct ChannelSlot {
  int64_t first;
  int count;  // 0 beyond the last

  static __device__ __forceinline__ ChannelSlot at(int64_t first, int64_t channels) {
    const int64_t left = channels - first;
    return {first, left >= slot_size ? slot_size : left > 0 ? static_cast<int>(left) : 0};
  }
};

// Numbers of any dtype per channel of a slot; what a short slot lacks is zero, or the number where there is only one.
template <class C>
__device__ __forceinline__ void load_parameter(const Operand& parameter, int64_t group, const ChannelSlot& slot,
                                               C (&values)[slot_size]) {
  const int64_t offset = group * parameter.batch_stride + slot.first * parameter.outer_stride;
  if (parameter.outer_stride == 0) {
    const C value = static_cast<C>(load_number(parameter.data, parameter.dtype, offset));
#pragma unroll
    for (int i = 0; i < slot_size; ++i)
      values[i] = value;
    return;
  }
  if (sizeof(C) == 4 && parameter.dtype == DType::F64) {
#pragma unroll
    for (int i = 0; i < slot_size; ++i)
      values[i] =
          i < slot.count
              ? static_cast<C>(load_number(parameter.data, parameter.dtype, offset + i * parameter.outer_stride))
              : C(0);
    return;
  }
  Raw<C> raw;
  load(raw, parameter.data, parameter.dtype, offset, parameter.outer_stride, slot.count);
  widen(raw, parameter.dtype, values);
}

template <class C, int Parameters>
__device__ __forceinline__ void load_parameters(const Operand (&parameters)[Parameters], int64_t group,
                                                const ChannelSlot& slot, C (&values)[Parameters][slot_size]) {
#pragma unroll
  for (int k = 0; k < Parameters; ++k)
    load_parameter(parameters[k], group, slot, values[k]);
}

// A slot of a row in every operand.
template <class C, int N>
__device__ __forceinline__ void load_row(const Operand (&operands)[N], int64_t offset, int count,
                                         C (&values)[N][slot_size]) {
  Raw<C> raw[N];
#pragma unroll
  for (int k = 0; k < N; ++k)
    load(raw[k], operands[k].data, operands[k].dtype, offset, 1, operands[k].data ? count : 0);
#pragma unroll
  for (int k = 0; k < N; ++k)
    widen(raw[k], operands[k].dtype, values[k]);
}

template <int N, class C, int Slots>
__device__ __forceinline__ void channel_of(const C (&slots)[N][Slots], int i, C (&values)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k)
    values[k] = slots[k][i];
}

template <class C, class Body>
struct RowWorker {
  using Problem = RowProblem<C, Body>;
  using State = typename Body::State;
  static constexpr int inputs = Body::inputs, outputs = Body::outputs, parameters = Body::parameters,
                       columns = Body::columns, count = Body::count;
  const Problem& p;

  template <int Round>
  __device__ __forceinline__ void add(const State& state, const ChannelSlot& slot, const C (&in)[inputs][slot_size],
                                      const C (&k)[parameters][slot_size], C (&sums)[count]) const {
#pragma unroll
    for (int i = 0; i < slot_size; ++i) {
      C element[inputs], of_channel[parameters];
      channel_of(in, i, element);
      channel_of(k, i, of_channel);
      if (i < slot.count) p.body.template add<Round>(state, element, of_channel, sums);
    }
  }

  // Writes a slot of a row, and adds its terms to the sums over rows. Channels that a short slot lacks are
  // computed too, but neither stored nor added to a number.
  __device__ __forceinline__ void write(const State& state, int64_t row, const ChannelSlot& slot,
                                        const C (&in)[inputs][slot_size], const C (&k)[parameters][slot_size],
                                        C (&sums)[Problem::places][slot_size]) const {
    C out[outputs][slot_size];
#pragma unroll
    for (int i = 0; i < slot_size; ++i) {
      C element[inputs], of_channel[parameters], result[outputs];
      channel_of(in, i, element);
      channel_of(k, i, of_channel);
      p.body.write(state, element, of_channel, result);
#pragma unroll
      for (int o = 0; o < outputs; ++o)
        out[o][i] = result[o];
      if constexpr (columns > 0) {
        C terms[columns];
        p.body.column(state, element, of_channel, terms);
#pragma unroll
        for (int c = 0; c < columns; ++c)
          sums[c][i] += terms[c];
      }
    }
#pragma unroll
    for (int o = 0; o < outputs; ++o)
      if (p.out[o].data) store(out[o], p.out[o].data, p.out[o].dtype, row * p.channels + slot.first, 1, slot.count);
  }

  // The sums of a task over its rows: stored per channel, or added to `numbers`.
  __device__ __forceinline__ void columns_done(int64_t task, const ChannelSlot& slot,
                                               const C (&sums)[Problem::places][slot_size],
                                               C (&numbers)[Problem::places]) const {
    constexpr DType type = sizeof(C) == 4 ? DType::F32 : DType::F64;
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      if (!p.partials[c]) continue;
      if (p.is_vector[c]) {
        store(sums[c], p.partials[c], type, task * p.channels + slot.first, 1, slot.count);
      } else {
        C sum = 0;
#pragma unroll
        for (int i = 0; i < slot_size; ++i)
          sum += i < slot.count ? sums[c][i] : C(0);
        numbers[c] += sum;
      }
    }
  }

  // All threads of the block come here.
  __device__ __forceinline__ void numbers_done(int64_t task, C (&numbers)[Problem::places],
                                               C (&shared)[most_row_warps][Problem::places]) const {
    bool any = false;
#pragma unroll
    for (int c = 0; c < columns; ++c)
      any = any || (p.partials[c] && !p.is_vector[c]);
    if (!any) return;  // the same for all threads
    add_threads(numbers, shared);
#pragma unroll
    for (int c = 0; c < columns; ++c)
      if (threadIdx.x == 0 && p.partials[c] && !p.is_vector[c]) p.partials[c][task] = numbers[c];
    __syncthreads();  // before the next task writes to `shared`
  }
};

// Registers of a thread. A forward op that holds its rows leaves room for two blocks on a multiprocessor at 3,072
// channels, 384 threads: one block alone waits at its barriers with nothing in flight. All others fit once.
template <class C, class Body, bool Held>
constexpr int row_registers() {
  constexpr int threads = most_row_threads<C> / (Held ? 1 : 2), fit = 65536 / threads;
  if (Held && sizeof(C) == 4 && Body::columns == 0) return 80;
  return fit < 255 ? fit : 255;
}

// __launch_bounds__ can ask for whole blocks of the largest size only, and nvcc before 12.4 has nothing else.
#if !defined(__CUDACC_VER_MAJOR__) || __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1204
#define APEX_FAST_ROW_LIMIT(C, Body, Held) __maxnreg__((row_registers<C, Body, Held>()))
#else
#define APEX_FAST_ROW_LIMIT(C, Body, Held) __launch_bounds__(most_row_threads<C> / (Held ? 1 : 2), 1)
#endif

template <class C, class Body, bool Held>
__global__ void APEX_FAST_ROW_LIMIT(C, Body, Held) row_kernel(const __grid_constant__ RowProblem<C, Body> p) {
  using Worker = RowWorker<C, Body>;
  using State = typename Body::State;
  using T = std::conditional_t<Held, C, double>;  // sums over slots of a long row go on in fp64
  __shared__ T sums_of_warps[2][most_row_warps][Body::count];
  __shared__ C numbers_of_warps[most_row_warps][Worker::Problem::places];
  __shared__ State states[Held ? 1 : RowTasks::most_rows];
  const Worker worker{p};
  int turn = 0;

  for (int64_t task = blockIdx.x; task < p.tasks.count; task += gridDim.x) {
    const int64_t group = p.tasks.per_group.divide(task);
    const int64_t begin = (task - group * p.tasks.per_group.divisor) * p.tasks.rows;
    const int64_t left = p.tasks.rows_of_group - begin;
    const int rows = static_cast<int>(left < p.tasks.rows ? left : p.tasks.rows);
    const int64_t first_row = group * p.tasks.rows_of_group + begin;
    C numbers[Worker::Problem::places] = {};

    if constexpr (Held) {
      const ChannelSlot slot = ChannelSlot::at(static_cast<int64_t>(threadIdx.x) * slot_size, p.channels);
      C k[Body::parameters][slot_size], sums[Worker::Problem::places][slot_size] = {};
      load_parameters(p.parameters, group, slot, k);
#pragma unroll 1
      for (int r = 0; r < rows; ++r) {
        const int64_t row = first_row + r;
        C in[Body::inputs][slot_size];
        load_row(p.in, row * p.channels + slot.first, slot.count, in);
        State state = p.body.begin(row);
        const auto round = [&]<int Round>(std::integral_constant<int, Round>) {
          C totals[Body::count] = {};
          worker.template add<Round>(state, slot, in, k, totals);
          add_threads(totals, sums_of_warps[turn]);
          turn ^= 1;
          p.body.template finish<Round>(state, totals);
        };
        round(std::integral_constant<int, 0>{});
        if constexpr (Body::rounds > 1) round(std::integral_constant<int, 1>{});
        if (threadIdx.x == 0) p.body.row_done(state, row);
        worker.write(state, row, slot, in, k, sums);
      }
      if constexpr (Body::columns > 0) worker.columns_done(task, slot, sums, numbers);
    } else {
      const int64_t step = static_cast<int64_t>(blockDim.x) * slot_size;
#pragma unroll 1
      for (int r = 0; r < rows; ++r) {
        const int64_t row = first_row + r;
        State state = p.body.begin(row);
        const auto round = [&]<int Round>(std::integral_constant<int, Round>) {
          T totals[Body::count] = {};
#pragma unroll 1
          for (int64_t first = static_cast<int64_t>(threadIdx.x) * slot_size; first < p.channels; first += step) {
            const ChannelSlot slot = ChannelSlot::at(first, p.channels);
            C in[Body::inputs][slot_size], k[Body::parameters][slot_size], sums[Body::count] = {};
            load_row(p.in, row * p.channels + first, slot.count, in);
            load_parameters(p.parameters, group, slot, k);
            worker.template add<Round>(state, slot, in, k, sums);
#pragma unroll
            for (int s = 0; s < Body::count; ++s)
              totals[s] += static_cast<T>(sums[s]);
          }
          add_threads(totals, sums_of_warps[turn]);
          turn ^= 1;
          C rounded[Body::count];
#pragma unroll
          for (int s = 0; s < Body::count; ++s)
            rounded[s] = static_cast<C>(totals[s]);
          p.body.template finish<Round>(state, rounded);
        };
        round(std::integral_constant<int, 0>{});
        if constexpr (Body::rounds > 1) round(std::integral_constant<int, 1>{});
        if (threadIdx.x == 0) {
          p.body.row_done(state, row);
          states[r] = state;
        }
      }
      __syncthreads();
#pragma unroll 1
      for (int64_t first = static_cast<int64_t>(threadIdx.x) * slot_size; first < p.channels; first += step) {
        const ChannelSlot slot = ChannelSlot::at(first, p.channels);
        C sums[Worker::Problem::places][slot_size] = {};
#pragma unroll 1
        for (int r = 0; r < rows; ++r) {
          // The parameters come from the cache for every row: registers are for the sums here.
          C in[Body::inputs][slot_size], k[Body::parameters][slot_size];
          load_row(p.in, (first_row + r) * p.channels + first, slot.count, in);
          load_parameters(p.parameters, group, slot, k);
          const State state = states[r];
          worker.write(state, first_row + r, slot, in, k, sums);
        }
        if constexpr (Body::columns > 0) worker.columns_done(task, slot, sums, numbers);
      }
      __syncthreads();  // before the next task writes to `states`
    }
    if constexpr (Body::columns > 0) worker.numbers_done(task, numbers, numbers_of_warps);
  }
}

// Rows of [groups, rows_of_group, channels].
template <class C, class Body>
int row_reduce(const RowTasks& tasks, int64_t channels, const Operand (&in)[Body::inputs],
               const Operand (&out)[Body::outputs], const Operand (&parameters)[Body::parameters],
               const ColumnGradient* gradients, const Body& body, void* stream) {
  RowProblem<C, Body> problem{tasks, channels, {}, {}, {}, {}, {}, body};
  for (int k = 0; k < Body::inputs; ++k)
    problem.in[k] = in[k];
  for (int k = 0; k < Body::outputs; ++k)
    problem.out[k] = out[k];
  for (int k = 0; k < Body::parameters; ++k)
    problem.parameters[k] = parameters[k];
  for (int k = 0; k < Body::columns; ++k) {
    problem.partials[k] = static_cast<C*>(gradients[k].partials);
    problem.is_vector[k] = gradients[k].is_vector;
  }
  constexpr int64_t most = (int64_t{1} << 31) - 1;
  const auto blocks = static_cast<unsigned>(tasks.count < most ? tasks.count : most);
  const bool held = channels <= held_channels<C>;
  const auto kernel = held ? row_kernel<C, Body, true> : row_kernel<C, Body, false>;
  const int threads = held ? row_threads<C>(channels) : most_row_threads<C> / 2;
  const int error = launch(kernel, blocks, threads, stream, problem);
  if constexpr (Body::columns == 0) {
    return error;
  } else {
    if (error != cudaSuccess) return error;
    ColumnSumsJobs<C, Body::columns> jobs{};
    const int64_t groups = tasks.count / tasks.per_group.divisor;
    for (int k = 0; k < Body::columns; ++k) {
      const ColumnGradient& g = gradients[k];
      jobs.job[k] =
          g.is_vector
              ? ColumnSums<C>{problem.partials[k], groups, tasks.per_group.divisor, channels, g.out, g.dtype, nullptr,
                              DType::F32}
              : ColumnSums<C>{problem.partials[k], 1, tasks.count, 1, g.out, g.dtype, nullptr, DType::F32};
    }
    return column_sums(jobs, stream);
  }
}

// 1 / sqrt(v), rounded as in the arithmetic type.
template <class C>
__device__ __forceinline__ C reciprocal_root(C value) {
  return C(1) / std::sqrt(value);
}

}  // namespace apex_fast::cuda
