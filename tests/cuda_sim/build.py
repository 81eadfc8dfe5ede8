"""Builds the CUDA kernels with the C++ compiler, as a library whose ops take the place of the CPU ones.

`python tests/cuda_sim/build.py FOLDER [address|thread]`, then `TEMPOPS_CUDA_SIM=FOLDER/libcuda_sim.so pytest tests`.
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SANITIZERS = {
    "": ["-O1"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}
# The kernels register for CUDA; here they are to take CPU tensors, without touching what the headers call CUDA.
UNIT = """#include "cuda.h"
#define CUDA CPU
#include "{source}"
"""


def _compiler() -> list[str]:
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
    from torch.utils.cpp_extension import include_paths

    flags += [f"-I{HERE}", f"-I{CSRC}", *(f"-isystem{path}" for path in include_paths())]
    return [
        *shlex.split(os.environ.get("CXX", "c++")),
        *flags,
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]


def _compile(folder: Path, sanitizer: str, units: list[Path]) -> list[str]:
    """Compiles the simulator and `units`; returns the objects."""

    def compile_unit(unit: Path) -> str:
        flags = SANITIZERS[sanitizer]
        if sanitizer and unit.parent == HERE and unit.stem == "cuda_runtime":
            # What the scheduler itself touches is no race, and its stacks are not one stack.
            flags = ["-O1", "-g", f"-DCUDA_SIM_{sanitizer.upper()}"]
        target = folder / f"{unit.stem}.o"
        subprocess.run([*_compiler(), *flags, "-c", str(unit), "-o", str(target)], check=True)
        return str(target)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return list(pool.map(compile_unit, [HERE / "cuda_runtime.cpp", *units]))


def build(folder: Path, sanitizer: str = "", sources: list[Path] | None = None) -> Path:
    """Compiles `sources` (default: every csrc/*/cuda.cu) into folder/libcuda_sim.so and returns its path."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    units = []
    for source in sources or sorted(CSRC.glob("*/cuda.cu")):
        units.append(folder / f"{source.parent.name}.cpp")
        units[-1].write_text(UNIT.format(source=source.resolve()))
    library = folder / "libcuda_sim.so"
    objects = _compile(folder, sanitizer, units)
    link = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run([*_compiler(), *SANITIZERS[sanitizer], "-shared", "-o", str(library), *objects, *link], check=True)
    return library


def build_planted(folder: Path, sanitizer: str) -> Path:
    """Compiles planted.cpp into a program and returns its path."""
    program = folder / "planted"
    objects = _compile(folder, sanitizer, [HERE / "planted.cpp"])
    subprocess.run([*_compiler(), *SANITIZERS[sanitizer], "-o", str(program), *objects], check=True)
    return program


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), *sys.argv[2:3]))
