"""The CUDA kernels without a GPU: the simulator finds planted faults, and the kernels pass the ops' own tests in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "cuda_sim"))
sys.path.insert(0, str(HERE.parent / "tools"))
from cuda_gate import split_stores  # noqa: E402

from build import CSRC, build, build_planted  # noqa: E402

compiler = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which(os.environ.get("CXX", "c++").split()[0]),
    reason="needs Linux and a C++ compiler",
)


def _sanitizes(folder: Path, sanitizer: str) -> bool:
    """Whether this compiler has the sanitizer, and this system runs it."""
    (folder / "empty.cpp").write_text("int main() {}")
    command = [*os.environ.get("CXX", "c++").split(), f"-fsanitize={sanitizer}", "empty.cpp", "-o", "empty"]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode:
        return False
    return subprocess.run([folder / "empty"], capture_output=True).returncode == 0


@compiler
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_planted_faults_are_found(tmp_path, sanitizer):
    if not _sanitizes(tmp_path, sanitizer):
        pytest.skip(f"the C++ compiler has no {sanitizer} sanitizer that runs here")
    program = build_planted(tmp_path, sanitizer)
    found = {
        "none": "",
        "no first barrier": "data race" if sanitizer == "thread" else "",
        "no second barrier": "data race" if sanitizer == "thread" else "",
        "shuffle for a barrier": "data race" if sanitizer == "thread" else "",
        "part of a warp": "without all its threads",
        "off by one": "heap-buffer-overflow" if sanitizer == "address" else "",
        "misaligned": "misaligned address" if sanitizer == "address" else "",
        "no wait": "wrong result" if sanitizer == "address" else "",
        "misaligned copy": "misaligned address of an asynchronous copy",
    }
    for fault, message in found.items():
        run = subprocess.run([program, fault], capture_output=True, text=True)
        assert (run.returncode != 0) == bool(message) and message in run.stderr, (fault, run.stderr)


@compiler
def test_kernels_pass_the_tests_of_the_ops(tmp_path):
    """In odd shapes, the smallest; all shapes, sanitizers and other tests: .ci/cuda."""
    library = build(tmp_path)
    names = " or ".join(path.parent.name for path in CSRC.glob("*/cuda.cu"))
    command = [sys.executable, "-m", "pytest", "-qxs", "-p", "no:cacheprovider", str(HERE / "test_ops.py")]
    select = f"({names} or temporal_cosine) and test_shapes and 13"  # channels
    environment = os.environ | {"TEMPOPS_CUDA_SIM": str(library)}
    run = subprocess.run([*command, "-k", select], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "Overriding a previously registered kernel" in run.stdout + run.stderr  # so it was the CUDA kernels that ran


def test_split_stores_are_found():
    head = ".visible .entry _ZN7tempops39_GLOBAL__N__f2859e01_7_cuda_cu_8e8b8df411conv_kernelIfLi4ELi3EEvi(\n"
    whole = "".join(f"\tst.global.v4.b32 [%rd{i}], {{%r1, %r2, %r3, %r4}};\n" for i in range(4))
    split = "".join(f"\tst.global.f32 \t[%rd2+{4 * i}], %f{i};\n" for i in range(-2, 2))
    apart = "\tst.global.u16 [%rd2], %rs1;\n\tst.global.u16 [%rd2+64], %rs2;\n"
    assert split_stores(head + whole + apart + head + apart) == []
    assert split_stores(head + whole + head + split) == ["conv_kernel"]
