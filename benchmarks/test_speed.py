"""Every op, forward and backward, beside eager PyTorch, torch.compile and a copy of the same bytes.

Each implementation runs twice or more before it is timed. On the CPU the implementations of a comparison take turns; on
a GPU one is timed after the other, what torch.compile makes at the end of the run. Backward is `torch.autograd.grad` of
every tensor argument, with a fixed random gradient and the graph retained. What a call costs the host is a figure of
its own.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import devices
import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from activations import SIZES, activations
from cases import CASES, Case
from report import DIRECTIONS, LAYOUTS, Overhead, Row
from torch import Tensor
from turns import Clock, Prepared, compared, gc_paused, parameters_of

import tempops
from tempops.ops._contract import Shape

TIMED = {case.name: case for case in CASES if case.benchmark}
SEGMENTS = 8
FULL = ("float32", "bfloat16", "float16", "float64")

# Each compilation takes seconds: by default an early stage in one layout and a late stage in the other.
COMPILED = {"256x56": "contiguous", "1024x14": "channels_last", "15x224": "contiguous"}
FIRST = ("256x56", "15x224")  # those of them at which it is also timed in other dtypes, and with max-autotune
MODES = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}  # the graph is the benchmark's own

clock = Clock()
KILOBYTE = Shape(1, 4, 16, 2, 2)  # in float32
CALLS, ROUNDS = 500, 9  # of the median of the host's time of a call

Source = Callable[[], dict[str, Tensor]]  # as `activations`

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


class Set(NamedTuple):
    """The tensors of one call: x, the further arguments, the gradients of the outputs (none for a forward)."""

    x: Tensor
    others: tuple
    grads: tuple[Tensor, ...]


def points(dtypes: tuple[str, ...]) -> list[Point]:
    return [
        Point(op, direction, layout, dtype, shape)
        for op, case in TIMED.items()
        for dtype in dtypes
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


def implementations(device: devices.Cpu, point: Point, full: bool) -> Iterator[str]:
    """What is timed at a point: compiled baselines, back ends of tempops, the other baselines."""
    tested = device.tested(TIMED[point.op].op)
    if not tested:
        return
    for name, dtypes in device.compiled.items():
        chosen = point.dtype in dtypes and _compiled(point) and (point.dtype == "float32" or point.shape in FIRST)
        if full or chosen:
            yield name
    yield from tested
    yield from (name for name in device.baselines if name != "conv" or TIMED[point.op].conv)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, full = metafunc.config.stash[devices.key], metafunc.config.getoption("--full")
    if metafunc.function is test_speed:
        chosen = [
            (*point, name)
            for point in points(FULL if full else device.dtypes)
            for name in implementations(device, point, full)
        ]
        if device.compiled_last:
            chosen.sort(key=lambda c: (1 + list(MODES).index(c[-1]), FULL.index(c[3])) if c[-1] in MODES else (0, 0))
        metafunc.parametrize((*Point._fields, "implementation"), chosen, ids=map("-".join, chosen))
    else:
        tested = {op: device.tested(case.op) for op, case in TIMED.items()}
        chosen = [(op, name) for op, names in tested.items() for name in (names and ("eager", *names))]
        metafunc.parametrize(("op", "implementation"), chosen, ids=map("-".join, chosen))


def test_call(device, overheads, in_time, op: str, implementation: str) -> None:
    """What a call costs the host: the wall clock of many on a kilobyte, never waiting for the device.

    torch.add of the same x is timed in turn with it, as its measure.
    """
    case = TIMED[op]
    channels = KILOBYTE.C - KILOBYTE.C % case.channel_divisor
    n, t, c, h, w = shape = KILOBYTE._replace(C=channels)
    x = torch.randn(n * t, c, h, w, device=device.type)
    if case.ranks == (2,):
        x = x.view(-1, c)
        t = x.size(0)
    others = case.others(shape, functools.partial(torch.randn, device=device.type))
    calls = {"add": functools.partial(torch.add, x, x), "op": functools.partial(case.call, x, t, *others)}
    times = {name: [] for name in calls}
    with tempops.backend(implementation):
        for _ in range(1 + ROUNDS):
            for name, call in calls.items():
                times[name].append(_host_seconds(call, device))
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}  # the first to warm up
    overheads[op, implementation] = Overhead(op, implementation, medians["op"], medians["add"])


def _host_seconds(call: Callable, device: devices.Cpu) -> float:
    device.synchronize()
    with gc_paused():
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - start) / CALLS


@pytest.fixture(scope="session")
def compiled_ahead(request: pytest.FixtureRequest, bar) -> None:
    """On the CPU, fills torch.compile's cache on all cores: one compilation after the other takes minutes."""
    device = request.config.stash[devices.key]
    points = [
        Point(*(parameters[field] for field in Point._fields))
        for parameters in parameters_of(request.session)
        if parameters["implementation"] in device.compiled and "shape" in parameters
    ]
    processes = min(os.cpu_count() or 1, len(points) // 3, 8)
    if not device.in_turns or request.config.getoption("benchmark_disable") or processes < 2:
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawn) as pool:
        compiled = [pool.submit(compile_ahead, point) for point in points]
        try:
            activations()  # of the measurements, while one process after the other asks the compiler what it can do
            for done, future in enumerate(concurrent.futures.as_completed(compiled)):
                bar.say(f"torch.compile, {done + 1} of {len(points)}")
                if error := future.exception():
                    warnings.warn(f"torch.compile ahead of its turn failed: {error!r}", stacklevel=1)
        finally:
            pool.shutdown(cancel_futures=True)


def compile_ahead(point: Point) -> None:
    """In a process of its own, which is spared the network: code does not depend on what tensors hold."""
    prepare("compile", devices.Cpu(), point, blank).once()


def blank() -> dict[str, Tensor]:
    """In place of `activations`."""
    return {shape: torch.zeros(()).expand(sizes) for shape, sizes in SIZES.items()}


@pytest.mark.benchmark(timer=clock)
def test_speed(
    benchmark,
    request,
    device,
    rows,
    in_time,
    compiled_ahead,
    op: str,
    direction: str,
    layout: str,
    dtype: str,
    shape: str,
    implementation: str,
) -> None:
    point = Point(op, direction, layout, dtype, shape)
    back_ends = device.tested(TIMED[op].op)
    together = compared(request.session, **point._asdict()) if device.in_turns else (implementation,)
    if benchmark.disabled:
        return prepare(implementation, device, point).once()
    clock.tell(benchmark, measured(device, point, together)[implementation])
    seconds, traffic = benchmark.stats.stats.median, inputs(device, point)[1]
    # A baseline's time goes into the row of every back end.
    for back_end in back_ends:
        if implementation not in back_ends or implementation == back_end:
            row = rows.setdefault((point, back_end), Row(*point, back_end, TIMED[op].matmul, traffic))
            row.seconds["tempops" if implementation == back_end else implementation] = seconds


@functools.lru_cache(maxsize=1)
def measured(device: devices.Cpu, point: Point, together: tuple[str, ...]) -> dict[str, list[float]]:
    """The times of the implementations that are timed together."""
    return device.seconds({name: prepare(name, device, point) for name in together})


@functools.lru_cache(maxsize=1)
def inputs(device: devices.Cpu, point: Point, frames_of: Source = activations) -> tuple[list[Set], int]:
    """The sets of tensors that the calls take in turn, and the bytes that the op must move in one call."""
    op, direction, layout, dtype, shape = point
    case = TIMED[op]
    generator = torch.Generator(device.type).manual_seed(0)
    frames = device.frames(shape)
    sizes = SIZES[shape][1:]

    def laid_out(tensor: Tensor) -> Tensor:
        tensor = tensor.to(getattr(torch, dtype))
        if tensor.dim() == 4 and layout == "channels_last":
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor.requires_grad_(direction == "backward")

    def draw(*sizes: int) -> Tensor:
        return laid_out(torch.randn(sizes, generator=generator, device=device.type))

    def tensors() -> Set:
        x = laid_out(case.from_activation(_repeated(device, shape, frames_of)).clone())
        others = case.others(Shape(frames // SEGMENTS, SEGMENTS, *sizes), draw)
        if direction == "forward":
            return Set(x, others, ())
        return Set(x, others, tuple(torch.empty_like(y).normal_(generator=generator) for y in outputs(x, others)))

    def outputs(x: Tensor, others: tuple) -> tuple[Tensor, ...]:
        with tempops.backend("eager"), torch.no_grad():
            return _tuple(case.call(x, SEGMENTS, *others))

    first = tensors()
    arguments = [first.x, *(other for other in first.others if isinstance(other, Tensor))]
    if direction == "forward":
        again = [first.x] * case.rereads if layout == "contiguous" or not device.fits_pixels else []
        traffic = _bytes(*arguments, *outputs(first.x, first.others), *again)
    else:
        # The gradients of the arguments are as large as the arguments.
        traffic = _bytes(*first.grads, *arguments, *([] if case.linear else arguments))
    return [first, *(tensors() for _ in range(device.buffers(traffic) - 1))], traffic


@functools.lru_cache(maxsize=1)
def _repeated(device: devices.Cpu, shape: str, frames_of: Source) -> Tensor:
    """The activations of a shape, repeated to as many frames as the device takes, each time from another clip on."""
    frames = frames_of()[shape].to(device.type)
    repeats = device.frames(shape) // frames.size(0)
    return torch.cat([frames.roll(i * SEGMENTS, 0) for i in range(repeats)]) if repeats > 1 else frames


def prepare(implementation: str, device: devices.Cpu, point: Point, frames_of: Source = activations) -> Prepared:
    """What is timed of an implementation."""
    sets, traffic = inputs(device, point, frames_of)
    if implementation == "copy":  # reads half of the bytes, writes the other half
        sources = [torch.ones(traffic // 2 // 4, device=device.type) for _ in sets]
        return Prepared(None, [functools.partial(torch.empty_like(source).copy_, source) for source in sources])

    case = TIMED[point.op]
    backend = implementation if implementation in device.tested(case.op) else "eager"
    call = case.conv if implementation == "conv" else case.call
    if implementation in MODES:
        torch.compiler.reset()
        if device.type == "cpu":  # no pool of processes that starts while other things are timed
            torch._inductor.config.compile_threads = 1
        call = torch.compile(call, fullgraph=True, dynamic=False, mode=MODES[implementation])
    if point.direction == "forward":
        return Prepared(backend, [functools.partial(call, x, SEGMENTS, *others) for x, others, _ in sets])

    calls = []
    for x, others, grads in sets:
        # A compiled backward may otherwise overwrite what the graph keeps.
        with tempops.backend(backend), torch._functorch.config.patch(donated_buffer=False):
            outputs = _tuple(call(x, SEGMENTS, *others))
        arguments = [x, *(other for other in others if isinstance(other, Tensor))]
        calls.append(functools.partial(torch.autograd.grad, outputs, arguments, grads, retain_graph=True))
    return Prepared(backend, calls)


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)
