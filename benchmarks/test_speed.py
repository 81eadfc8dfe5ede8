"""Every op, forward and backward, beside eager PyTorch, torch.compile and a copy of the same bytes.

Each implementation runs three times before it is timed, so memory is warm; figures are medians of single calls. The
implementations of a comparison run one right after the other. Backward is `torch.autograd.grad` of every tensor
argument, with a fixed random gradient and the graph retained.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from activations import SIZES, activations
from cases import CASES, Case
from report import DIRECTIONS, LAYOUTS, Row
from torch import Tensor

import tempops
from tempops.ops._contract import Shape

TIMED = {case.name: case for case in CASES if case.benchmark}
SEGMENTS = 8
SECONDS = 0.1  # of timed calls, for each implementation of a comparison
ROUNDS = (5, 100)  # at least, at most
DTYPES = ("float32", "bfloat16", "float16", "float64")

# Each compilation takes seconds: by default an early stage in one layout and a late stage in the other.
COMPILED = {"256x56": "contiguous", "1024x14": "channels_last", "15x224": "contiguous"}
IMPLEMENTATIONS = ("compile", "cpu", "eager", "copy")

# PyTorch's own, on the first compilation.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Point(NamedTuple):
    """What the implementations of one comparison share."""

    op: str
    direction: str
    layout: str
    dtype: str
    shape: str

    def __str__(self) -> str:
        return "-".join(self)


def points(full: bool) -> list[Point]:
    return [
        Point(op, direction, layout, dtype, shape)
        for op, case in TIMED.items()
        for dtype in (DTYPES if full else DTYPES[:1])
        for direction in DIRECTIONS
        for layout in LAYOUTS
        for shape in case.activations
        if layout == "contiguous" or _has_layout(case, shape)
    ]


def _has_layout(case: Case, shape: str) -> bool:
    return case.from_activation(torch.empty(SIZES[shape], device="meta")).dim() == 4


def _compiled(point: Point) -> bool:
    """Whether torch.compile is timed here by default."""
    if _has_layout(TIMED[point.op], point.shape):
        return COMPILED.get(point.shape) == point.layout
    return point.shape in COMPILED


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    chosen = [
        (*point, name)
        for point in points(full)
        for name in IMPLEMENTATIONS
        if name != "compile" or full or _compiled(point)
    ]
    metafunc.parametrize((*Point._fields, "implementation"), chosen, ids=map("-".join, chosen))


@pytest.mark.benchmark(disable_gc=True)
def test_speed(
    benchmark, rows: dict, op: str, direction: str, layout: str, dtype: str, shape: str, implementation: str
) -> None:
    point = Point(op, direction, layout, dtype, shape)
    x, others, grads, traffic = inputs(point)
    with tempops.backend("cpu" if implementation == "cpu" else "eager"):
        prepared = prepare(implementation, point, x, others, grads, traffic)

        def call() -> None:
            prepared()  # the results are dropped: kept through the next round, they would have it write to cold memory

        call()  # compiles, or touches memory for the first time
        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        rounds = min(max(int(SECONDS / once), ROUNDS[0]), ROUNDS[1])
        benchmark.group = str(point)
        benchmark.extra_info["bytes"] = traffic
        benchmark.pedantic(call, rounds=rounds)
    if benchmark.enabled:
        row = rows.setdefault(point, Row(*point, TIMED[op].matmul, traffic))
        row.seconds[implementation] = benchmark.stats.stats.median


@functools.lru_cache(maxsize=1)
def inputs(point: Point) -> tuple[Tensor, tuple, tuple[Tensor, ...], int]:
    """x, the further arguments, the gradients of the outputs, and the bytes that the op must move."""
    op, direction, layout, dtype, shape = point
    case = TIMED[op]
    generator = torch.Generator().manual_seed(0)

    def laid_out(tensor: Tensor) -> Tensor:
        tensor = tensor.to(getattr(torch, dtype))
        if tensor.dim() == 4 and layout == "channels_last":
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor.requires_grad_(direction == "backward")

    x = laid_out(case.from_activation(activations()[shape]).clone())
    frames, *sizes = SIZES[shape]
    others = case.others(
        Shape(frames // SEGMENTS, SEGMENTS, *sizes), lambda *sizes: laid_out(torch.randn(sizes, generator=generator))
    )
    with tempops.backend("eager"), torch.no_grad():
        outputs = _tuple(case.call(x, SEGMENTS, *others))
    tensors = [x, *(other for other in others if isinstance(other, Tensor))]
    if direction == "forward":
        return x, others, (), _bytes(*tensors, *outputs, *[x] * case.rereads)
    grads = tuple(torch.empty_like(y).normal_(generator=generator) for y in outputs)
    # The gradients of the arguments are as large as the arguments.
    return x, others, grads, _bytes(*grads, *tensors, *([] if case.linear else tensors))


def prepare(implementation: str, point: Point, x: Tensor, others: tuple, grads: tuple, traffic: int) -> Callable:
    """What is timed: a function of no arguments."""
    if implementation == "copy":  # reads half of the bytes, writes the other half
        source = torch.ones(traffic // 2 // 4)
        return functools.partial(torch.empty_like(source).copy_, source)

    call = TIMED[point.op].call
    if implementation == "compile":
        torch.compiler.reset()
        torch._inductor.config.compile_threads = 1  # no pool of processes that starts while other things are timed
        call = torch.compile(call, fullgraph=True, dynamic=False)
    if point.direction == "forward":
        return functools.partial(call, x, SEGMENTS, *others)

    # A compiled backward may otherwise overwrite what the graph keeps.
    with torch._functorch.config.patch(donated_buffer=False):
        outputs = _tuple(call(x, SEGMENTS, *others))
    arguments = [x, *(other for other in others if isinstance(other, Tensor))]
    return functools.partial(torch.autograd.grad, outputs, arguments, grads, retain_graph=True)


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)
