// The generator's sample noised again, and the velocity of that path.
#include "math/renoise.h"
#include "cpu/kernels/entries.h"
#include "cpu/kernels/simd.h"

namespace apex_fast::cpu::APEX_ISA_NAMESPACE {

namespace {

template <class C>
void renoise_typed(const Geometry& g, const Operand& velocity, const Operand& x_s, const Operand& z, const Times& s,
                   const Times& t, const Operand& x_fake_t, const Operand& target) {
  using V = Vec<C>;
  map_samples<C, 3, 2>(g, {velocity, x_s, z}, {x_fake_t, target}, [&](int64_t b) {
    const double time = time_at(t, b);
    const V start(static_cast<C>(time_at(s, b))), forward(static_cast<C>(time)), backward(static_cast<C>(1.0 - time));
    return [=](const V(&in)[3], V(&out)[2]) {
      const auto renoised = math::renoise(in[0], in[1], in[2], start, forward, backward);
      out[0] = renoised.x_fake_t;
      out[1] = renoised.target;
    };
  });
}

template <class C>
void renoise_backward_typed(const Geometry& g, const Operand& grad_x_fake_t, const Operand& grad_target, const Times& s,
                            const Times& t, const Operand& grad_velocity) {
  using V = Vec<C>;
  map_samples<C, 2, 1>(g, {grad_x_fake_t, grad_target}, {grad_velocity}, [&](int64_t b) {
    const double start = time_at(s, b);
    const V first(static_cast<C>(-start * (1.0 - time_at(t, b)))), second(static_cast<C>(start));
    return [=](const V(&in)[2], V(&out)[1]) { out[0] = math::renoise_backward(in[0], in[1], first, second); };
  });
}

}  // namespace

void renoise(const Geometry& g, const Operand& velocity, const Operand& x_s, const Operand& z, const Times& s,
             const Times& t, const Operand& x_fake_t, const Operand& target, bool wide) {
  (wide ? renoise_typed<double> : renoise_typed<float>)(g, velocity, x_s, z, s, t, x_fake_t, target);
}

void renoise_backward(const Geometry& g, const Operand& grad_x_fake_t, const Operand& grad_target, const Times& s,
                      const Times& t, const Operand& grad_velocity, bool wide) {
  (wide ? renoise_backward_typed<double> : renoise_backward_typed<float>)(g, grad_x_fake_t, grad_target, s, t,
                                                                          grad_velocity);
}

}  // namespace apex_fast::cpu::APEX_ISA_NAMESPACE
