"""What every test gets: fixed seeds, and uninitialised memory filled with NaN so that an unwritten output shows."""

import os

import inputs
import pytest
import torch
from cases import why_not

from tempops import _backend  # the library of schemas comes before what overrides its kernels

if os.environ.get("TEMPOPS_CUDA_SIM"):  # the CUDA kernels, run by this processor (tests/cuda_sim)
    torch.ops.load_library(os.environ["TEMPOPS_CUDA_SIM"])


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)
    # Eager itself has no deterministic form of everything on a GPU.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def on_its_device(request, monkeypatch):
    """A test of a GPU's back end makes its tensors there, and is skipped where the back end has not the op."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    backend, case = parameters.get("backend"), parameters.get("case")
    if backend in inputs.GPU and not inputs.INTERPRETED:
        if reason := why_not(backend, case.op, "cuda") if case else _backend.why_not(backend):
            pytest.skip(reason)
        monkeypatch.setattr(inputs, "DEVICE", "cuda")
