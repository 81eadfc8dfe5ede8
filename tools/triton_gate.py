"""Compiles every Triton kernel, or those of the ops that are named, for 8.0 and 9.0 as the tests' cases launch it.

Needs Triton, no GPU. The ops run on tensors without memory; in place of a launch the kernel is compiled, for the
arguments' types and for what Triton would find out about their values. Fails where a kernel has local memory, spills
registers or takes more shared memory than there is, where one that is to move 16 bytes at a time does not, and where a
matrix product does without the instructions that Hopper has for it.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cases import CASES
from inputs import as_tuple, make

import tempops
from tempops import _backend
from tempops.ops._contract import Shape
from tempops.triton import _common

SHAPE = Shape(2, 8, 128, 16, 16)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
PRODUCTS = ("product_kernel", "weight_kernel")
SPILLED = 16  # bytes: ptxas puts a number or two aside around a whole loop, which costs nothing
HELD = {  # those of kernels that use all they may, on one architecture or on both
    "conv_backward_kernel": 128,
    "bidirectional_backward_kernel": 32,
    "product_kernel 80": 88,  # where sums are kept in registers beside the factors
    "weight_kernel 80": 56,
}
SHARED = {80: 166912, 90: 232448}  # bytes that a block may have
STAGES = ((64, 64), (256, 64), (512, 128), (512, 256), (1024, 256), (2048, 512))  # C, Cout of shift_conv1x1 in a ResNet

# The widest load and store, in bytes, of kernels some of whose variants do without 16, and why.
LEAST = {
    "total_kernel": (0, 0),  # a few numbers
    "gate_kernel": (0, 0),  # a few numbers
    "mix_kernel": (0, 0),  # the few features of a clip
    "rows_kernel": (0, 0),
    "mix_backward_kernel": (0, 0),
    "conv_backward_kernel": (16, 0),  # without dx, it writes sums only
    "cosine_kernel": (16, 0),  # the similarity is one number a pixel
    "difference_kernel": (0, 0),  # planar windows of three columns: what neighbours read does not lie side by side
    "gradient_kernel": (0, 16),  # neighbours read the same window's gradient
    "enhance_3_kernel fp32": (8, 8),  # in channels_last, a thread has two channels of four pixels
    "enhance_3_kernel bf16": (4, 4),
    "enhance_3_backward_kernel fp32": (8, 8),
    "enhance_3_backward_kernel bf16": (4, 4),
    "bidirectional_kernel fp32": (8, 8),
    "bidirectional_kernel bf16": (4, 4),
    "bidirectional_backward_kernel fp32": (8, 0),  # without dx, it writes sums only
    "bidirectional_backward_kernel bf16": (4, 0),
    "product_kernel fp32": (0, 16),  # Hopper multiplies tf32 K first: what lies otherwise is turned by 4-byte copies
    "weight_kernel fp32": (0, 16),
}


class Entries(TorchDispatchMode):
    """Runs the Triton entries themselves on tensors without memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tempops_triton":
            return _common.entries[func._schema.name.split("::")[1]](*args)
        return func(*args, **(kwargs or {}))


class Launch:
    """Stands in for a wrapped kernel and keeps what it is launched with, by what Triton compiles for."""

    kept: dict[str, tuple] = {}  # noqa: RUF012

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **named):
        values = dict(zip(self.kernel.arg_names, args)) | named
        options = {name: values.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in values}
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, values[parameter.name]
            specialized = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (specialized and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(place,)] = f"*{DTYPES[value.dtype]}", [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if specialized and value % 16 == 0:
                    attributes[(place,)] = [["tt.divisibility", 16]]
        what = (self.kernel, signature, constants, attributes, options)
        Launch.kept[f"{self.kernel.__name__} {what[1:]}"] = what


def launches() -> list[tuple]:
    """What all cases launch, forward, backward and double backward, and the products of a ResNet's stages."""
    torch.library.wrap_triton = Launch
    _backend._choice.name = "triton"
    for case in CASES:
        if sys.argv[1:] and case.name.split("-")[0] not in sys.argv[1:]:
            continue
        shape = SHAPE._replace(C=160) if case.channel_divisor == 5 else SHAPE
        layouts = ("contiguous",) if case.ranks == (2,) else ("contiguous", "channels_last")
        for layout in layouts:
            for dtype in (torch.float32, torch.bfloat16):
                x, n_segment, *others = make(case, shape, layout, dtype)
                x, *others = (a.detach().to("meta").requires_grad_() for a in (x, *others))
                with Entries():
                    outs = as_tuple(case.call(x, n_segment, *others))
                    grads = [torch.empty_like(out, requires_grad=True) for out in outs]
                    dins = torch.autograd.grad(outs, (x, *others), grads, create_graph=True)
                    ddins = [torch.empty_like(d) for d in dins]
                    torch.autograd.grad(dins, (x, *others, *grads), ddins, allow_unused=True)
    if not sys.argv[1:] or "shift_conv1x1" in sys.argv[1:]:
        for (C, Cout), dtype in itertools.product(STAGES, (torch.float32, torch.bfloat16)):
            x = torch.empty(96, C, 14, 14, dtype=dtype, device="meta", memory_format=torch.channels_last)
            weight = torch.empty(Cout, C, 1, 1, dtype=dtype, device="meta")
            inputs = [x.requires_grad_(), weight.requires_grad_()]
            with Entries():
                y = tempops.shift_conv1x1(*inputs, None, 8)
                torch.autograd.grad(y, inputs, torch.empty_like(y))
    return list(Launch.kept.values())


def compiled(job: tuple[int, int]) -> tuple:
    """Of one launch and architecture: registers, shared, local and spilled memory, widest load and store, wgmma."""
    index, architecture = job
    kernel, signature, constants, attributes, options = LAUNCHES[index]
    source = ASTSource(kernel, signature, constants, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(result.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    ptx = result.asm["ptx"]

    def widest(access: str) -> int:
        found = re.findall(rf"\b{access}\.global\S*?((?:\.v\d)?)\.[bf](\d+)", ptx)
        found += [("", "128")] if access == "ld" and "cp.async.cg.shared.global" in ptx else []
        return max((int(v[2:] or 1) * int(bits) // 8 for v, bits in found), default=0)

    local = len(re.findall(r"\b(?:ld|st)\.local|\.local \.", ptx))
    memory = result.metadata.shared, local, usage["STACK"] + usage["LOCAL"]
    return usage["REG"], *memory, widest("ld"), widest("st"), ptx.count("wgmma.mma_async")


LAUNCHES = launches()


def main() -> None:
    """Prints the table; exits with 1 where a kernel fails."""
    jobs = [(index, architecture) for index in range(len(LAUNCHES)) for architecture in (80, 90)]
    with ProcessPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        rows = list(pool.map(compiled, jobs))
    heads = ("arch", "variants", "registers", "shared", "local", "spilled", "load", "store", "wgmma")
    print(f"{'kernel':32}{'element':>8}" + "".join(f"{head:>10}" for head in heads))
    table = {}
    for (index, architecture), row in zip(jobs, rows):
        kernel, signature, *_ = LAUNCHES[index]
        element = next(kind for kind in signature.values() if kind.startswith("*"))[1:]
        table.setdefault((kernel.__name__, element, architecture), []).append(row)
    failed = []
    for (name, element, architecture), found in table.items():
        registers, shared, local, spilled, load, store, wgmma = zip(*found)
        most = (max(registers), max(shared), max(local), max(spilled))
        numbers = (architecture / 10, len(found), *most, min(load), min(store), min(wgmma))
        line = f"{name:32}{element:>8}" + "".join(f"{number:10}" for number in numbers)
        print(line)
        least = LEAST.get(name) or LEAST.get(f"{name} {element}", (16, 16))
        slow = name in PRODUCTS and architecture == 90 and min(wgmma) == 0
        narrow = min(load) < least[0] or min(store) < least[1]
        large = max(shared) > SHARED[architecture]
        held = HELD.get(name) or HELD.get(f"{name} {architecture}", SPILLED)
        if max(local) or max(spilled) > held or narrow or slow or large:
            failed.append(line)
    if failed:
        what = "local memory, more than a few bytes spilled, too much shared, or accesses narrower than they should be:"
        sys.exit("\n".join([what, *failed]))


if __name__ == "__main__":
    main()
