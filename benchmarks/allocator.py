"""Makes the C library keep the memory that torch frees, for every provider alike.

By default glibc maps every large tensor anew and gives it back when it is freed, so that the first write to each page
of each result is a page fault. On a CPU that costs several times the operation itself, whatever the operation: a
benchmark would compare page faults. A training loop under another allocator, or one whose tensors are reused, does not
pay it; and providers that allocate more would pay more, which would flatter the fused ops. With the setting below all
providers run in memory that is already there, and each row of the result says how many faults were left.
"""

from __future__ import annotations

import ctypes

# From malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> str:
    """Set it for this process and say, for the header of the report, what was done."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return "default: this C library has no mallopt, so that page faults are part of the times"
    # No block is mapped by itself (the threshold for that cannot exceed 32 MB), and the heap is never given back.
    # M_TOP_PAD grows the heap in few, large steps.
    if mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1) and mallopt(_TOP_PAD, 64 << 20):
        return "freed memory is kept (mallopt: M_MMAP_MAX 0, M_TRIM_THRESHOLD -1, M_TOP_PAD 64 MiB)"
    return "default: mallopt refused, so that page faults are part of the times"


def release() -> None:
    """Give free memory back after all, between cases: what one left in pieces is of no use to the next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def touch(size: int) -> None:
    """Have ``size`` bytes of heap in use and give them back: calls that follow find that much without a page fault.

    Kept memory is in pieces that do not always fit, so that the heap would go on growing for some calls.
    """
    block = (ctypes.c_char * size)()
    ctypes.memset(block, 1, size)
