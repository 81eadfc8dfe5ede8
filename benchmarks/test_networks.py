"""Every model, forward and a training step, on the ops beside eager PyTorch: batch 1, channels_last, float32.

64x64 pixels; 224x224 with --full and on a GPU, whose calls are waited for. A training step is forward, backward and an
update of the parameters.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from devices import Cpu
from report import NetworkRow
from turns import Clock, Prepared, compared, seconds_in_turns

from tempops.models import create_model, list_models

CLASSES = 174
clock = Clock()


@pytest.mark.parametrize("implementation", ("eager", "tempops"))
@pytest.mark.parametrize("direction", ("forward", "training"))
@pytest.mark.parametrize("name", list_models())
@pytest.mark.benchmark(timer=clock)
def test_network(
    benchmark, request, device, network_rows: dict, in_time, name: str, direction: str, implementation: str
) -> None:
    benchmark.group = f"{name}-{direction}"
    size = 224 if device.type == "cuda" or request.config.getoption("--full") else 64
    together = compared(request.session, name=name, direction=direction)
    if benchmark.disabled:
        return prepare((implementation,), device, name, direction, size)[implementation].once()
    clock.tell(benchmark, measured(together, device, name, direction, size)[implementation])
    row = network_rows.setdefault((name, direction), NetworkRow(name, direction, size))
    row.seconds[implementation] = benchmark.stats.stats.median


@functools.lru_cache(maxsize=1)
def measured(
    implementations: tuple[str, ...], device: Cpu, name: str, direction: str, size: int
) -> dict[str, list[float]]:
    """The times of each implementation, timed together."""
    prepared = prepare(implementations, device, name, direction, size)
    for each in prepared.values():
        each.once()
    return seconds_in_turns(prepared, dict.fromkeys(prepared, 1))


def prepare(implementations: tuple[str, ...], device: Cpu, name: str, direction: str, size: int) -> dict[str, Prepared]:
    """One model on every implementation."""
    model = network(device, name).train(direction == "training")
    with torch.device(device.type):
        t = model.n_segment
        frames = [(t, 15), (2 * t, 12)] if name == "menet" else [(t, model.in_channels)]
        x = [torch.randn(1, segments, channels, size, size) for segments, channels in frames]
        label = torch.zeros(1, dtype=torch.long)
    # At a rate of zero every step is the first: one clip is soon learned by heart, and subnormal gradients are slow.
    optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)

    def forward() -> None:
        with torch.inference_mode():
            model(*x)
        device.synchronize()

    def training() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(*x), label).backward()
        optimizer.step()
        device.synchronize()

    call = {"forward": forward, "training": training}[direction]
    return {each: Prepared("eager" if each == "eager" else None, [call]) for each in implementations}


@functools.lru_cache(maxsize=1)
def network(device: Cpu, name: str) -> torch.nn.Module:
    """The model, for both directions."""
    torch.manual_seed(0)
    with torch.device(device.type):
        return create_model(name, CLASSES).to(memory_format=torch.channels_last)
