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


def build(folder: Path, sanitizer: str = "", sources: list[Path] | None = None) -> Path:
    """Compiles `sources` (default: every csrc/*/cuda.cu) into folder/libcuda_sim.so and returns its path."""
    import torch
    from torch.utils.cpp_extension import include_paths

    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
    flags += [f"-I{HERE}", f"-I{CSRC}", *(f"-isystem{path}" for path in include_paths())]
    flags += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    folder.mkdir(parents=True, exist_ok=True)
    units = {folder / "fibers.o": HERE / "cuda_runtime.cpp"}
    for source in sources or sorted(CSRC.glob("*/cuda.cu")):
        unit = folder / f"{source.parent.name}.cpp"
        unit.write_text(UNIT.format(source=source.resolve()))
        units[unit.with_suffix(".o")] = unit

    def compile_unit(item: tuple[Path, Path]) -> None:
        target, unit = item
        own = SANITIZERS[sanitizer]
        if sanitizer == "thread" and target.name == "fibers.o":
            own = ["-O1", "-g", "-DCUDA_SIM_TSAN"]  # what the scheduler itself touches is no race
        subprocess.run([*compiler, *flags, *own, "-c", str(unit), "-o", str(target)], check=True)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        list(pool.map(compile_unit, units.items()))
    library = folder / "libcuda_sim.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = ["-shared", *SANITIZERS[sanitizer], "-o", str(library), *map(str, units)]
    subprocess.run([*compiler, *link, f"-L{torch_libraries}", "-ltorch_cpu", "-ltorch", "-lc10"], check=True)
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), *sys.argv[2:3]))
