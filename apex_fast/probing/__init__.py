"""The shift probe: whether a network sees a condition shift, before it is trained with it.

``measures`` has the numbers, ``capture`` reads attention out of a running network, ``probe`` runs the passes,
``verdict`` judges, ``report`` and ``picture`` show, ``command`` is ``apex-fast probe``.
"""

from apex_fast.probing.probe import CheckLine, LayerChange, ProbeReport, ProbeRow, check_shift, probe
from apex_fast.probing.report import as_mapping, table
from apex_fast.probing.verdict import THRESHOLDS, Thresholds

__all__ = [
    "THRESHOLDS",
    "CheckLine",
    "LayerChange",
    "ProbeReport",
    "ProbeRow",
    "Thresholds",
    "as_mapping",
    "check_shift",
    "probe",
    "table",
]
