// The functions of this folder that table.cpp collects, one set per instruction set. csrc/cpu/kernels.h documents them.
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/isa.h"

namespace apex_fast::cpu::APEX_ISA_NAMESPACE {

void condition_shift(const ConditionShiftProblem&, const Rows& out);
void condition_shift_backward(const ConditionShiftProblem&, const Rows& grad, const Rows& grad_condition,
                              double* partial_scale, double* partial_bias);
void interpolate(const Geometry&, const Operand& x, const Operand& z, const Times& t, const Operand& x_t, bool wide);
void renoise(const Geometry&, const Operand& velocity, const Operand& x_s, const Operand& z, const Times& s,
             const Times& t, const Operand& x_fake_t, const Operand& target, bool wide);
void renoise_backward(const Geometry&, const Operand& grad_x_fake_t, const Operand& grad_target, const Times& s,
                      const Times& t, const Operand& grad_velocity, bool wide);
void sampler_step(const Geometry&, const Operand& x, const Operand& velocity, const Operand& v_uncond,
                  const Operand& noise, const Times& t, const Times& t_next, double guidance_scale,
                  double stochasticity, const Operand& out, bool wide);
void scaled_copies(const Geometry&, const Operand& grad, int count, const double* const* factors, const Operand* out,
                   bool wide);
void shifted_velocity_loss(const Geometry&, const Operand& v_shift, const Operand& v_real, const Operand& v_uncond,
                           const Operand& target, double guidance_scale, double clip, double* partials, bool wide);
void shifted_velocity_loss_backward(const Geometry&, const Operand& v_shift, const Operand& v_real,
                                    const Operand& v_uncond, const Operand& target, double guidance_scale, double clip,
                                    const double* weight_correction, const double* weight_fake, const Operand& grad_gen,
                                    const Operand& grad_shift, const Operand& grad_target, bool wide);
void shifted_velocity_loss_with_gradients(const Geometry&, const Operand& v_shift, const Operand& v_real,
                                          const Operand& v_uncond, const Operand& target, double guidance_scale,
                                          double clip, const double* weight_correction, const double* weight_fake,
                                          double* partials, const Operand& grad_gen, const Operand& grad_shift,
                                          bool wide);
void mixed_velocity_loss(const Geometry&, const Operand& velocity, const Operand& x, const Operand& z,
                         const Operand& v_fake, double mix_weight, double* partials, bool wide);
void mixed_velocity_loss_backward(const Geometry&, const Operand& velocity, const Operand& x, const Operand& z,
                                  const Operand& v_fake, double mix_weight, const double* weight,
                                  const Operand& grad_velocity, const Operand& grad_x, const Operand& grad_z,
                                  bool wide);
void condition_shift_rms_norm(const ConditionShiftRmsNormProblem&, const Operand& normed,
                              const Operand& normed_shifted);
void condition_shift_rms_norm_backward(const ConditionShiftRmsNormProblem&, const Operand& grad_normed,
                                       const Operand& grad_shifted, const Operand& grad_condition,
                                       double* partial_scale, double* partial_bias, double* partial_weight);
void projected_condition_shift(const ProjectedConditionShiftProblem&, const Operand& real, const Operand& shifted);
void projected_condition_shift_backward(const ProjectedConditionShiftProblem&, const Operand& grad_real,
                                        const Operand& grad_shifted, const Operand& grad_projected,
                                        double* partial_product, double* partial_shifted, double* partial_all);
void modulated_layer_norm(const ModulatedLayerNormProblem&, const Operand& out, void* mean, void* rstd);
void modulated_layer_norm_backward(const ModulatedLayerNormProblem&, const Operand& grad, const void* mean,
                                   const void* rstd, const Operand& grad_hidden, double* partial_scale,
                                   double* partial_shift);

}  // namespace apex_fast::cpu::APEX_ISA_NAMESPACE
