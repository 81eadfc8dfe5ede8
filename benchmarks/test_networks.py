"""Every model, forward and a training step, on the ops beside eager PyTorch: batch 1, channels_last, float32.

64x64 pixels; 224x224 with --full and on a GPU, whose calls are waited for. A training step is forward, backward and an
update of the parameters.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from report import NetworkRow

import tempops
from tempops.models import create_model, list_models

CLASSES = 174
ROUNDS = 3


@pytest.mark.parametrize("implementation", ("eager", "tempops"))
@pytest.mark.parametrize("direction", ("forward", "training"))
@pytest.mark.parametrize("name", list_models())
@pytest.mark.benchmark(disable_gc=True)
def test_network(
    benchmark, request, device, network_rows: dict, in_time, name: str, direction: str, implementation: str
) -> None:
    torch.manual_seed(0)
    size = 224 if device.type == "cuda" or request.config.getoption("--full") else 64
    with torch.device(device.type):
        model = create_model(name, CLASSES).train(direction == "training").to(memory_format=torch.channels_last)
        t = model.n_segment
        frames = [(t, 15), (2 * t, 12)] if name == "menet" else [(t, model.in_channels)]
        x = [torch.randn(1, segments, channels, size, size) for segments, channels in frames]
        label = torch.zeros(1, dtype=torch.long)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

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
    benchmark.group = f"{name}-{direction}"
    with tempops.backend("eager") if implementation == "eager" else contextlib.nullcontext():
        benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.enabled:
        row = network_rows.setdefault((name, direction), NetworkRow(name, direction, size))
        row.seconds[implementation] = benchmark.stats.stats.median
