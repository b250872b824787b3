"""Pytest plugin (``-p emulated_kernels``): the CUDA kernels, compiled for the host, as the kernels of CPU tensors.

The library that ``APEX_FAST_EMULATED_KERNELS`` names was built by test_cuda_host.py. ``APEX_FAST_KERNELS=reference``
keeps the CPU kernels from registering themselves, so that all tests of an op then run the code of csrc/cuda.
"""

from __future__ import annotations

import os

import ops_checks
import torch

import apex_fast  # noqa: F401  the schemas come first

torch.ops.load_library(os.environ["APEX_FAST_EMULATED_KERNELS"])


def _only_outputs(call):
    # The workspaces of the reductions come from the same allocator here; on a GPU, torch's CPU allocator sees neither.
    result = call()
    return ops_checks.bytes_of(*ops_checks.as_list(result))


ops_checks.allocated_bytes = _only_outputs
