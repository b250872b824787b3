"""One-step text-to-image generators from pretrained flow models, by condition shifting (APEX, arXiv 2604.12322).

The parts, from the bottom up: :mod:`apex_fast.ops` (the compiled kernels, ``torch.ops.apex_fast``),
:class:`ConditionShift` and :class:`Velocities` (who plays which role), :class:`ApexObjective` (a training step),
:func:`sample`. Nothing here needs more than torch; backbones, data, training and evaluation are subpackages with
dependencies of their own.
"""

from . import fusion, ops, path
from .backbones.base import Backbone
from .condition import Condition
from .draws import Draws
from .finite import NonFiniteLossError
from .objective import ApexObjective, Losses
from .path import TimeDistribution
from .probing import probe
from .sampler import SamplerInfo, sample, time_grid
from .shift import ConditionShift
from .velocities import Velocities
from .version import __version__

__all__ = [
    "ApexObjective",
    "Backbone",
    "Condition",
    "ConditionShift",
    "Draws",
    "Losses",
    "NonFiniteLossError",
    "SamplerInfo",
    "TimeDistribution",
    "Velocities",
    "__version__",
    "fusion",
    "ops",
    "path",
    "probe",
    "sample",
    "time_grid",
]
