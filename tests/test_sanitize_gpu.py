"""tools/sanitize_gpu.py without a GPU: what it runs, that it stops at the first finding, what it says is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import sanitize_gpu  # noqa: E402

STAND_IN = """#!/bin/sh
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >>"$SEEN"
case "$2" in
  "$FINDS") echo "ERROR SUMMARY: 1 error"; exit 1;;
  "$SKIPS") echo "40 skipped in 1s";;
  *) echo "40 passed in 1s";;
esac
"""


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the script with a stand-in for compute-sanitizer; returns which of its tools ran, and what is said last."""
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(STAND_IN)
    sanitizer.chmod(0o755)
    seen = tmp_path / "seen"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setattr(sanitize_gpu, "why_not", lambda: None)

    def run(*arguments, finds="", skips=""):
        monkeypatch.setenv("FINDS", finds)
        monkeypatch.setenv("SKIPS", skips)
        monkeypatch.setattr(sys, "argv", ["sanitize_gpu.py", *arguments])
        seen.write_text("")
        try:
            sanitize_gpu.main()
            said = None
        except SystemExit as end:
            said = end.code
        lines = seen.read_text().splitlines()
        for line in lines:
            assert line.startswith("1 --tool ") and " --error-exitcode 1 " in line and sanitize_gpu.TESTS in line
        return [line.split()[2] for line in lines], said

    return run


def test_every_tool_runs_and_the_first_finding_ends_it(run):
    assert run() == (["memcheck", "racecheck", "initcheck", "synccheck"], None)
    assert run("initcheck", "-k", "cuda") == (["initcheck"], None)
    assert run(finds="racecheck") == (["memcheck", "racecheck"], "racecheck found something, or a test failed under it")
    assert run(skips="memcheck") == (["memcheck"], "not checked: no test ran under memcheck")
    assert run("leakcheck") == ([], 2)


def test_what_it_runs_is_there():
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", sanitize_gpu.TESTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert collected.returncode == 0 and "test_small[" in collected.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "tools/sanitize_gpu.py"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "not checked: PyTorch finds no GPU\n")
