"""What only a GPU can show, beside the tests of the ops that run there too: `pytest -m gpu`."""

import itertools
from pathlib import Path

import inputs
import pytest
import torch
from cases import CASES
from inputs import BASE, DTYPES, GPU, as_tuple, layouts, make
from test_ops import assert_as_good_as_eager, random_like, run

import tempops
from tempops import _backend
from tempops.ops._contract import Shape

pytestmark = [*inputs.on_gpu]

cases = pytest.mark.parametrize("case", CASES, ids=str)
backends = pytest.mark.parametrize("backend", GPU)


def test_the_back_end_is_there():
    """Or every test of it is skipped, on a machine that has a GPU."""
    assert _backend.why_not("cuda") is None
    for source in (Path(__file__).parents[1] / "csrc").glob("*/cuda.cu"):
        assert _backend.why_not_on_cuda(source.parent.name) is None


@cases
@backends
@pytest.mark.parametrize("shape", (Shape(2, 3, 13, 9, 4), Shape(2, 4, 16, 8, 8)), ids=("odd", "even"))
def test_small(case, backend, shape):
    """As the CPU's kernels do, on inputs copied from there: few kernels but ours run, for tools/sanitize_gpu.py."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    for layout in [name for name in layouts(case) if name in ("contiguous", "channels_last")]:
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            x, n_segment, *others = make(case, shape, layout, dtype, device="cpu")
            with tempops.backend("cpu"):
                outs = as_tuple(case.call(x, n_segment, *others))
            grads = [random_like(out) for out in outs]
            dins = torch.autograd.grad(outs, (x, *others), grads)
            there = [tensor.detach().cuda().requires_grad_() for tensor in (x, *others)]
            with tempops.backend(backend):
                outs_there = as_tuple(case.call(there[0], n_segment, *there[1:]))
            dins_there = torch.autograd.grad(outs_there, there, [grad.cuda() for grad in grads])
            for mine, expected in zip((*outs_there, *dins_there), (*outs, *dins)):
                torch.testing.assert_close(mine.cpu(), expected, rtol=tolerance, atol=tolerance)


@cases
@backends
def test_side_stream_and_graph(case, backend):
    """On a stream of its own after slow work, and captured and replayed on new values, a step gives the same bits."""
    x, n_segment, *others = make(case, BASE, layouts(case)[0], torch.float32)
    fresh = random_like(x)
    grads = [random_like(out) for out in as_tuple(case.call(x, n_segment, *others))]

    def step():
        with tempops.backend(backend):
            outs = as_tuple(case.call(x, n_segment, *others))
        return (*(out.detach() for out in outs), *torch.autograd.grad(outs, (x, *others), grads))

    def give(values):
        with torch.no_grad():
            x.copy_(values)

    old = x.detach().clone()
    give(fresh)
    expected = step()
    give(old)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        give(fresh)
        late = step()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(late, expected))

    give(old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    give(fresh)
    for _ in range(2):
        for result in captured:
            result.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected))


@pytest.mark.parametrize("case", [case for case in CASES if case.benchmark and 4 in case.ranks], ids=str)
@backends
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_more_than_2_31_elements(case, backend, layout):
    """The last clip, which lies where a 32-bit offset would miss it, and its gradients are as they are alone."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda.empty_cache()
    shape = Shape(4, 2, 40, 3300, 3400)
    alone = shape._replace(N=1)
    n, t, c, h, w = shape
    needed = 10 * n * t * c * h * w * 2  # motion_attention has eight tensors as large as x
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free memory")
    assert (n - 1) * t * c * h * w > 2**31

    def draw(*sizes):
        wanted = torch.channels_last if layout == "channels_last" and sizes[2:] == (h, w) else torch.contiguous_format
        return torch.empty(sizes, dtype=torch.bfloat16, device="cuda", memory_format=wanted).normal_()

    def run(x, *others):
        with tempops.backend(backend):
            return as_tuple(case.call(x, t, *others))

    x, others = draw(n * t, c, h, w).requires_grad_(), case.others(shape, draw)
    sizes_alone = [o.shape for o in case.others(alone, lambda *sizes: torch.empty(sizes, device="meta"))]
    by_clip = [o.shape != size for o, size in zip(others, sizes_alone)]  # those that have values for each clip
    last = x.detach()[-t:].requires_grad_()
    others_alone = [
        o[-size[0] :].requires_grad_() if clips else o for o, size, clips in zip(others, sizes_alone, by_clip)
    ]
    others = [o.requires_grad_(clips) for o, clips in zip(others, by_clip)]

    outs, outs_alone = run(x, *others), run(last, *others_alone)
    grads = [torch.empty_like(out, requires_grad=False).normal_() for out in outs]
    grads_alone = [grad[-out.size(0) :] for grad, out in zip(grads, outs_alone)]
    dins = torch.autograd.grad(outs, [a for a in (x, *others) if a.requires_grad], grads)
    dins_alone = torch.autograd.grad(outs_alone, [a for a in (last, *others_alone) if a.requires_grad], grads_alone)
    for mine, expected in zip((*outs, *dins), (*outs_alone, *dins_alone)):
        assert expected.count_nonzero() > 0
        torch.testing.assert_close(mine[-expected.size(0) :], expected, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
@cases
@backends
def test_second_device(case, backend):
    """Kernels run where the tensors are, not on the current device."""
    for layout in layouts(case)[:2]:
        assert torch.cuda.current_device() == 0
        assert_as_good_as_eager(case, backend, make(case, BASE, layout, torch.float32, device="cuda:1"))


@cases
def test_triton_agrees_with_cuda(case):
    """Two implementations of their own: moves bit for bit, the others within a few units of the largest value."""
    for layout, dtype in itertools.product(layouts(case), DTYPES):
        inputs = make(case, BASE, layout, dtype, device="cuda")
        outs, dins, grads = run(case, "triton", *inputs)
        expected_outs, expected_dins, _ = run(case, "cuda", *inputs, grads=grads)
        for mine, expected in zip((*outs, *dins), (*expected_outs, *expected_dins)):
            unit = 0 if case.moves else 16 * torch.finfo(dtype).eps * expected.double().abs().max()
            assert (mine.double() - expected.double()).abs().max() <= unit, (layout, dtype)


@backends
@pytest.mark.parametrize("channels_last", (False, True))
def test_tf32_is_rounded(backend, channels_last, monkeypatch):
    """Tensor cores leave 13 bits of float32 out, which alone would make all products of positive numbers too small."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    x, weight, dy = (1 + torch.rand(sizes, device="cuda") for sizes in ((16, 64, 8, 8), (64, 64, 1, 1), (16, 64, 8, 8)))
    form = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = x.contiguous(memory_format=form).requires_grad_(), dy.contiguous(memory_format=form)
    results = []
    for name, dtype in ((backend, torch.float32), ("eager", torch.float64)):
        inputs = [a.detach().to(dtype).requires_grad_() for a in (x, weight)]
        with tempops.backend(name):
            y = tempops.shift_conv1x1(*inputs, None, 8)
        results.append((y, *torch.autograd.grad(y, inputs, dy.to(dtype))))
    for mine, exact in zip(*results):
        assert ((mine.double() - exact).abs() <= exact / 2**11).all()


@backends
def test_inductor(backend):
    """The ops between other work, as torch.compile runs them: Inductor sees Triton's kernels themselves."""
    x, n_segment, weight = make(
        next(case for case in CASES if case.name == "temporal_conv"), BASE, "contiguous", torch.float32, device="cuda"
    )

    def call(x, weight):
        return (tempops.temporal_conv(tempops.temporal_shift(x * 2, n_segment), weight, n_segment) + 1).relu()

    torch._dynamo.reset()
    with tempops.backend(backend):
        out = torch.compile(call, fullgraph=True)(x, weight)
        expected = call(x, weight)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.sum(), (x, weight))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), (x, weight)))


@backends
def test_two_devices_raise(backend):
    ops = torch.ops.tempops if backend == "cuda" else torch.ops.tempops_triton
    x = torch.randn(8, 4, 3, 3, device="cuda")
    with tempops.backend(backend), pytest.raises(ValueError, match="forward must be on x's device"):
        tempops.motion_attention(x, x.cpu(), x)
    with pytest.raises(RuntimeError, match="forward must be on x's device"):
        ops.motion_attention(x, x.cpu(), x)
