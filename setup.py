"""Builds tempops: `_C_cpu` (schemas and CPU ops, LibTorch stable ABI) and `_C` (pybind11, build facts)."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))


def compiler() -> str:
    """The C++ compiler, after checking that it knows C++20 and that Python.h is there."""
    named = os.environ.get("CXX")
    found = next((c for c in ([named] if named else ["c++", "g++", "clang++"]) if shutil.which(c.split()[0])), None)
    if found is None:
        wanted = f"CXX={named} is not a program here" if named else "found none of c++, g++, clang++"
        sys.exit(f"tempops needs a C++20 compiler: {wanted}. Install one (Debian: apt install g++) or set CXX.")
    check = subprocess.run([*found.split(), "-std=c++20", "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True)
    if check.returncode:
        sys.exit(f"tempops needs a C++20 compiler: {found} does not accept -std=c++20. Set CXX to a newer one.")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        sys.exit("tempops needs Python's headers: Python.h not found. Install them (Debian: apt install python3-dev).")
    return found


os.environ["CXX"] = compiler()

from torch import __version__ as torch_version  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension  # noqa: E402

FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# Loops with `omp simd` may vectorise their sums; no value changes by the other two.
LOOPS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch 2.11 and everything after it


def extensions() -> list[Extension]:
    import pybind11

    headers = [str(path) for path in Path("csrc").rglob("*.h")]
    facts = {"TEMPOPS_TORCH_VERSION": torch_version, "TEMPOPS_CUDA": "this version of tempops has no CUDA kernels"}
    return [
        CppExtension(
            "tempops._C_cpu",
            sorted(str(path) for path in Path("csrc").glob("*/cpu.cpp")),
            include_dirs=[str(Path("csrc").resolve())],
            extra_compile_args=[*FLAGS, *LOOPS, *STABLE_ABI],
            depends=headers,
            py_limited_api=True,  # no Python symbols: C++ programs load it too
        ),
        CppExtension(
            "tempops._C",
            ["csrc/module.cpp"],
            include_dirs=[pybind11.get_include(), str(Path("csrc").resolve())],
            define_macros=[(name, f'"{value}"') for name, value in facts.items()],
            extra_compile_args=FLAGS,
            depends=headers,
        ),
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})
