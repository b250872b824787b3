"""One file per diffusers family: how to encode text, mask tokens, and read the model's time and sign conventions.

A backbone is a velocity callable ``backbone(x_t, t, condition) -> Tensor`` in the convention of the library: t = 1 is
noise, the velocity is noise minus data. Nothing is imported here, so that ``import apex_fast`` needs neither
diffusers nor transformers.
"""
