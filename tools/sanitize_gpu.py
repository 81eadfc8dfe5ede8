"""Runs one small shape of every op, forward and backward, on the GPU under each tool of compute-sanitizer.

    python tools/sanitize_gpu.py                        # memcheck, racecheck, initcheck, synccheck
    python tools/sanitize_gpu.py memcheck -k "cuda and temporal_conv"

Stops at the first tool that finds something, or under which a test fails. PyTorch's caching allocator, which would hide
an access past the end of a tensor, is turned off.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tempops import _backend

ROOT = Path(__file__).parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TESTS = "tests/test_gpu.py::test_small"


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH, in CUDA_HOME, or beside nvcc."""
    nvcc = shutil.which("nvcc")
    folders = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(str(Path(folder, "bin")) for folder in folders if folder)])
    return shutil.which("compute-sanitizer", path=path)


def why_not() -> str | None:
    """Why nothing can be checked here; None where it can."""
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    reasons = {name: _backend.why_not(name) for name in ("cuda", "triton")}
    if all(reasons.values()):
        return ", ".join(f"no back end {name}: {reason}" for name, reason in reasons.items())
    return None if find_sanitizer() else "there is no compute-sanitizer: it comes with the CUDA toolkit"


def main() -> None:
    """Exits with 1 and a sentence where something is found, or nothing can be checked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tools", nargs="*", metavar="tool", help=f"of {', '.join(TOOLS)}; default: all")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="which tests, as pytest's -k")
    chosen = parser.parse_args()
    if unknown := set(chosen.tools) - set(TOOLS):
        parser.error(f"no tool of compute-sanitizer: {', '.join(sorted(unknown))}")
    if reason := why_not():
        sys.exit(f"not checked: {reason}")
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", TESTS, "-k", chosen.k]
    for tool in chosen.tools or TOOLS:
        print(f"== {tool}", flush=True)
        command = [find_sanitizer(), "--tool", tool, "--error-exitcode", "1", *tests]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        output = []
        for line in run.stdout:
            print(line, end="", flush=True)
            output.append(line)
        if run.wait():
            sys.exit(f"{tool} found something, or a test failed under it")
        if not re.search(r"\b[1-9]\d* passed", "".join(output)):
            sys.exit(f"not checked: no test ran under {tool}")


if __name__ == "__main__":
    main()
