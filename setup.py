"""Builds tempops: `_C_cpu` (schemas and CPU ops, LibTorch stable ABI), `_C_cuda` (CUDA ops, likewise) where there is an
nvcc and PyTorch is a CUDA build, and `_C` (pybind11, build facts).

    FORCE_CUDA=1           fail rather than build without CUDA; build it against a CPU build of PyTorch too
    TORCH_CUDA_ARCH_LIST   e.g. "8.0;9.0+PTX"; default: the GPUs that are there, else this
    CUDA_HOME, CXX, MAX_JOBS

Metadata needs no torch and an sdist no compiler either, so both are made without the extensions.
"""

from __future__ import annotations  # so that an older Python gets as far as check_python

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
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


def find_nvcc() -> tuple[str | None, str]:
    """nvcc, and why there will be no CUDA kernels where it is None."""
    import torch

    forced = os.environ.get("FORCE_CUDA") == "1"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    where = f"in {home}/bin" if home else "on the PATH"
    if nvcc is None and forced:
        sys.exit(f"FORCE_CUDA=1, but there is no nvcc {where}: install the CUDA toolkit or set CUDA_HOME.")
    if nvcc is None:
        return None, f"there was no nvcc {where} when tempops was built"
    if torch.version.cuda is None and not forced:
        return None, "tempops was built against a CPU build of PyTorch"
    if torch.version.cuda is not None:
        report = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)", report)
        if release and release[1] != torch.version.cuda.split(".")[0]:
            why = f"nvcc is of CUDA {release[1]} and PyTorch of CUDA {torch.version.cuda}"
            if forced:
                sys.exit(f"FORCE_CUDA=1, but {why}: install PyTorch for CUDA {release[1]} or set CUDA_HOME.")
            return None, f"{why} when tempops was built"
    return nvcc, ""


def cuda_architectures() -> list[str]:
    """As TORCH_CUDA_ARCH_LIST says: compute capabilities, with +PTX for later GPUs too."""
    import torch

    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not asked and torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        asked = [f"{major}.{minor}" for major, minor in sorted(found) if major >= 8]
    for architecture in asked:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", architecture):
            sys.exit(f"TORCH_CUDA_ARCH_LIST must be compute capabilities as in '8.0;9.0+PTX', got {architecture!r}")
        if float(architecture.rstrip("af+PTX")) < 8:
            sys.exit(f"tempops' CUDA kernels need compute capability 8.0 or newer, not {architecture}")
    return asked or ["8.0", "9.0+PTX"]


def build_cuda(nvcc: str, sources: list[str], target: Path, folder: Path) -> None:
    """Compiles and links the CUDA library with ninja, which compiles again only what changed."""
    from torch.utils.cpp_extension import include_paths, library_paths

    codes = []
    for architecture in cuda_architectures():
        number = architecture.removesuffix("+PTX").replace(".", "")
        codes.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            codes.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    include = [f"-I{path}" for path in (Path("csrc").resolve(), *include_paths())]
    host = ["-ccbin", shlex.split(os.environ["CXX"])[0], "-Xcompiler=-fPIC,-fvisibility=hidden"]
    compile_flags = ["-std=c++20", "-O3", *codes, *include, "-DUSE_CUDA", *STABLE_ABI, *host]
    libraries = [f"-L{path}" for path in library_paths()]
    # libtorch pulls in what PyTorch was built with, CUDA or not.
    link_flags = ["-shared", "-Xlinker=--no-as-needed", *libraries, "-ltorch", "-ltorch_cpu", "-lc10", *host[:2]]
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)

    def quoted(*words: str | Path) -> str:
        return shlex.join(map(str, words)).replace("$", "$$")

    objects = {str(Path(source).resolve()): f"{Path(source).parent.name}.o" for source in sources}
    lines = [
        "rule compile",
        f"  command = {quoted(nvcc, *compile_flags)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {quoted(nvcc, *link_flags)} $in -o $out",
        *(f"build {out}: compile {source}" for source, out in objects.items()),
        f"build {target.resolve()}: link {' '.join(objects.values())}",
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run(["ninja", "-C", str(folder), "-j", os.environ["MAX_JOBS"]], check=True)


def largest_first(files: Iterable[str | Path]) -> list[str]:
    """The files by size: ninja begins in this order, and what takes longest is not left for the end."""
    return sorted(map(str, files), key=os.path.getsize, reverse=True)


def build() -> dict:
    """The arguments of `setup` for a build of the extensions."""
    if torch_version is None:
        sys.exit("tempops is built against torch, which is not installed here: pip install 'torch>=2.11'")
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    csrc = str(Path("csrc").resolve())
    headers = [str(path) for path in Path("csrc").rglob("*.h")]
    nvcc, why_no_cuda = find_nvcc()
    if nvcc is None:
        print(f"\n*** tempops is built for the CPU only: {why_no_cuda} ***\n", file=sys.stderr)
    facts = {
        "TEMPOPS_TORCH_VERSION": torch_version,
        "TEMPOPS_CUDA_ARCHITECTURES": " ".join(cuda_architectures()) if nvcc else "",
        "TEMPOPS_WHY_NO_CUDA": why_no_cuda,
    }
    cpu = CppExtension(
        "tempops._C_cpu",
        [str(path) for path in Path("csrc").glob("*/cpu.cpp")],
        include_dirs=[csrc],
        extra_compile_args=[*FLAGS, *LOOPS, *STABLE_ABI],
        depends=headers,
        py_limited_api=True,  # no Python symbols: C++ programs load it too
    )
    cpu.libraries = ["c10", "torch_cpu"]  # not libtorch, which a C++ program need not have loaded
    libraries = [
        cpu,
        Extension(
            "tempops._C",
            ["csrc/module.cpp"],
            include_dirs=[csrc, pybind11.get_include()],
            define_macros=[(name, f'"{value}"') for name, value in facts.items()],
            extra_compile_args=FLAGS,
            depends=headers,
        ),
    ]

    cuda_sources = largest_first(Path("csrc").glob("*/cuda.cu"))
    if nvcc is not None:
        # Without sources: PyTorch's own build of .cu files asks for a CUDA build of PyTorch, and is not used.
        libraries.append(Extension("tempops._C_cuda", [], depends=[*headers, *cuda_sources], py_limited_api=True))

    class KeepObjects(BuildExtension):
        """Compiles only what changed since the last build, where pip's editable builds would start afresh."""

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = f"build/{sys.implementation.cache_tag}-torch-{torch_version}"

        def build_extension(self, extension):
            if extension.name != "tempops._C_cuda":
                compile_all = self.compiler.compile  # which setuptools calls with the sources in order of their names
                self.compiler.compile = lambda sources, *args, **options: compile_all(
                    largest_first(sources), *args, **options
                )
                super().build_extension(extension)
                self.compiler.compile = compile_all
                return
            target = Path(self.get_ext_fullpath(extension.name))
            build_cuda(nvcc, cuda_sources, target, Path(self.build_temp, "cuda"))

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
