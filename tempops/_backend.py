"""Which back end runs an op: the libraries that loaded, the automatic choice, `backend(...)`, `TEMPOPS_BACKEND`."""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import _C

BACKENDS = ("eager", "cpu", "cuda", "triton")

# The torch.ops namespaces that hold compiled ops. C++ CPU and CUDA kernels share one: the tensor's device decides.
NAMESPACES = ("tempops",)


class _Choice:
    """What was asked for; None for the automatic choice. A plain attribute: torch.compile guards on it."""

    name: str | None = None


_choice = _Choice()


def _load(library: str) -> str | None:
    """Loads a library of ops that lies beside this file; returns why it could not be, or None."""
    paths = sorted(Path(__file__).parent.glob(f"{library}.*"))
    binaries = [path for path in paths if path.suffix in (".so", ".dylib", ".pyd")]
    if not binaries:
        return f"tempops.{library} was not built"
    try:
        torch.ops.load_library(str(binaries[0]))
    except OSError as error:
        return f"{binaries[0].name} does not load: {error}"
    return None


_cpu_missing = _load("_C_cpu")
if _cpu_missing:
    # Without it there are no schemas, so no op of any compiled back end.
    raise ImportError(f"{_cpu_missing}; install tempops again with: pip install -e . (or pip install tempops)")


def _load_cuda() -> str | None:
    """Loads the CUDA ops; returns why they could not be, or None."""
    if not _C.cuda_architectures:
        return _C.why_no_cuda
    if torch.version.cuda is None:
        return "this PyTorch is a CPU build"
    return _load("_C_cuda")


_cuda_missing = _load_cuda()


def why_not(name: str) -> str | None:
    """Why the back end cannot be used here, in a few words; None where it can."""
    if name == "cuda":
        return _cuda_missing or (None if torch.cuda.is_available() else "PyTorch finds no GPU")
    if name == "triton":
        return "this version of tempops has no Triton kernels"
    return None


@torch.compiler.assume_constant_result
@functools.cache
def why_not_on_cuda(op: str) -> str | None:
    """Why no CUDA kernels run an op here; None where they do."""
    if _cuda_missing:
        return _cuda_missing
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"tempops::{op}", "CUDA"):
        return f"this version of tempops has no CUDA kernels of {op}"
    return None


@torch.compiler.assume_constant_result
@functools.cache
def _warn_of_eager(op: str) -> None:
    warnings.warn(f"tempops.{op} runs in eager PyTorch on the GPU: {why_not_on_cuda(op)}", stacklevel=3)


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    reason = why_not(name)
    if reason is not None:
        raise RuntimeError(f"the back end {name!r} is not available: {reason}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the ops called inside on one back end: "eager", "cpu", "cuda" or "triton".

    The backward and double backward of a result run on the back end that was chosen here, wherever they are called.
    Like PyTorch's own back-end flags, the choice holds for the whole process, not for the thread. The environment
    variable TEMPOPS_BACKEND makes it from the start.

    Raises:
        ValueError: `name` is no back end.
        RuntimeError: the back end is not available here; the message says why.
    """
    before, _choice.name = _choice.name, _check(name, "backend")
    try:
        yield
    finally:
        _choice.name = before


def namespace(x: Tensor, op: str) -> str | None:
    """The torch.ops namespace that runs an op on x; None for eager.

    Raises:
        RuntimeError: the chosen back end does not take tensors of x's device, or has no such op.
    """
    chosen = _choice.name
    device = x.device.type
    if chosen is None:
        if device == "cuda" and why_not_on_cuda(op):
            _warn_of_eager(op)
            return None
        return "tempops" if device in ("cpu", "cuda", "meta") else None
    if chosen == "eager":
        return None
    if device not in (chosen, "meta"):
        raise RuntimeError(f"the back end {chosen!r} does not take {device} tensors")
    if chosen == "cuda" and why_not_on_cuda(op):
        raise RuntimeError(f"the back end 'cuda' is not available: {why_not_on_cuda(op)}")
    return "tempops"


if os.environ.get("TEMPOPS_BACKEND"):
    _choice.name = _check(os.environ["TEMPOPS_BACKEND"], "TEMPOPS_BACKEND")
