"""What the numbers were measured on: the header of a report, and the copy that bandwidths are compared with."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


class CopyProbe:
    """``destination.copy_(source)`` on tensors beyond the cache; it runs between the calls that it is compared with.

    Bandwidths count every byte read and every byte written once, as the bytes of the ops are counted.
    """

    def __init__(self, tensor_bytes: int, device: str = "cpu") -> None:
        self.source = torch.zeros(tensor_bytes // 4, device=device)
        self.destination = torch.empty_like(self.source)

    @property
    def moved_bytes(self) -> int:
        return 2 * self.source.nbytes

    def __call__(self) -> None:
        self.destination.copy_(self.source)


def last_level_cache_bytes() -> int:
    """Size of the largest cache that Linux reports for the first core; 0 where it reports none."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[match[2]])
    return max(sizes)


def beyond_cache_bytes(device: str = "cpu") -> int:
    """Bytes of one tensor of a case beyond the cache: 1.5 times the last-level cache, at least 48 MiB. On a GPU 128
    MiB, 64M elements in half precision.

    The smallest problem (condition_shift, one tensor in and one out) and the copy then span three times the cache, and
    plain torch on a half type, which holds a dozen fp32 copies of it, stays within 2 GB on a usual machine.
    """
    if device == "cuda":
        return 128 * MIB
    return max(48 * MIB, 3 * last_level_cache_bytes() // 2)


def synchronise(device: str) -> None:
    """Waits until ``device`` has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_tflops(size: int, device: str = "cpu") -> float:
    """Best rate of a product of two square matrices, in 10^12 multiplications and additions per second: fp32 on a CPU,
    bf16 on a GPU."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    times = []
    for _ in range(4):
        synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronise(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e12


def cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def commit() -> str:
    """Commit of the source tree, "-dirty" where it has changes; "unknown" outside of git."""
    try:
        revision = _git("rev-parse", "--short=12", "HEAD")
        return revision + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def load_average() -> float:
    """Runnable processes over the last minute."""
    return os.getloadavg()[0]


def nvidia_driver() -> str | None:
    """Version of the driver; None where its tool is not there to ask."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def header(*, threads: int, allocator: str, quick: bool, device: str = "cpu") -> dict[str, Any]:
    """Everything but ``copy_gbps``, which the suites measure between their calls."""
    import apex_fast

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "device_type": device,
        "driver": nvidia_driver() if device == "cuda" else None,
        "cores": os.cpu_count(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "isa": torch.ops.apex_fast.cpu_isa(),
        "torch": torch.__version__,
        "apex_fast": apex_fast.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "threads": threads,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "allocator": allocator,
        "quick": quick,
        "load_average": round(load_average(), 2),
        "copy_gbps": None,
        "matmul_tflops": round(matmul_tflops(256 if quick else 8192 if device == "cuda" else 2048, device), 4),
    }
