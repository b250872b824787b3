// x_t = t z + (1 - t) x.
#include "math/interpolate.h"
#include "cpu/kernels/entries.h"
#include "cpu/kernels/simd.h"

namespace apex_fast::cpu::APEX_ISA_NAMESPACE {

namespace {

template <class C>
void interpolate_typed(const Geometry& g, const Operand& x, const Operand& z, const Times& t, const Operand& x_t) {
  using V = Vec<C>;
  map_samples<C, 2, 1>(g, {x, z}, {x_t}, [&](int64_t b) {
    const double time = time_at(t, b);
    const V forward(static_cast<C>(time)), backward(static_cast<C>(1.0 - time));
    return [=](const V(&in)[2], V(&out)[1]) { out[0] = math::interpolate(in[0], in[1], forward, backward); };
  });
}

}  // namespace

void interpolate(const Geometry& g, const Operand& x, const Operand& z, const Times& t, const Operand& x_t, bool wide) {
  (wide ? interpolate_typed<double> : interpolate_typed<float>)(g, x, z, t, x_t);
}

}  // namespace apex_fast::cpu::APEX_ISA_NAMESPACE
