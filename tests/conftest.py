"""What every test gets: fixed seeds, and uninitialised memory filled so that an unwritten output shows.

A run of all the tests is spread over the cores.
"""

import ctypes
import os

import inputs
import pytest
import torch
from cases import why_not

from tempops import _backend  # the library of schemas comes before what overrides its kernels

if os.environ.get("TEMPOPS_CUDA_SIM"):  # the CUDA kernels, run by this processor (tests/cuda_sim)
    torch.ops.load_library(os.environ["TEMPOPS_CUDA_SIM"])


# PyTorch fills only what its own torch.empty makes: the C library (glibc alone can) fills all memory, with -1.7e38.
M_PERTURB = -6
if hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(M_PERTURB, 1)

MOST_PROCESSES = 4  # each imports torch and compiles


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` without files or names takes `-n` by itself; on a GPU there is one device for all."""
    everything = config.args == config.getini("testpaths") and not config.getoption("keyword")
    undecided = config.getoption("numprocesses", 0) is None and not hasattr(config, "workerinput")
    if everything and undecided and not config.getoption("usepdb") and not torch.cuda.is_available():
        config.option.numprocesses = min(os.cpu_count() or 1, MOST_PROCESSES)
        config.option.dist = "worksteal"
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # their threads are more than the cores


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)
    # Eager itself has no deterministic form of everything on a GPU.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    """On a GPU eager's convolutions are otherwise of TF32, and so is the error that the ops' is compared with."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def on_its_device(request, monkeypatch):
    """A test of a GPU's back end makes its tensors there, and is skipped where the back end has not the op."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    backend, case = parameters.get("backend"), parameters.get("case")
    if backend in inputs.GPU and not inputs.INTERPRETED:
        if reason := why_not(backend, case.op, "cuda") if case else _backend.why_not(backend):
            pytest.skip(reason)
        monkeypatch.setattr(inputs, "DEVICE", "cuda")
