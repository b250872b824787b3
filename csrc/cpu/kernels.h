// The CPU loops behind one function table per instruction set. dispatch.cpp picks a table at run time;
// csrc/cpu/kernels/*.cpp fill them.
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/macros.h"
#include "common/row_problems.h"

namespace apex_fast::cpu {

// Rows of a condition [..., D]: up to 8 leading dimensions with any strides, and the stride between neighbouring
// channels.
struct Rows {
  static constexpr int max_dims = 8;
  int dims;
  int64_t sizes[max_dims];
  int64_t strides[max_dims];
  int64_t channel_stride;
  void* data;
  DType dtype;
};

struct ConditionShiftProblem {
  int64_t rows;
  int64_t channels;
  Rows condition;
  Operand scale;        // [1] or [D]
  Operand bias;         // [1] or [D]
  const uint8_t* mask;  // [rows], nonzero = shift this token; nullptr = all
  bool scale_is_vector;
  bool bias_is_vector;
  bool wide;  // compute in fp64
};

// How the reductions are cut. Only the problem decides, never the number of threads, so that results repeat bit for
// bit.
constexpr int64_t reduction_chunk = 16384;  // elements of one sample per partial sum
APEX_HD int64_t chunks_per_sample(const Geometry& g) {
  return (g.sample_size() + reduction_chunk - 1) / reduction_chunk;
}
constexpr int64_t condition_chunk = 262144;  // elements of a condition per partial sum
APEX_HD int64_t rows_per_chunk(int64_t channels) {
  const int64_t rows = condition_chunk / (channels > 0 ? channels : 1);
  return rows > 64 ? rows : 64;
}

// Every `wide` asks for fp64 arithmetic; otherwise it is fp32. Outputs whose `data` is nullptr are not wanted.
struct KernelTable {
  const char* isa;

  void (*condition_shift)(const ConditionShiftProblem&, const Rows& out);
  void (*condition_shift_backward)(const ConditionShiftProblem&, const Rows& grad, const Rows& grad_condition,
                                   double* partial_scale, double* partial_bias);

  void (*interpolate)(const Geometry&, const Operand& x, const Operand& z, const Times& t, const Operand& x_t,
                      bool wide);

  void (*renoise)(const Geometry&, const Operand& velocity, const Operand& x_s, const Operand& z, const Times& s,
                  const Times& t, const Operand& x_fake_t, const Operand& target, bool wide);
  void (*renoise_backward)(const Geometry&, const Operand& grad_x_fake_t, const Operand& grad_target, const Times& s,
                           const Times& t, const Operand& grad_velocity, bool wide);

  // partials: [batch, chunks, ShiftedVelocitySums::count] fp64
  void (*shifted_velocity_loss)(const Geometry&, const Operand& v_shift, const Operand& v_real, const Operand& v_uncond,
                                const Operand& target, double guidance_scale, double clip, double* partials, bool wide);
  // weights: [batch], 2 * upstream / n
  void (*shifted_velocity_loss_backward)(const Geometry&, const Operand& v_shift, const Operand& v_real,
                                         const Operand& v_uncond, const Operand& target, double guidance_scale,
                                         double clip, const double* weight_correction, const double* weight_fake,
                                         const Operand& grad_gen, const Operand& grad_shift, const Operand& grad_target,
                                         bool wide);

  // Both of the above at once; partials and weights as there.
  void (*shifted_velocity_loss_with_gradients)(const Geometry&, const Operand& v_shift, const Operand& v_real,
                                               const Operand& v_uncond, const Operand& target, double guidance_scale,
                                               double clip, const double* weight_correction, const double* weight_fake,
                                               double* partials, const Operand& grad_gen, const Operand& grad_shift,
                                               bool wide);

  // partials: [batch, chunks] fp64
  void (*mixed_velocity_loss)(const Geometry&, const Operand& velocity, const Operand& x, const Operand& z,
                              const Operand& v_fake, double mix_weight, double* partials, bool wide);
  void (*mixed_velocity_loss_backward)(const Geometry&, const Operand& velocity, const Operand& x, const Operand& z,
                                       const Operand& v_fake, double mix_weight, const double* weight,
                                       const Operand& grad_velocity, const Operand& grad_x, const Operand& grad_z,
                                       bool wide);

  void (*sampler_step)(const Geometry&, const Operand& x, const Operand& velocity, const Operand& v_uncond,
                       const Operand& noise, const Times& t, const Times& t_next, double guidance_scale,
                       double stochasticity, const Operand& out, bool wide);
  // out[k] = factors[k][b] * grad for count <= 4 outputs: the backward of every op that is linear with one coefficient
  // per sample
  void (*scaled_copies)(const Geometry&, const Operand& grad, int count, const double* const* factors,
                        const Operand* out, bool wide);

  // The partial sums of the three below are [chunks, channels] fp64 with rows_per_chunk rows in each (of one sample in
  // the last one: [batch, chunks, channels]); those of one function are wanted together or one by one, as it says.
  void (*condition_shift_rms_norm)(const ConditionShiftRmsNormProblem&, const Operand& normed,
                                   const Operand& normed_shifted);
  // one by one
  void (*condition_shift_rms_norm_backward)(const ConditionShiftRmsNormProblem&, const Operand& grad_normed,
                                            const Operand& grad_shifted, const Operand& grad_condition,
                                            double* partial_scale, double* partial_bias, double* partial_weight);

  void (*projected_condition_shift)(const ProjectedConditionShiftProblem&, const Operand& real, const Operand& shifted);
  // all or none: sums of grad_shifted * projected and of grad_shifted over shifted tokens, of both gradients over all
  void (*projected_condition_shift_backward)(const ProjectedConditionShiftProblem&, const Operand& grad_real,
                                             const Operand& grad_shifted, const Operand& grad_projected,
                                             double* partial_product, double* partial_shifted, double* partial_all);

  // mean, rstd: [batch, rows_per_sample] fp32, fp64 if wide
  void (*modulated_layer_norm)(const ModulatedLayerNormProblem&, const Operand& out, void* mean, void* rstd);
  // both or none
  void (*modulated_layer_norm_backward)(const ModulatedLayerNormProblem&, const Operand& grad, const void* mean,
                                        const void* rstd, const Operand& grad_hidden, double* partial_scale,
                                        double* partial_shift);
};

const KernelTable& table_default();
#if defined(__x86_64__)
const KernelTable& table_avx2();
const KernelTable& table_avx512();
#endif

// The table for this machine; APEX_FAST_CPU_ISA=default|avx2|avx512 lowers the choice.
const KernelTable& table();

}  // namespace apex_fast::cpu
