"""Builds tempops: `_C_cpu` (schemas and CPU ops, LibTorch stable ABI) and `_C` (pybind11, build facts).

Metadata needs no torch and an sdist no compiler either, so both are made without the extensions.
"""

from __future__ import annotations  # so that an older Python gets as far as check_python

import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

# Python's own flags ask for debug information, which is many times the size of the code: -g0.
FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# Loops with `omp simd` may vectorise their sums; no value changes by the other two.
LOOPS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch 2.11 and everything after it


def check_python() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036, this is the check
        sys.exit(f"tempops needs Python 3.10 or newer, this is {sys.version.split()[0]}: use another interpreter.")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        sys.exit("tempops needs Python's headers: Python.h not found. Install the development package of Python.")


def check_torch() -> str | None:
    """The version of the installed torch; None where there is none (the build backend fetches one)."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 11):
        sys.exit(f"tempops needs torch 2.11 or newer, this environment has {version}: pip install --upgrade torch")
    return version


def check_compiler() -> str:
    """The C++ compiler: CXX, or the first one found; one that knows C++20."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((candidate for candidate in candidates if shutil.which(shlex.split(candidate)[0])), None)
    if found is None:
        sys.exit(f"tempops needs a C++20 compiler: {', '.join(candidates)} not found. Install g++ or set CXX.")
    probe = [*shlex.split(found), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    source = b"#include <bit>\nauto cast = std::bit_cast<int, int>;"
    if subprocess.run(probe, input=source, capture_output=True).returncode:
        sys.exit(f"tempops needs a C++20 compiler: {found} does not compile C++20. Install g++ 11 or newer.")
    return found


def build() -> dict:
    """The arguments of `setup` for a build of the extensions."""
    if torch_version is None:
        sys.exit("tempops is built against torch, which is not installed here: pip install 'torch>=2.11'")
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    csrc = str(Path("csrc").resolve())
    headers = [str(path) for path in Path("csrc").rglob("*.h")]
    facts = {"TEMPOPS_TORCH_VERSION": torch_version, "TEMPOPS_CUDA": "this version of tempops has no CUDA kernels"}
    libraries = [
        CppExtension(
            "tempops._C_cpu",
            sorted(str(path) for path in Path("csrc").glob("*/cpu.cpp")),
            include_dirs=[csrc],
            extra_compile_args=[*FLAGS, *LOOPS, *STABLE_ABI],
            depends=headers,
            py_limited_api=True,  # no Python symbols: C++ programs load it too
        ),
        Extension(
            "tempops._C",
            ["csrc/module.cpp"],
            include_dirs=[csrc, pybind11.get_include()],
            define_macros=[(name, f'"{value}"') for name, value in facts.items()],
            extra_compile_args=FLAGS,
            depends=headers,
        ),
    ]

    class KeepObjects(BuildExtension):
        """Compiles only what changed since the last build, where pip's editable builds would start afresh."""

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = f"build/{sys.implementation.cache_tag}-torch-{torch_version}"

    return {"ext_modules": libraries, "cmdclass": {"build_ext": KeepObjects}}


arguments = {}
if "sdist" not in sys.argv:
    check_python()
    torch_version = check_torch()
    os.environ["CXX"] = check_compiler()
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    if not {"egg_info", "dist_info"} & set(sys.argv):
        arguments = build()
setup(**arguments)
