"""The memory that the CPU is measured on: freed memory is kept, and lies in huge pages where Linux has them.

PyTorch's GPU allocators keep what is freed. On the CPU page faults would drown the large tensors; and in small pages,
which a process gets wherever some are free, the same call takes up to twice as long in one process as in the next.
"""

import contextlib
import ctypes
import os
from pathlib import Path

HEAP = 2**30  # bytes for all large tensors that live at a time; what goes beyond is in small pages
TRIM_THRESHOLD, MMAP_MAX, MADV_HUGEPAGE = -1, -4, 14


def keep_memory() -> None:
    """Has glibc take all memory from a heap that does not shrink, the first part of it in huge pages."""
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc, free = libc.mallopt, libc.malloc, libc.free
    except (AttributeError, OSError, TypeError):
        return  # another C library
    malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
    if heap := malloc(HEAP):  # none of it is touched
        page = os.sysconf("SC_PAGE_SIZE")
        begin = -(-heap // page) * page
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(heap + HEAP - begin), MADV_HUGEPAGE)
        free(heap)


def huge_pages() -> str:
    """How much of this process lies in huge pages, for the report."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("AnonHugePages:"):
                return f"{int(line.split()[1]) / 1024:.0f} MiB"
    return "unknown"
