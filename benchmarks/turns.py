"""Times taken in turns: what slows the machine for a while slows all that is compared, and a median forgets it.

pytest-benchmark times one test after the other. Here the first test of a comparison times the others' calls too, and
each tells pytest-benchmark its own times, through a clock.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import pytest

import tempops

TURNS = 3


class Prepared(NamedTuple):
    """What is timed: functions of no arguments, one for each set of tensors, and the back end they are called under."""

    backend: str | None  # None for the automatic choice
    calls: list[Callable[[], object]]

    def chosen(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.backend is None else tempops.backend(self.backend)

    def once(self) -> None:
        with self.chosen():
            for call in self.calls:
                call()


class Clock:
    """pytest-benchmark's timer (`pytest.mark.benchmark(timer=...)`), which goes on by the times it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def tell(self, benchmark, seconds: Sequence[float]) -> None:
        """One round for each of the times."""
        times = iter(seconds)

        def go_on() -> None:
            self.now += next(times, 0.0)  # pytest-benchmark calls once more than it times

        benchmark.pedantic(go_on, rounds=len(seconds))


def compared(session: pytest.Session, **point: str) -> tuple[str, ...]:
    """The implementations that this run times at a point: those of its tests with these parameters."""
    return tuple(each["implementation"] for each in parameters_of(session) if each.items() >= point.items())


def parameters_of(session: pytest.Session) -> list[dict[str, str]]:
    """The parameters of the tests that this run times something in."""
    parameters = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    return [each for each in parameters if "implementation" in each]


def seconds_in_turns(prepared: Mapping[str, Prepared], rounds: Mapping[str, int]) -> dict[str, list[float]]:
    """The times of the calls of each implementation, `TURNS` times as many as `rounds` says."""
    seconds: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(TURNS):
        for name, each in prepared.items():
            with each.chosen(), gc_paused():
                for _ in range(rounds[name]):
                    seconds[name] += [clocked(call) for call in each.calls]
    return seconds


def clocked(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()  # the result is dropped: kept through the next call, it would have that one write to cold memory
    return time.perf_counter() - start


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
