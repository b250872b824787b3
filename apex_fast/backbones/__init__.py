"""Pretrained text-to-image flow models, one file per diffusers family, behind one velocity convention.

:class:`~apex_fast.backbones.base.Backbone` is what they have in common, :mod:`~apex_fast.backbones.loading` finds the
family of a model by its path or id, :mod:`~apex_fast.backbones.tiny` builds small whole pipelines of random parts. Of
diffusers and transformers nothing is imported before a model is made, so ``import apex_fast`` needs neither.
"""
