#include "cpu/kernels/entries.h"
#include "cpu/kernels/isa.h"

namespace apex_fast::cpu {

const KernelTable& APEX_CONCATENATE(table_, APEX_ISA)() {
  namespace isa = APEX_ISA_NAMESPACE;
  static const KernelTable kernels{
      APEX_STRING(APEX_ISA),
      &isa::condition_shift,
      &isa::condition_shift_backward,
      &isa::interpolate,
      &isa::renoise,
      &isa::renoise_backward,
      &isa::shifted_velocity_loss,
      &isa::shifted_velocity_loss_backward,
      &isa::shifted_velocity_loss_with_gradients,
      &isa::mixed_velocity_loss,
      &isa::mixed_velocity_loss_backward,
      &isa::sampler_step,
      &isa::scaled_copies,
      &isa::condition_shift_rms_norm,
      &isa::condition_shift_rms_norm_backward,
      &isa::projected_condition_shift,
      &isa::projected_condition_shift_backward,
      &isa::modulated_layer_norm,
      &isa::modulated_layer_norm_backward,
  };
  return kernels;
}

}  // namespace apex_fast::cpu
