"""`python -m tempops`: what was built and which back ends are usable here."""

import platform

import torch

from . import _C, __version__
from ._backend import BACKENDS, why_not


def rows() -> list[tuple[str, str]]:
    """What is printed, as pairs of a name and a fact."""
    return [
        ("tempops", __version__),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("built by", f"{_C.compiler}, against torch {_C.torch_version}"),
        ("CPU instruction sets", f"{', '.join(_C.instruction_sets)}; in use: {_C.instruction_set()}"),
        ("CUDA architectures", _C.cuda_architectures or f"none: {_C.why_no_cuda}"),
        *((f"back end {name}", f"not usable: {why}" if (why := why_not(name)) else "usable") for name in BACKENDS),
    ]


if __name__ == "__main__":
    print("\n".join(f"{name:20}  {fact}" for name, fact in rows()))
