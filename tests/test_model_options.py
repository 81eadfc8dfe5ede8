"""What the models and layers say to options that they can not have: at construction, by name."""

import pytest
import torch

from tempops import nn
from tempops.models import create_model

SMALL = {"layers": (1, 1, 1, 1), "width": 8}


@pytest.mark.parametrize(
    "name, options, error, message",
    [
        ("tsn", {"layers": (1, 1, 1)}, ValueError, r"layers must be 4 ints, one a stage, got \(1, 1, 1\)"),
        ("tsn", {"layers": [1] * 5}, ValueError, r"layers must be 4 ints, one a stage, got \(1, 1, 1, 1, 1\)"),
        ("tsn", {"layers": (1, 1, 0, 1)}, ValueError, r"layers\[2\] must be at least 1, got 0"),
        ("tsn", {"layers": (1, 1.0, 1, 1)}, TypeError, r"layers\[1\] must be an int, got float"),
        ("tsn", {"layers": 4}, TypeError, "layers must be 4 ints, one a stage, got int"),
        ("tsn", {"width": 0}, ValueError, "width must be at least 1, got 0"),
        ("tsn", {"width": -4}, ValueError, "width must be at least 1, got -4"),
        ("tsn", {"width": 8.0}, TypeError, "width must be an int, got float"),
        ("tsn", {"frames": 0}, ValueError, "frames must be at least 1, got 0"),
        ("tsn", {"frames": -1}, ValueError, "frames must be at least 1, got -1"),
        ("tdn", {"frames": 3}, ValueError, "frames can not be chosen: S-TDM takes 5 a segment, got 3"),
        *(
            (name, {"reduction": reduction}, ValueError, f"reduction must be at least 1, got {reduction}")
            for name in ("teinet", "tdrl", "cmr")
            for reduction in (0, -8)
        ),
        ("teinet", {"reduction": 8.0}, TypeError, "reduction must be an int, got float"),
        ("gte", {"t": 0.1}, ValueError, "t must give the temporal branch at least one of 8 channels, got 0.1"),
        ("gte", {"t": 0.1, "variant": "depthwise"}, ValueError, "at least one of 8 channels, got 0.1"),
        ("gte", {"width": 3}, ValueError, "t must give the temporal branch at least one of 3 channels, got 0.25"),
        ("gte", {"width": 1, "t": 0.9}, ValueError, "width must be at least 2, got 1"),
        *(("gst", {"width": w}, ValueError, f"width must be at least 4, got {w}") for w in (1, 2, 3)),
        ("tefe", {"te": (1, 1, 1)}, ValueError, r"te must be 4 ints, one a stage, got \(1, 1, 1\)"),
        ("tefe", {"fe": (0, 0, 0, 0, 0)}, ValueError, "fe must be 4 ints, one a stage, got "),
        ("tefe", {"te": (1, 1, -1, 1)}, ValueError, r"te\[2\] must be at least 0, got -1"),
        ("tefe", {"te": (0, 0, 0, 0), "fe": (0, 0, 0, -1)}, ValueError, r"fe\[3\] must be at least 0, got -1"),
        (
            "tefe",
            {"te": (1, 1, 1, 2)},
            ValueError,
            r"te and fe must fit stages of \[1, 1, 1, 1\] blocks, got \[1, 1, 1, 2\]",
        ),
        ("tefe", {"te": (1, 1, 1, 1), "fe": (0, 1, 0, 0)}, ValueError, "te and fe must fit stages"),
        ("cmr", {"dense": "no"}, TypeError, "dense must be a bool, got str"),
        ("cmr", {"dense": 1}, TypeError, "dense must be a bool, got int"),
        ("cmr", {"n_segment": 1}, ValueError, "n_segment must be at least 2, got 1"),
        ("cmr", {"n_segment": 1, "sme": "all"}, ValueError, "n_segment must be at least 2, got 1"),
    ],
)
def test_wrong_options(name, options, error, message):
    with pytest.raises(error, match=message):
        create_model(name, 3, **(SMALL | options))


@pytest.mark.parametrize(
    "name, options",
    [
        ("gte", {"t": 0.125}),
        ("gte", {"width": 2, "t": 0.5}),
        ("gst", {"width": 4}),
        ("tefe", {"te": [0, 1, 0, 1]}),
        ("cmr", {"n_segment": 1, "sme": "none"}),
        ("teinet", {"reduction": 1}),
    ],
)
def test_the_least_that_they_can_have(name, options):
    model = create_model(name, 3, **(SMALL | options)).eval()
    assert all(p.numel() > 0 for p in model.parameters())
    assert model(torch.randn(1, model.n_segment, 3, 32, 32)).isfinite().all()


def test_wrong_arguments_of_layers():
    for n_frames, error in ((1, ValueError), (0, ValueError), (4.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"n_frames must be (at least 2|an int), got"):
            nn.MotionEnhancement(n_frames)
    for layer in (nn.TemporalAdaptive, nn.TemporalExtraction):
        for taps, error in ((2, ValueError), (0, ValueError), (-1, ValueError), (3.0, TypeError)):
            with pytest.raises(error, match=r"taps must be (odd|at least 1|an int), got"):
                layer(8, 4, taps=taps)
