"""What every test gets: fixed seeds, and uninitialised memory filled with NaN so that an unwritten output shows."""

import os

import pytest
import torch

import tempops  # noqa: F401, the library of schemas comes before what overrides its kernels

if os.environ.get("TEMPOPS_CUDA_SIM"):  # the CUDA kernels, run by this processor (tests/cuda_sim)
    torch.ops.load_library(os.environ["TEMPOPS_CUDA_SIM"])


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
