// Walks the slots, chunks and rows of csrc/cuda/slots.h and rows.h over awkward geometries: every element exactly once,
// sums through both stages, and sizes beyond 2^31 by arithmetic alone. Prints what it counted; exits with 1 at the
// first mistake.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "cuda/rows.h"
#include "cuda/slots.h"

using namespace apex_fast;
using namespace apex_fast::cuda;

#define REQUIRE(condition, ...)                                     \
  do {                                                              \
    if (!(condition)) {                                             \
      std::printf("%s:%d: %s\n  ", __FILE__, __LINE__, #condition); \
      std::printf(" " __VA_ARGS__);                                 \
      std::printf("\n");                                            \
      std::exit(1);                                                 \
    }                                                               \
  } while (0)

namespace {

std::mt19937_64 random_bits(20260419);

int64_t random_below(int64_t limit) {
  return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(limit));
}

void check_divider() {
  std::vector<int64_t> divisors;
  for (int64_t d = 1; d <= 300; ++d)
    divisors.push_back(d);
  for (int shift = 9; shift <= 40; ++shift)
    for (int64_t off = -1; off <= 1; ++off)
      divisors.push_back((int64_t{1} << shift) + off);
  for (int i = 0; i < 2000; ++i)
    divisors.push_back(1 + random_below(int64_t{1} << (1 + i % 33)));
  int64_t checked = 0;
  for (const int64_t d : divisors) {
    const Divider divider(d);
    const auto check = [&](int64_t n) {
      if (n < 0) return;
      REQUIRE(divider.divide(n) == n / d, "%lld / %lld gives %lld", (long long)n, (long long)d,
              (long long)divider.divide(n));
      ++checked;
    };
    for (int64_t n = 0; n < 40; ++n)
      check(n);
    for (int shift = 29; shift <= 62; ++shift)
      for (int64_t off = -2; off <= 2; ++off)
        check((int64_t{1} << shift) + off);
    const int64_t last = (int64_t{1} << 31) - 1;
    for (const int64_t top : {last, int64_t{1} << 20, int64_t{1} << 45})
      for (int64_t off = -1; off <= 1; ++off)
        check(top / d * d + off);
    for (int i = 0; i < 100; ++i)
      check(random_below(int64_t{1} << (1 + i % 62)));
  }
  std::printf("divisions %lld\n", (long long)checked);
}

struct Case {
  Geometry geometry;
  Operand anchor;
};

// An address that no test reads: only its distance from boundaries counts.
void* address(int64_t bytes) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(0x7f0000000000) + bytes);
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const std::vector<Geometry> geometries{{1, 1, 1},      {3, 1, 7},       {2, 1, 8},      {2, 1, 9},
                                         {5, 1, 1023},   {4, 1, 64},      {3, 17, 1},     {3, 17, 1023},
                                         {700, 1, 3},    {2, 3, 20},      {3, 527, 33},   {1, 5, 16},
                                         {2, 1, 262144}, {1, 1, 2097152}, {8, 1, 131072}, {16, 4, 8192}};
  for (const Geometry& g : geometries)
    for (const DType dtype : {DType::F32, DType::F64, DType::BF16})
      for (int64_t origin = 0; origin < slot_size; ++origin)
        for (const int64_t gap : {int64_t{0}, int64_t{5}, int64_t{8}}) {
          if (g.sample_size() * g.batch > 100000 && (origin > 1 || dtype != DType::BF16)) continue;
          // outer == 1: samples `gap` apart; otherwise dense with the batch inside
          const int64_t batch_stride = g.batch == 1 ? 0 : g.inner + (g.outer == 1 ? gap : 0);
          const int64_t outer_stride = g.outer == 1 ? 0 : g.batch * g.inner;
          all.push_back({g, {address(origin * size_of(dtype)), dtype, batch_stride, outer_stride}});
        }
  // expanded over the batch
  all.push_back({{4, 1, 77}, {address(6), DType::BF16, 0, 0}});
  return all;
}

// Marks the elements of a slot, and holds it to its promises.
void visit(const Case& c, const Slots& slots, const Slot& slot, std::vector<uint8_t>& seen) {
  const Geometry& g = c.geometry;
  REQUIRE(slot.sample >= 0 && slot.sample < g.batch && slot.outer >= 0 && slot.outer < g.outer);
  REQUIRE(slot.count >= 0 && slot.count <= slot_size);
  if (slot.count == 0) return;
  REQUIRE(slot.begin >= 0 && slot.begin + slot.count <= g.inner);
  const int64_t offset = slot.sample * c.anchor.batch_stride + slot.outer * c.anchor.outer_stride + slot.begin;
  const auto place = reinterpret_cast<uintptr_t>(c.anchor.data) / size_of(c.anchor.dtype) + offset;
  if (slot.count == slot_size)
    REQUIRE(place % slot_size == 0, "a full slot begins %d elements off", (int)(place % slot_size));
  else
    REQUIRE(slot.begin == 0 || slot.begin + slot.count == g.inner, "a short slot inside a row");
  for (int64_t i = 0; i < slot.count; ++i)
    ++seen[(slot.sample * g.outer + slot.outer) * g.inner + slot.begin + i];
  (void)slots;
}

void require_once(const std::vector<uint8_t>& seen) {
  for (const uint8_t times : seen)
    REQUIRE(times == 1, "an element was visited %d times", times);
}

void check_slots() {
  int64_t walked = 0;
  for (const Case& c : cases()) {
    const Geometry& g = c.geometry;
    const Slots slots = slots_of(g, c.anchor);
    REQUIRE(slots.count == g.batch * slots.per_sample);
    std::vector<uint8_t> seen(g.batch * g.sample_size());
    for (int64_t index = 0; index < slots.count; ++index, ++walked)
      visit(c, slots, slots.at(index), seen);
    require_once(seen);
    // as the grid of map_kernel walks it
    REQUIRE(int64_t{blocks_for(slots.count)} * block_size >= slots.count);
  }
  std::printf("slots %lld\n", (long long)walked);
}

double add_lanes(double (&lanes)[warp_size]) {
  for (int distance = warp_size / 2; distance > 0; distance /= 2) {
    double before[warp_size];
    std::copy(lanes, lanes + warp_size, before);
    for (int lane = 0; lane < warp_size; ++lane)
      lanes[lane] = before[lane] + before[lane ^ distance];
  }
  for (const double lane : lanes)
    REQUIRE(lane == lanes[0], "the lanes of a warp disagree");
  return lanes[0];
}

template <class T>
double warp_total(const T* values, int64_t length) {
  double lanes[warp_size];
  for (int lane = 0; lane < warp_size; ++lane)
    lanes[lane] = lane_total(values, length, lane);
  return add_lanes(lanes);
}

// Both stages of reduce.cuh for `count` sums of known terms.
void check_reduction() {
  constexpr int count = 3;
  int64_t chunks_seen = 0;
  for (const Case& c : cases()) {
    const Geometry& g = c.geometry;
    const Slots slots = slots_of(g, c.anchor);
    const Chunks chunks = chunks_of(g, slots);
    const int64_t per_sample = chunks.per_sample.divisor;
    REQUIRE(chunks.slots % block_size == 0 && chunks.slots / block_size <= 16);
    REQUIRE(chunks.blocks == g.batch * per_sample && per_sample >= 1);
    REQUIRE((per_sample - 1) * chunks.slots < slots.per_sample && per_sample * chunks.slots >= slots.per_sample);
    REQUIRE(partial_sums(g, c.anchor, count) == chunks.blocks * count);

    const auto value = [&](int64_t element, int k) {
      const uint64_t hash = (element * 3 + k) * 0x9e3779b97f4a7c15ull;
      return static_cast<float>(static_cast<double>(hash >> 40) / (1 << 24) + (k == 2 ? -0.5 : 0.0));
    };
    std::vector<uint8_t> seen(g.batch * g.sample_size());
    std::vector<double> partials(chunks.blocks * count, std::numeric_limits<double>::quiet_NaN());
    for (int64_t block = 0; block < chunks.blocks; ++block, ++chunks_seen) {
      const int64_t sample = chunks.per_sample.divide(block), chunk = block - sample * per_sample;
      const int64_t begin = chunk * chunks.slots, end = std::min(begin + chunks.slots, slots.per_sample);
      std::vector<float> threads(count * block_size, 0.0f);
      for (int thread = 0; thread < block_size; ++thread)
        for (int64_t index = begin + thread; index < end; index += block_size) {
          const Slot slot = slots.at(sample, index);
          REQUIRE(slot.sample == sample);
          visit(c, slots, slot, seen);
          for (int i = 0; i < slot.count; ++i)
            for (int k = 0; k < count; ++k)
              threads[k * block_size + thread] += value((sample * g.outer + slot.outer) * g.inner + slot.begin + i, k);
        }
      for (int k = 0; k < count; ++k) {
        double& partial = partials[(sample * count + k) * per_sample + chunk];
        REQUIRE(std::isnan(partial), "a partial sum was written twice");
        partial = warp_total(&threads[k * block_size], block_size);
      }
    }
    require_once(seen);
    for (int64_t b = 0; b < g.batch; ++b)
      for (int k = 0; k < count; ++k) {
        const double actual = warp_total(&partials[(b * count + k) * per_sample], per_sample);
        double expected = 0, magnitude = 0;
        for (int64_t j = 0; j < g.sample_size(); ++j) {
          expected += value(b * g.sample_size() + j, k);
          magnitude += std::fabs(value(b * g.sample_size() + j, k));
        }
        REQUIRE(std::fabs(actual - expected) <= 2e-6 * magnitude, "a sum of %g for %g", actual, expected);
      }
  }
  // 8 latents of 16 x 128 x 128 fill a GPU of 132 multiprocessors, a large tensor leaves each thread much to add
  const Geometry latents{8, 1, 16 * 128 * 128}, large{8, 1, int64_t{8} << 20};
  const Operand a{address(0), DType::BF16, latents.inner, 0}, b{address(0), DType::BF16, large.inner, 0};
  REQUIRE(chunks_of(latents, slots_of(latents, a)).blocks == 512);
  REQUIRE(chunks_of(large, slots_of(large, b)).blocks == 2048);
  std::printf("chunks %lld\n", (long long)chunks_seen);
}

// Beyond 2^31 elements, rows and slots, without memory: the borders of rows, and slots picked at random.
void check_large() {
  const int64_t big = int64_t{1} << 31;
  const std::vector<Geometry> geometries{{1, 1, big + 13},     {3, 1, big - 5},     {1, 1, 8 * big + 1},
                                         {7, 1, 16 * big + 3}, {big / 4, 1, 9},     {3, big / 2, 5},
                                         {2, big, 1},          {5, 3, big / 8 + 7}, {big + 1, 1, 1}};
  int64_t checked = 0;
  for (const Geometry& g : geometries)
    for (int64_t origin = 0; origin < slot_size; ++origin) {
      const Case c{
          g, {address(2 * origin), DType::BF16, g.batch == 1 ? 0 : g.inner, g.outer == 1 ? 0 : g.batch * g.inner}};
      const Slots slots = slots_of(g, c.anchor);
      const int64_t per_row = slots.per_row.divisor;
      REQUIRE(slots.count == g.batch * g.outer * per_row && slots.count > 0);
      const auto head = [&](int64_t sample, int64_t outer) {
        return (origin + sample * c.anchor.batch_stride + outer * c.anchor.outer_stride) % slot_size;
      };
      const auto check = [&](int64_t sample, int64_t outer, int64_t index) {
        const Slot slot = slots.at((outer * g.batch + sample) * per_row + index);
        const Slot same = slots.at(sample, outer * per_row + index);
        REQUIRE(slot.sample == sample && slot.outer == outer && same.sample == sample && same.outer == outer);
        const int64_t from = std::max<int64_t>(0, index * slot_size - head(sample, outer));
        const int64_t to = std::min(g.inner, (index + 1) * slot_size - head(sample, outer));
        REQUIRE(slot.count == std::max<int64_t>(0, to - from) && same.count == slot.count);
        if (slot.count) REQUIRE(slot.begin == from && same.begin == from);
        ++checked;
      };
      for (int i = 0; i < 500; ++i) {
        const int64_t sample = i < 2 ? (g.batch - 1) * i : random_below(g.batch);
        const int64_t outer = i < 2 ? (g.outer - 1) * i : random_below(g.outer);
        check(sample, outer, 0);
        check(sample, outer, per_row - 1);
        check(sample, outer, random_below(per_row));
        // the last slots reach the end of the row
        const int64_t reached = per_row * slot_size - head(sample, outer);
        REQUIRE(reached >= g.inner && reached - g.inner < 2 * slot_size);
      }
      const Chunks chunks = chunks_of(g, slots);
      REQUIRE(chunks.per_sample.divisor * chunks.slots >= slots.per_sample);
    }
  REQUIRE(blocks_for(int64_t{1} << 50) == (1u << 31) - 1);
  std::printf("large %lld\n", (long long)checked);
}

// Offsets of rows with joined dimensions against the plain sum over all dimensions.
void check_rows() {
  int64_t joined_to_one = 0, rows_checked = 0;
  for (int round = 0; round < 3000; ++round) {
    const int dims = static_cast<int>(random_below(max_row_dims + 1));
    int64_t sizes[max_row_dims], strides[2][max_row_dims], rows = 1;
    for (int d = 0; d < dims; ++d)
      rows *= sizes[d] = 1 + random_below(round % 3 == 0 ? 2 : 4);
    for (int k = 0; k < 2; ++k) {
      // dense in the usual order, now and then with a gap or two dimensions swapped
      int64_t stride = 10;
      for (int d = dims - 1; d >= 0; --d) {
        strides[k][d] = stride;
        stride *= sizes[d] + (round % 2 == 0 && random_below(4) == 0 ? 1 : 0);
      }
      if (dims > 1 && round % 5 == 0) std::swap(strides[k][0], strides[k][random_below(dims)]);
      if (dims > 0 && round % 7 == 0) strides[k][random_below(dims)] = 0;
    }
    RowOperand operands[2];
    const int64_t* const given[2] = {strides[0], strides[1]};
    const RowDims joined = join_dims(dims, sizes, given, operands);
    int64_t product = 1;
    for (int d = 0; d < joined.dims; ++d)
      product *= joined.sizes[d].divisor;
    REQUIRE(product == rows);
    joined_to_one += joined.dims <= 1;
    for (int64_t row = 0; row < rows; ++row, ++rows_checked) {
      int64_t offsets[2];
      joined.offsets(operands, row, offsets);
      for (int k = 0; k < 2; ++k) {
        int64_t expected = 0, rest = row;
        for (int d = dims - 1; d >= 0; rest /= sizes[d], --d)
          expected += rest % sizes[d] * strides[k][d];
        REQUIRE(offsets[k] == expected);
      }
    }
  }
  REQUIRE(joined_to_one > 300, "dimensions that lie side by side were not joined");
  std::printf("rows %lld\n", (long long)rows_checked);
}

void check_row_chunks() {
  int64_t shapes = 0;
  const int64_t some[] = {1, 2, 7, 8, 9, 63, 64, 65, 300, 2400, 70001, int64_t{1} << 33};
  for (const int64_t rows : some)
    for (const int64_t channels : {int64_t{1}, int64_t{8}, int64_t{255}, int64_t{256}, int64_t{257}, int64_t{2304},
                                   int64_t{4096}, int64_t{700000}}) {
      const RowChunks chunks = row_chunks(rows, channels);
      REQUIRE(chunks.tiles == (channels + tile_channels - 1) / tile_channels);
      REQUIRE(chunks.rows % rows_at_once == 0 && chunks.rows > 0);
      REQUIRE(chunks.count * chunks.rows >= rows && (chunks.count - 1) * chunks.rows < rows);
      REQUIRE(chunks.count <= 65535, "more chunks than a grid has rows");
      REQUIRE(parameter_partials(chunks, channels, true) == chunks.count * channels);
      REQUIRE(parameter_partials(chunks, channels, false) == chunks.count * chunks.tiles);
      ++shapes;
    }
  std::printf("row_chunks %lld\n", (long long)shapes);
}

// Every row of every group in exactly one task, in order, and threads for every channel that is held.
template <class C>
void check_row_threads() {
  for (int64_t channels = 1; channels <= 3 * held_channels<C>; channels += channels < 600 ? 1 : 97) {
    const int threads = row_threads<C>(channels);
    REQUIRE(threads % warp_size == 0 && threads >= warp_size && threads <= most_row_threads<C>);
    const bool held = channels <= held_channels<C>;
    REQUIRE(held == (channels <= int64_t{threads} * slot_size), "%lld channels", (long long)channels);
    REQUIRE(!held || threads - warp_size < (channels + slot_size - 1) / slot_size, "a warp without work");
  }
  REQUIRE(row_threads<C>(int64_t{1} << 40) == most_row_threads<C>);
}

void check_row_tasks() {
  check_row_threads<float>();
  check_row_threads<double>();
  int64_t shapes = 0;
  for (const int64_t groups : {1, 2, 3, 64, 700})
    for (const int64_t rows : {1, 2, 31, 32, 33, 255, 256, 257, 1000, 5000})
      for (const bool partial_sums : {true, false}) {
        const RowTasks tasks = row_tasks(groups, rows, partial_sums);
        REQUIRE(tasks.rows >= 1 && tasks.rows <= RowTasks::most_rows && tasks.rows_of_group == rows);
        REQUIRE(tasks.count == groups * tasks.per_group.divisor);
        int64_t next = 0;
        for (int64_t task = 0; task < tasks.count; ++task) {
          // as row_kernel does
          const int64_t group = tasks.per_group.divide(task);
          const int64_t begin = (task - group * tasks.per_group.divisor) * tasks.rows;
          const int64_t count = std::min(tasks.rows, rows - begin);
          REQUIRE(count >= 1 && group * rows + begin == next, "task %lld", (long long)task);
          next += count;
        }
        REQUIRE(next == groups * rows);
        REQUIRE(row_partials(tasks, 40, true) == 40 * tasks.count && row_partials(tasks, 40, false) == tasks.count);
        ++shapes;
      }
  // 4,096 tokens: few partial sums, and still blocks for every multiprocessor
  REQUIRE(row_tasks(1, 4096, true).count == 256 && row_tasks(1, 4096, false).count == 2048);
  const RowTasks large = row_tasks(3, int64_t{1} << 33, true);
  REQUIRE(large.rows == RowTasks::most_rows && large.count == 3 * (int64_t{1} << 28));
  std::printf("row_tasks %lld\n", (long long)shapes);
}

}  // namespace

int main() {
  check_divider();
  check_slots();
  check_reduction();
  check_large();
  check_rows();
  check_row_chunks();
  check_row_tasks();
}
