"""Every model, forward and a training step, on the ops beside eager PyTorch: batch 1, channels_last, float32.

112x112 pixels; 224x224 with --full. A training step is forward, backward and an update of the parameters.
"""

import pytest
import torch
import torch.nn.functional as F
from report import NetworkRow

import tempops
from tempops.models import create_model, list_models

CLASSES = 174
ROUNDS = 5


@pytest.mark.parametrize("implementation", ("eager", "tempops"))
@pytest.mark.parametrize("direction", ("forward", "training"))
@pytest.mark.parametrize("name", list_models())
@pytest.mark.benchmark(disable_gc=True)
def test_network(benchmark, request, network_rows: dict, name: str, direction: str, implementation: str) -> None:
    torch.manual_seed(0)
    size = 224 if request.config.getoption("--full") else 112
    model = create_model(name, CLASSES).train(direction == "training").to(memory_format=torch.channels_last)
    t = model.n_segment
    frames = [(t, 15), (2 * t, 12)] if name == "menet" else [(t, model.in_channels)]
    x = [torch.randn(1, segments, channels, size, size) for segments, channels in frames]
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def forward() -> None:
        with torch.inference_mode():
            model(*x)

    def training() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(*x), torch.zeros(1, dtype=torch.long)).backward()
        optimizer.step()

    call = {"forward": forward, "training": training}[direction]
    benchmark.group = f"{name}-{direction}"
    backend = "eager" if implementation == "eager" else "cpu"
    with tempops.backend(backend):
        benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=2)
    if benchmark.enabled:
        row = network_rows.setdefault((name, direction), NetworkRow(name, direction, size))
        row.seconds[implementation] = benchmark.stats.stats.median
