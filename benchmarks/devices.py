"""The devices that the benchmarks run on: which back ends are tested there, on how much, and by which clock."""

import itertools
import math
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import ClassVar

import pytest
import torch
from activations import FRAMES, SIZES
from cases import why_not
from turns import Prepared, clocked, seconds_in_turns

from tempops import _backend

key = pytest.StashKey["Cpu"]()  # of pytest's configuration: the device of this run


class Cpu:
    """One call after the other by the host's clock, the implementations in turns; memory is warm."""

    type = "cpu"
    dtypes = ("float32",)
    back_ends = ("cpu",)
    baselines = ("eager", "copy")
    compiled: ClassVar = {"compile": ("float32",)}  # by baseline: the dtypes that it is timed in by default
    sparsely = "at two shapes, one in each layout"
    compiled_last = False  # so that a run cut short has the rest
    minutes = math.inf  # after which a default run skips what is left
    fits_pixels = False  # whether a kernel can keep the channels of a few pixels on chip, and read them once
    in_turns = True  # whether all that is compared at a point is timed together
    note = "Medians, all memory warm."

    SECONDS = 0.025  # of timed calls in a turn
    ROUNDS = (2, 33)  # at least, at most
    SLOW = 0.1  # seconds of a call of which there is one in a turn

    def tested(self, op: str) -> tuple[str, ...]:
        """The back ends that run an op here."""
        return tuple(name for name in self.back_ends if why_not(name, op, self.type) is None)

    def frames(self, shape: str) -> int:
        """How many frames of a size of `SIZES` the ops get."""
        return FRAMES

    def buffers(self, traffic: int) -> int:
        """How many sets of tensors the calls take in turn."""
        return 1

    def seconds(self, prepared: Mapping[str, Prepared]) -> dict[str, list[float]]:
        """The times of the calls of each implementation."""
        rounds = {name: self._rounds(each) for name, each in prepared.items()}
        return seconds_in_turns(prepared, rounds)

    def _rounds(self, prepared: Prepared) -> int:
        """How many calls to time in a turn, after two that warm up."""
        (call,) = prepared.calls
        with prepared.chosen():
            call()  # compiles, or touches memory for the first time
            once = clocked(call)
        least, most = self.ROUNDS if once < self.SLOW else (1, 1)
        return min(max(math.ceil(self.SECONDS / once), least), most)

    def synchronize(self) -> None:
        """Waits for the device, and raises what has gone wrong on it."""

    def machine(self) -> dict[str, str | int]:
        """What the report says of the device."""
        return {}


class Cuda(Cpu):
    """Device time: calls on buffers taken in turn, together larger than the second-level cache, as replays of a graph.

    Tensors of activations have at least 2**25 elements, the 16 frames repeated: 64 MiB in the 16-bit types, twice that
    in float32. What channel_motion_gate reads is small at any batch; its figures are of a warm cache, as in a network.
    """

    type = "cuda"
    dtypes = ("float32", "bfloat16", "float16")
    back_ends = ("cuda", "triton")
    baselines = ("eager", "copy", "conv")
    compiled: ClassVar = {"compile": ("float32", "bfloat16"), "max-autotune": ("bfloat16",)}
    sparsely = "at two shapes, one in each layout; in bfloat16 at the first alone, with max-autotune too"
    compiled_last = True
    minutes = 7.5
    fits_pixels = True
    in_turns = False
    note = "Device time: medians of graph replays, buffers taken in turn so that no call finds its data in the cache."

    ELEMENTS = 2**25
    BUFFERS = 16  # at most
    CALLS = 10  # in a graph, or all the buffers once
    REPLAYS = 10
    WARM = 0.02  # seconds of replays before the timed ones: the clocks rise

    def __init__(self) -> None:
        # Everything runs on one stream that can be captured: autograd runs a backward on the stream of its forward.
        torch.cuda.set_stream(torch.cuda.Stream())
        torch.backends.cudnn.benchmark = True  # the baselines' convolutions at their fastest
        self.cache = torch.cuda.get_device_properties().L2_cache_size

    def frames(self, shape: str) -> int:
        repeats = math.ceil(self.ELEMENTS / math.prod(SIZES[shape]))
        return FRAMES * repeats

    def buffers(self, traffic: int) -> int:
        return min(max(2, math.ceil(3 * self.cache / traffic)), self.BUFFERS)

    def seconds(self, prepared: Mapping[str, Prepared]) -> dict[str, list[float]]:
        seconds = {}
        for name, each in prepared.items():
            with each.chosen():
                seconds[name] = self._seconds(each.calls)
        return seconds

    def _seconds(self, calls: list[Callable]) -> list[float]:
        for call in (*calls, *calls, *calls):  # compiles, tunes, creates handles
            call()
        count = math.ceil(self.CALLS / len(calls)) * len(calls)
        graph = torch.cuda.CUDAGraph()
        results = deque(maxlen=len(calls))  # what the last calls wrote is not yet written again
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for call in itertools.islice(itertools.cycle(calls), count):
                results.append(call())
        start = time.perf_counter()
        while time.perf_counter() - start < self.WARM:
            graph.replay()
            torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.REPLAYS + 1)]
        graph.replay()  # while it runs the host gets ahead, so that no replay waits to be launched
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        times = [before.elapsed_time(after) / 1e3 / count for before, after in itertools.pairwise(events)]
        graph.reset()
        return times

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def machine(self) -> dict[str, str | int]:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
        except (OSError, IndexError, subprocess.CalledProcessError):
            driver = "unknown"
        properties = torch.cuda.get_device_properties()
        try:
            import triton
        except ImportError:
            triton = None
        return {
            "GPU": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "second-level cache": f"{self.cache / 1e6:.0f} MB",
            "driver": driver,
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "triton": triton.__version__ if triton else "none",
        }


class Rehearsal(Cuda):
    """For the tests: all that is done for a GPU but the timing itself, on the CPU, small."""

    type = "cpu"
    back_ends = ("cpu",)

    def __init__(self) -> None:
        self.cache = 50_000_000

    def frames(self, shape: str) -> int:
        return FRAMES

    def _seconds(self, calls: list[Callable]) -> list[float]:
        return [clocked(call) for call in calls]

    def synchronize(self) -> None:
        pass

    def machine(self) -> dict[str, str]:
        return {"GPU": "rehearsal on the CPU, no figure is one"}


DEVICES = {"cpu": Cpu, "cuda": Cuda, "rehearsal": Rehearsal}


def choose(name: str | None) -> Cpu:
    """The device of --device; where that is not given, a GPU if there is one.

    Raises:
        pytest.UsageError: there is no GPU, or no back end of tempops runs on it.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        reasons = {back_end: _backend.why_not(back_end) for back_end in Cuda.back_ends}
        if all(reasons.values()):
            said = ", ".join(f"{back_end}: {reason}" for back_end, reason in reasons.items())
            raise pytest.UsageError(f"no back end of tempops runs on the GPU ({said}); --device cpu measures the CPU")
    return DEVICES[name]()
