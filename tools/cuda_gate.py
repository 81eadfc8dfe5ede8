"""Compiles every csrc/*/cuda.cu for 8.0 and 9.0, warnings as errors, and prints what the kernels take on chip.

Needs nvcc and any PyTorch, no GPU. Fails where a kernel spills registers or has a stack.
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


def compiled(source: Path, architecture: int) -> str:
    """The report of nvcc."""
    include = [f"-I{path}" for path in include_paths()]
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, *include, *CHECKS, code, "-c", str(source), "-o", f"{folder}/out.o"]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{source} for {architecture}:\n{run.stdout}{run.stderr}")
    return run.stdout + run.stderr


def main() -> None:
    """Prints the table; exits with 1 where a kernel fails."""
    jobs = [(source, architecture) for source in sorted(Path("csrc").glob("*/cuda.cu")) for architecture in (80, 90)]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        reports = list(pool.map(lambda job: compiled(*job), jobs))
    print(f"{'op':28}{'arch':>6}{'kernels':>9}{'registers':>11}{'shared':>9}{'stack':>7}{'spills':>8}")
    failed = False
    for (source, architecture), report in zip(jobs, reports):

        def numbers(pattern: str, report: str = report) -> list[int]:
            return [int(number) for number in re.findall(pattern, report)]

        registers, shared = numbers(r"Used (\d+) registers"), numbers(r"(\d+) bytes smem")
        stack = sum(numbers(r"(\d+) bytes stack frame"))
        spills = sum(numbers(r"(\d+) bytes spill stores")) + sum(numbers(r"(\d+) bytes spill loads"))
        failed |= not registers or stack + spills > 0
        print(
            f"{source.parent.name:28}{architecture / 10:6}{len(registers):9}{f'to {max(registers)}':>11}"
            f"{max(shared, default=0):9}{stack:7}{spills:8}"
        )
    if failed:
        sys.exit("a kernel spills registers or has a stack")


if __name__ == "__main__":
    main()
