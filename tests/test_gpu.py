"""The CUDA and Triton kernels on a GPU: `pytest -m gpu`."""

import contextlib
import itertools

import pytest
import torch
from cases import CASES
from inputs import BASE, DTYPES, SHAPES, as_tuple, fits, layouts, make
from test_ops import assert_as_good_as_eager, run

import tempops
from tempops import _backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"),
]


def entry(case) -> str:
    return case.name.split("-")[0]


def runs(backend: str, case) -> bool:
    return backend == "triton" or _backend.why_not_on_cuda(entry(case)) is None


def on(*backends: str):
    """Every case on every back end that has its kernels."""
    pairs = [(backend, case) for backend in backends for case in CASES if runs(backend, case)]
    return pytest.mark.parametrize("backend, case", pairs, ids=lambda value: str(value))


cases = on("cuda", "triton")
backends = pytest.mark.parametrize("backend", ("cuda", "triton"))


@pytest.fixture(autouse=True)
def chosen(request):
    """Runs a test on the back end that it names."""
    parameters = getattr(request.node, "callspec", None)
    with tempops.backend(parameters.params["backend"]) if parameters else contextlib.nullcontext():
        yield


def on_gpu(case, shape=BASE, layout=None, dtype=torch.float32):
    with torch.device("cuda"):
        return make(case, shape, layout or layouts(case)[0], dtype)


@backends
def test_the_back_end_is_there(backend):
    """Or there would be no cases below, and every test skipped on a machine that has a GPU."""
    assert _backend.why_not(backend) is None


@cases
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, case, shape):
    if not fits(case, shape):
        pytest.skip("the op needs more frames")
    for layout, dtype in itertools.product(layouts(case), DTYPES):
        assert_as_good_as_eager(case, backend, on_gpu(case, shape, layout, dtype))


@cases
def test_repeats_give_the_same_bits(backend, case):
    x, n_segment, *others = on_gpu(case)

    def results():
        outs = as_tuple(case.call(x, n_segment, *others))
        return (*outs, *torch.autograd.grad([out.sum() for out in outs], (x, *others)))

    first = results()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, results()))


@cases
def test_side_stream_and_graph(backend, case):
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


@backends
def test_more_than_2_31_elements(backend):
    """The last clip lies where a 32-bit offset would miss it."""
    n, t, c, h, w = 4, 2, 32, 3300, 3400
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.zeros(n * t, c, h, w, dtype=torch.bfloat16, device="cuda")
    assert (n - 1) * t * c * h * w > 2**31
    x[-1, 0], x[-2, 1] = 1, 2
    y = tempops.temporal_shift(x, t, 32)
    assert (y[-2, 0] == 1).all() and (y[-1, 1] == 2).all() and not y[-1, 0].any() and not y[-2, 1].any()


@on("triton")
def test_triton_agrees_with_cuda(backend, case):
    """Two implementations of their own: moves bit for bit, the others within a few units of the largest value."""
    if not runs("cuda", case):
        pytest.skip("the op has no CUDA kernels")
    for layout, dtype in itertools.product(layouts(case), DTYPES):
        inputs = on_gpu(case, BASE, layout, dtype)
        outs, dins, grads = run(case, "triton", *inputs)
        expected_outs, expected_dins, _ = run(case, "cuda", *inputs, grads=grads)
        for mine, expected in zip((*outs, *dins), (*expected_outs, *expected_dins)):
            unit = 0 if case.moves else 16 * torch.finfo(dtype).eps * expected.double().abs().max()
            assert (mine.double() - expected.double()).abs().max() <= unit, (layout, dtype)


@backends
@pytest.mark.parametrize("inductor", (False, True))
def test_compile(backend, inductor):
    """The ops between other work, as torch.compile runs them: Inductor sees Triton's kernels themselves."""
    x, n_segment, weight = on_gpu(next(case for case in CASES if case.name == "temporal_conv"))

    def call(x, weight):
        return (tempops.temporal_conv(tempops.temporal_shift(x * 2, n_segment), weight, n_segment) + 1).relu()

    torch._dynamo.reset()
    out = torch.compile(call, fullgraph=True, backend="inductor" if inductor else "aot_eager")(x, weight)
    torch.testing.assert_close(out, call(x, weight))
    grads = torch.autograd.grad(out.sum(), (x, weight))
    torch.testing.assert_close(grads, torch.autograd.grad(call(x, weight).sum(), (x, weight)))


@backends
def test_two_devices_raise(backend):
    ops = torch.ops.tempops if backend == "cuda" else torch.ops.tempops_triton
    x = torch.randn(8, 4, 3, 3, device="cuda")
    with pytest.raises(ValueError, match="forward must be on x's device"):
        tempops.motion_attention(x, x.cpu(), x)
    with pytest.raises(RuntimeError, match="forward must be on x's device"):
        ops.motion_attention(x, x.cpu(), x)
