"""Compiles every csrc/*/cuda.cu for 8.0 and 9.0, warnings as errors, and prints what the kernels take on chip.

Needs nvcc and any PyTorch, no GPU. Fails where a kernel spills registers, has a stack, or stores piece by piece what
should be one store: the compiler splits wide stores where it loses sight of their alignment, which only the time shows.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths

FLAGS = ["-std=c++20", "-Icsrc", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
CHECKS = ["-Werror", "all-warnings", "-Xptxas", "-v"]


def compiled(source: Path, architecture: int) -> tuple[str, str]:
    """The report of nvcc, and the kernels in PTX."""
    include = [f"-I{path}" for path in include_paths()]
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        keep = ["-keep", "-keep-dir", folder]
        command = ["nvcc", *FLAGS, *include, *CHECKS, *keep, code, "-c", str(source), "-o", f"{folder}/out.o"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{source} for {architecture}:\n{run.stdout}{run.stderr}")
        return run.stdout + run.stderr, (Path(folder) / f"{source.stem}.ptx").read_text()


def split_stores(ptx: str) -> list[str]:
    """The kernels that write adjacent global memory piece by piece: parts of what should be one store."""
    found = []
    for part in ptx.split(".entry ")[1:]:
        pieces: dict[str, set[tuple[int, int]]] = {}  # by address: where they begin and end
        stores = re.findall(r"st\.global(?:\.[a-z]+)*(?:\.v(\d))?\.[a-z](\d+)\s+\[(%\w+)(?:\+(-?\d+))?\]", part)
        for count, bits, address, offset in stores:
            begin = int(offset or 0)
            pieces.setdefault(address, set()).add((begin, begin + int(count or 1) * int(bits) // 8))
        if any(end == begin for spans in pieces.values() for _, end in spans for begin, _ in spans):
            kernel = re.match(r"\w*?\d([a-z_]+_kernel)I", part)
            found.append(kernel[1] if kernel else part.split("(")[0])
    return found


def main() -> None:
    """Prints the table; exits with 1 where a kernel fails."""
    jobs = [(source, architecture) for source in sorted(Path("csrc").glob("*/cuda.cu")) for architecture in (80, 90)]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        reports = list(pool.map(lambda job: compiled(*job), jobs))
    print(f"{'op':28}{'arch':>6}{'kernels':>9}{'registers':>11}{'shared':>9}{'stack':>7}{'spills':>8}{'split':>7}")
    failed = False
    for (source, architecture), (report, ptx) in zip(jobs, reports):

        def numbers(pattern: str, report: str = report) -> list[int]:
            return [int(number) for number in re.findall(pattern, report)]

        registers, shared = numbers(r"Used (\d+) registers"), numbers(r"(\d+) bytes smem")
        stack = sum(numbers(r"(\d+) bytes stack frame"))
        spills = sum(numbers(r"(\d+) bytes spill stores")) + sum(numbers(r"(\d+) bytes spill loads"))
        split = split_stores(ptx)
        failed |= not registers or stack + spills > 0 or bool(split)
        print(
            f"{source.parent.name:28}{architecture / 10:6}{len(registers):9}{f'to {max(registers)}':>11}"
            f"{max(shared, default=0):9}{stack:7}{spills:8}{len(split):7}"
        )
        for each in split:
            print(f"    {each} splits a store")
    if failed:
        sys.exit("a kernel spills registers, has a stack or splits stores")


if __name__ == "__main__":
    main()
