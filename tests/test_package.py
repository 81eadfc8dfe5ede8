"""The package: its binaries, the program that needs no Python, `python -m tempops`, the checks before a build."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tempops

ROOT = Path(__file__).parents[1]
PACKAGE = Path(tempops.__file__).parent
TORCH = Path(torch.__file__).parent
PYTHON = re.compile(r"^_?Py[A-Z_]")
UNSTABLE = re.compile(r"\b(at|c10|caffe2|torch)::")
STABLE = re.compile(r"^(aoti_)?torch_")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")


def binary(name: str) -> Path:
    return next(PACKAGE.glob(f"{name}.*"))


def symbols(library: Path, kind: re.Pattern) -> list[str]:
    """The dynamic symbols of a library, defined or not, that match `kind`."""
    assert shutil.which("nm"), "the scan needs nm: install binutils"
    listing = subprocess.run(["nm", "-DC", "--format=posix", library], capture_output=True, text=True, check=True)
    return [line for line in listing.stdout.splitlines() if kind.search(line)]


@on_linux
@pytest.mark.parametrize("kind", [PYTHON, UNSTABLE], ids=["python", "unstable"])
def test_one_binary_serves_every_torch_and_python(kind):
    for library in (binary("_C_cpu"), *PACKAGE.glob("_C_cuda.*")):
        assert symbols(library, kind) == [], library


@on_linux
def test_build_facts_load_without_torch():
    assert symbols(binary("_C"), UNSTABLE) == symbols(binary("_C"), STABLE) == []


@on_linux
def test_the_scan_sees_what_it_looks_for():
    assert symbols(binary("_C_cpu"), STABLE)
    assert symbols(binary("_C"), PYTHON)
    assert symbols(TORCH / "lib" / "libc10.so", UNSTABLE)


PROGRAM = r"""
#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <cstdio>

int main(int, char** argv) {
  if (!dlopen(argv[1], RTLD_NOW)) return std::puts(dlerror()), 1;
  if (dlsym(RTLD_DEFAULT, "Py_IsInitialized")) return std::puts("there is a Python in this program"), 2;
  // Two frames of two channels; the first channel takes frame t + 1, the second t - 1.
  torch::stable::Tensor x = torch::stable::empty({2, 2, 1, 1}, torch::headeronly::ScalarType::Float);
  float* value = static_cast<float*>(x.data_ptr());
  for (int i = 0; i < 4; ++i) value[i] = i + 1;
  StableIValue stack[] = {torch::stable::detail::from(x), torch::stable::detail::from(std::optional<int64_t>(2)),
                          torch::stable::detail::from(int64_t{2}),
                          torch::stable::detail::from(std::string("bidirectional"))};
  if (torch_call_dispatcher("tempops::temporal_shift", "", stack, TORCH_ABI_VERSION)) return 3;
  const auto y = torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
  for (int i = 0; i < 4; ++i) std::printf("%g ", static_cast<const float*>(y.const_data_ptr())[i]);
}
"""


@on_linux
def test_a_program_without_python_calls_an_op_by_name(tmp_path):
    (tmp_path / "program.cpp").write_text(PROGRAM)
    compiler = os.environ.get("CXX", "c++").split()
    include = [f"-isystem{TORCH / 'include'}", f"-isystem{TORCH / 'include/torch/csrc/api/include'}"]
    link = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
    flags = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    subprocess.run([*compiler, *flags, *include, "program.cpp", "-o", "program", *link], cwd=tmp_path, check=True)
    run = subprocess.run([tmp_path / "program", binary("_C_cpu")], capture_output=True, text=True)
    assert (run.returncode, run.stdout.split()) == (0, ["3", "0", "0", "2"]), run.stdout + run.stderr


def test_main_prints_what_was_built(tmp_path):
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "tempops"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in run.stdout.splitlines())
    assert facts["tempops"] == tempops.__version__
    assert facts["torch"].startswith(torch.__version__)
    assert "against torch" in facts["built by"]
    assert re.fullmatch(r"baseline\b.*; in use: \w+", facts["CPU instruction sets"])
    assert facts["CUDA architectures"]
    assert facts["back end eager"] == facts["back end cpu"] == "usable"
    assert "usable" in facts["back end cuda"] and "usable" in facts["back end triton"]


def test_metadata():
    assert (PACKAGE / "py.typed").exists()
    try:
        version = importlib.metadata.version("tempops")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tempops is on the path but not installed")
    assert version == tempops.__version__


def test_readme(monkeypatch):
    readme = (ROOT / "README.md").read_text()
    for section, names in (("Ops", tempops.ops.__all__), ("Models", tempops.models.list_models())):
        text = re.search(rf"^## {section}$(.*?)^## ", readme, flags=re.MULTILINE | re.DOTALL)[1]
        assert sorted(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)) == sorted(names)
    monkeypatch.chdir(ROOT)
    for example in re.findall(r"^```python\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL):
        exec(example, {})


# What runs before a build is tested on stand-ins for setuptools, which need not be installed, and for torch.

SETUPTOOLS = {
    "setuptools/__init__.py": "Extension = setup = lambda **arguments: None",
    "setuptools/build_meta.py": "def get_requires_for_build_wheel(settings=None): return ['other']",
}


def build_python(tmp_path, code, *, files=SETUPTOOLS, **env):
    """Runs code in the root of the project with `files` in front of the path."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    env = {**{k: v for k, v in os.environ.items() if k != "CXX"}, "PYTHONPATH": str(tmp_path), **env}
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, 'tools')\n{code}"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


COMPILER = "tempops needs a C++20 compiler: "
OLD_TORCH = {"torch-2.4.0.dist-info/METADATA": "Name: torch\nVersion: 2.4.0\n"}


@pytest.mark.parametrize(
    "sentence, code, setting",
    [
        (COMPILER + "c++, g++, clang++ not found.", "", {"PATH": "/nowhere"}),
        (COMPILER + "nonsense not found.", "", {"CXX": "nonsense"}),
        (COMPILER + "false does not compile C++20.", "", {"CXX": "false"}),
        ("tempops needs torch 2.11 or newer, this environment has 2.4.0", "", {"files": {**SETUPTOOLS, **OLD_TORCH}}),
        ("tempops needs Python 3.10 or newer, this is 3.9", "sys.version_info, sys.version = (3, 9), '3.9'", {}),
        ("tempops needs Python's headers", "import sysconfig; sysconfig.get_path = lambda name: '/nowhere'", {}),
    ],
    ids=["no compiler", "wrong CXX", "old compiler", "old torch", "old Python", "no Python.h"],
)
def test_what_is_missing_is_said_in_one_sentence(tmp_path, sentence, code, setting):
    script = f"{code}\nimport runpy; sys.argv = ['setup.py', 'egg_info']; runpy.run_path('setup.py')"
    run = build_python(tmp_path, script, **setting)
    assert run.returncode == 1
    assert run.stderr.startswith(sentence) and run.stderr.count("\n") == 1, run.stderr


@pytest.mark.parametrize("forced", ("0", "1"))
def test_another_cuda_than_that_of_torch_is_said(tmp_path, forced):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.41'")
    nvcc.chmod(0o755)
    script = (
        "import runpy, torch; sys.argv = ['setup.py', 'egg_info']; torch.version.cuda = '13.0';"
        "print(runpy.run_path('setup.py')['find_nvcc']())"
    )
    run = build_python(tmp_path, script, CUDA_HOME=str(tmp_path), FORCE_CUDA=forced)
    said = "nvcc is of CUDA 12 and PyTorch of CUDA 13.0"
    if forced == "1":
        assert run.returncode == 1 and run.stderr.startswith(f"FORCE_CUDA=1, but {said}: install"), run.stderr
    else:
        assert run.stdout == f"(None, '{said} when tempops was built')\n", run.stdout + run.stderr


def test_the_build_sees_the_torch_of_the_environment(tmp_path):
    hidden = (
        "import sys; from importlib.util import find_spec; print(find_spec('torch'));"
        "sys.path.insert(0, 'tools'); import backend;"
        "print(find_spec('torch').origin, backend.get_requires_for_build_wheel())"
    )
    # A build environment hides the user's packages, as -S does here.
    run = build_python(tmp_path, f"import subprocess; subprocess.run([sys.executable, '-S', '-c', {hidden!r}])")
    assert run.stdout == f"None\n{TORCH / '__init__.py'} ['other']\n", run.stdout + run.stderr


def test_the_build_asks_for_torch_where_there_is_none(tmp_path):
    code = (
        "import backend; backend.has_torch = lambda: False;"
        "print(backend.get_requires_for_build_editable(), backend.get_requires_for_build_sdist())"
    )
    assert build_python(tmp_path, code).stdout == "['other', 'torch>=2.11'] []\n"
