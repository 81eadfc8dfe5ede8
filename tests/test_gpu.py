"""The CUDA kernels on a GPU: `pytest -m gpu`."""

import itertools

import pytest
import torch
from cases import CASES
from inputs import BASE, DTYPES, SHAPES, as_tuple, fits, layouts, make
from test_ops import assert_as_good_as_eager

import tempops
from tempops import _backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"),
]


def entry(case) -> str:
    return case.name.split("-")[0]


cases = pytest.mark.parametrize(
    "case", [case for case in CASES if _backend.why_not_on_cuda(entry(case)) is None], ids=str
)


def on_gpu(case, shape=BASE, layout=None, dtype=torch.float32):
    with torch.device("cuda"):
        return make(case, shape, layout or layouts(case)[0], dtype)


def test_the_back_end_is_there():
    """Or there would be no cases below, and every test skipped on a machine that has a GPU."""
    assert _backend.why_not("cuda") is None


@cases
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(case, shape):
    if not fits(case, shape):
        pytest.skip("the op needs more frames")
    for layout, dtype in itertools.product(layouts(case), DTYPES):
        assert_as_good_as_eager(case, "cuda", on_gpu(case, shape, layout, dtype))


@cases
def test_repeats_give_the_same_bits(case):
    x, n_segment, *others = on_gpu(case)

    def run():
        outs = as_tuple(case.call(x, n_segment, *others))
        return (*outs, *torch.autograd.grad([out.sum() for out in outs], (x, *others)))

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@cases
def test_side_stream_and_graph(case):
    """On a stream of its own after slow work, and captured and replayed on new values, an op gives the same."""
    x, n_segment, *others = (t.detach() if isinstance(t, torch.Tensor) else t for t in on_gpu(case))
    fresh = torch.randn_like(x)
    expected = as_tuple(case.call(fresh, n_segment, *others))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        x.copy_(fresh)
        late = as_tuple(case.call(x, n_segment, *others))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(late, expected))
    x.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = as_tuple(case.call(x, n_segment, *others))
    x.copy_(fresh)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))


def test_more_than_2_31_elements():
    """The last clip lies where a 32-bit offset would miss it."""
    n, t, c, h, w = 4, 2, 32, 3300, 3400
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.zeros(n * t, c, h, w, dtype=torch.bfloat16, device="cuda")
    assert (n - 1) * t * c * h * w > 2**31
    x[-1, 0], x[-2, 1] = 1, 2
    y = tempops.temporal_shift(x, t, 32)
    assert (y[-2, 0] == 1).all() and (y[-1, 1] == 2).all() and not y[-1, 0].any() and not y[-2, 1].any()


def test_two_devices_raise():
    x = torch.randn(8, 4, 3, 3, device="cuda")
    with pytest.raises(ValueError, match="forward must be on x's device"):
        tempops.motion_attention(x, x.cpu(), x)
    with pytest.raises(RuntimeError, match="forward must be on x's device"):
        torch.ops.tempops.motion_attention(x, x.cpu(), x)
