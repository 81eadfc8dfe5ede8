"""Which back end runs an op: the libraries that loaded, the automatic choice, `backend(...)`, `TEMPOPS_BACKEND`."""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import _C

BACKENDS = ("eager", "cpu", "cuda", "triton")


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


def _constant(function: Callable) -> Callable:
    """The function called once for each argument, and a constant to torch.compile, which would look through a cache."""
    cached = functools.cache(function)

    @torch.compiler.assume_constant_result
    def constant(*args):
        return cached(*args)

    constant.cache_clear = cached.cache_clear
    return constant


@_constant
def _load_triton() -> str | None:
    """Imports the Triton ops, when they are asked for first; returns why they could not be, or None."""
    try:
        from . import triton  # noqa: F401
    except ModuleNotFoundError as error:
        return "Triton is not installed" if error.name == "triton" else f"Triton does not import: {error}"
    except ImportError as error:
        return f"Triton does not import: {error}"
    return None


@_constant
def _triton_interprets() -> bool:
    """Whether the Triton kernels, which are loaded, run in Triton's interpreter (TRITON_INTERPRET=1)."""
    from . import triton

    return triton.INTERPRETED


def why_not(name: str) -> str | None:
    """Why the back end cannot be used here, in a few words; None where it can."""
    no_gpu = _too_old() if torch.cuda.is_available() else "PyTorch finds no GPU"
    if name == "cuda":
        return _cuda_missing or no_gpu
    if name == "triton":
        return _load_triton() or (None if _triton_interprets() else no_gpu)
    return None


@functools.cache
def _too_old() -> str | None:
    """Why none of the GPUs here runs the kernels; None where one does, or where there is no GPU."""
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if capabilities and max(capabilities) < (8, 0):
        return "the GPU has compute capability {}.{}, and the kernels need 8.0".format(*max(capabilities))
    return None


@_constant
def why_not_on_cuda(op: str) -> str | None:
    """Why no CUDA kernels run an op here; None where they do."""
    if reason := _cuda_missing or _too_old():
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"tempops::{op}", "CUDA"):
        return f"this version of tempops has no CUDA kernels of {op}"
    return None


@_constant
def _on_cuda(op: str) -> str | None:
    """The namespace that runs an op on a GPU where nobody chose; None, with a warning the first time, for eager.

    A choice by dtype, layout or size belongs here.
    """
    no_cuda, no_triton = why_not_on_cuda(op), _too_old() or _load_triton()
    if no_cuda is None:
        return "tempops"
    if no_triton is None:
        return "tempops_triton"
    reasons = "; ".join(dict.fromkeys((no_cuda, no_triton)))
    warnings.warn(f"tempops.{op} runs in eager PyTorch on the GPU: {reasons}", stacklevel=4)
    return None


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


def namespace(device: str, op: str) -> str | None:
    """The torch.ops namespace that runs an op on tensors of a type of device; None for eager.

    Raises:
        RuntimeError: the chosen back end does not take tensors of the device, or has no such op.
    """
    chosen = _choice.name
    if chosen is None:
        if device == "cuda":
            return _on_cuda(op)
        return "tempops" if device in ("cpu", "meta") else None
    if chosen == "eager":
        return None
    takes = (chosen, "meta")
    if chosen == "triton":
        takes = ("cuda", "cpu", "meta") if _triton_interprets() else ("cuda", "meta")
    if device not in takes:
        raise RuntimeError(f"the back end {chosen!r} does not take {device} tensors")
    if chosen == "cuda" and why_not_on_cuda(op):
        raise RuntimeError(f"the back end 'cuda' is not available: {why_not_on_cuda(op)}")
    return "tempops_triton" if chosen == "triton" else "tempops"


def choose_from_environment() -> None:
    """Makes the choice of TEMPOPS_BACKEND; called when the ops are there."""
    if os.environ.get("TEMPOPS_BACKEND"):
        _choice.name = _check(os.environ["TEMPOPS_BACKEND"], "TEMPOPS_BACKEND")
