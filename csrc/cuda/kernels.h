// Launchers of the CUDA kernels. No torch header and no CUDA header: the glue in csrc/cuda/*.cpp calls them,
// csrc/cuda/*.cu define them. Each takes the stream as an opaque pointer and returns the cudaError_t of its launches as
// an int (0 is success). No size may be zero. `wide` asks for fp64 arithmetic, and must where any operand is fp64. An
// output whose data is nullptr is not written.
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/row_problems.h"
#include "cuda/rows.h"

namespace apex_fast::cuda {

int interpolate(const Geometry& geometry, const Operand& x, const Operand& z, const Times& t, const Operand& x_t,
                bool wide, void* stream);
int interpolate_backward(const Geometry& geometry, const Operand& grad, const Times& t, const Operand& grad_x,
                         const Operand& grad_z, bool wide, void* stream);

int renoise(const Geometry& geometry, const Operand& velocity, const Operand& x_s, const Operand& z, const Times& s,
            const Times& t, const Operand& x_fake_t, const Operand& target, bool wide, void* stream);
int renoise_backward(const Geometry& geometry, const Operand& grad_x_fake_t, const Operand& grad_target, const Times& s,
                     const Times& t, const Operand& grad_velocity, bool wide, void* stream);

int sampler_step(const Geometry& geometry, const Operand& x, const Operand& velocity, const Operand& v_uncond,
                 const Operand& noise, const Times& t, const Times& t_next, double guidance_scale, double stochasticity,
                 const Operand& out, bool wide, void* stream);
// gradients: x, velocity, v_uncond, noise
int sampler_step_backward(const Geometry& geometry, const Operand& grad, const Times& t, const Times& t_next,
                          double guidance_scale, double stochasticity, bool guided, const Operand (&gradients)[4],
                          bool wide, void* stream);

// The velocities and the settings of shifted_velocity_loss; v_uncond may be absent.
struct ShiftedVelocities {
  Operand v_shift, v_real, target, v_uncond;
  double guidance_scale;
  double clip;  // infinity: none
};

// Where the results of shifted_velocity_loss go: fake [batch], correction [batch], stats [batch, 7], all F32 or all
// F64.
struct ShiftedVelocityResults {
  void* fake;
  void* correction;
  void* stats;
  DType dtype;
};

// partials: partial_sums(geometry, v_shift, ShiftedVelocitySums::count) numbers
int shifted_velocity_loss(const Geometry& geometry, const ShiftedVelocities& velocities, double* partials,
                          const ShiftedVelocityResults& results, bool wide, void* stream);
// grad_fake, grad_correction: [batch], derivatives of a total by the losses. gradients: v_gen, v_shift, target
int shifted_velocity_loss_backward(const Geometry& geometry, const ShiftedVelocities& velocities,
                                   const Times& grad_fake, const Times& grad_correction, const Operand (&gradients)[3],
                                   bool wide, void* stream);
// Both at once. gradients: v_gen, v_shift
int shifted_velocity_loss_with_gradients(const Geometry& geometry, const ShiftedVelocities& velocities,
                                         const Times& weight_fake, const Times& weight_correction, double* partials,
                                         const ShiftedVelocityResults& results, const Operand (&gradients)[2],
                                         bool wide, void* stream);

// partials: partial_sums(geometry, velocity, 1) numbers; loss: [batch], F32 or F64
int mixed_velocity_loss(const Geometry& geometry, const Operand& velocity, const Operand& x, const Operand& z,
                        const Operand& v_fake, double mix_weight, double* partials, void* loss, DType loss_dtype,
                        bool wide, void* stream);
// gradients: velocity, x, z
int mixed_velocity_loss_backward(const Geometry& geometry, const Operand& velocity, const Operand& x, const Operand& z,
                                 const Operand& v_fake, double mix_weight, const Times& grad,
                                 const Operand (&gradients)[3], bool wide, void* stream);

// scale or bias of condition_shift: a number, or one per channel
struct Parameter {
  const void* data;
  DType dtype;
  bool is_vector;
  int64_t stride;  // in elements
};

struct ConditionShift {
  int64_t rows;
  int64_t channels;
  RowDims dims;
  Parameter scale;
  Parameter bias;
  const uint8_t* mask;  // [rows], nonzero = shift this token; nullptr = all
};

// The sum of `rows` partial sums for each of `columns` numbers, rounded to `dtype`.
struct ParameterGradient {
  double* partials;  // parameter_partials(...) numbers; nullptr: not wanted
  void* out;         // like the parameter, contiguous
};

int condition_shift(const ConditionShift& problem, const RowOperand& condition, const RowOperand& out, bool wide,
                    void* stream);
int condition_shift_backward(const ConditionShift& problem, const RowOperand& condition, const RowOperand& grad,
                             const RowOperand& grad_condition, const ParameterGradient& grad_scale,
                             const ParameterGradient& grad_bias, bool wide, void* stream);

// ---- rows of channels

// The sum over the rows of one number per channel, or of them all. `partials` has, in the arithmetic type (fp32, fp64
// if wide), as many numbers as said where it is used.
struct ColumnGradient {
  void* partials = nullptr;  // nullptr: not wanted
  void* out = nullptr;       // [channels], [batch, channels] or one number, contiguous
  DType dtype = DType::F32;
  bool is_vector = false;
};

int condition_shift_rms_norm(const ConditionShiftRmsNormProblem& problem, const Operand& normed,
                             const Operand& normed_shifted, void* stream);
// partials: row_partials(row_tasks(1, rows, true), channels, is_vector) numbers. gradients: scale, bias, weight
int condition_shift_rms_norm_backward(const ConditionShiftRmsNormProblem& problem, const Operand& grad_normed,
                                      const Operand& grad_shifted, const Operand& grad_condition,
                                      const ColumnGradient (&gradients)[3], void* stream);

int projected_condition_shift(const ProjectedConditionShiftProblem& problem, const Operand& real,
                              const Operand& shifted, void* stream);
// partials: parameter_partials(row_chunks(rows, channels), channels, is_vector) numbers, always fp64.
// gradients: scale, bias, row_sums, linear_bias
int projected_condition_shift_backward(const ProjectedConditionShiftProblem& problem, const Operand& grad_real,
                                       const Operand& grad_shifted, const Operand& grad_projected,
                                       const ColumnGradient (&gradients)[4], void* stream);

// mean, rstd: [batch, rows_per_sample] fp32, fp64 if wide
int modulated_layer_norm(const ModulatedLayerNormProblem& problem, const Operand& out, void* mean, void* rstd,
                         void* stream);
// partials: row_partials(row_tasks(batch, rows_per_sample, true), channels, true) numbers. mean and rstd have the dtype
// `statistics`. gradients: scale, shift
int modulated_layer_norm_backward(const ModulatedLayerNormProblem& problem, const Operand& grad, const void* mean,
                                  const void* rstd, DType statistics, const Operand& grad_hidden,
                                  const ColumnGradient (&gradients)[2], void* stream);

}  // namespace apex_fast::cuda
