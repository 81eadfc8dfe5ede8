"""The choice of back end, and what users do with an op: export it, compile it, send it past 2^31 elements."""

import io
import os
import subprocess
import sys
import threading
import warnings

import onnxruntime
import pytest
import torch
from cases import CASES
from inputs import BASE, as_tuple, layouts, make
from test_ops import Recorder

import tempops
from tempops import _backend


def python(program: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True)


def test_unknown_and_unavailable():
    with pytest.raises(ValueError, match="backend must be one of 'eager', 'cpu', 'cuda', 'triton', got 'gpu'"):
        with tempops.backend("gpu"):
            pass
    for name in (name for name in ("cuda", "triton") if _backend.why_not(name)):
        with pytest.raises(RuntimeError, match=f"the back end '{name}' is not available: .+"):
            with tempops.backend(name):
                pass
    assert python("import tempops", TEMPOPS_BACKEND="gpu").stderr.strip().endswith("got 'gpu'")


def test_the_choice_nests_and_ends():
    x = torch.randn(8, 16, 5, 5)

    def ran() -> bool:
        with Recorder() as recorder:
            tempops.temporal_shift(x, 4)
        return bool(recorder.calls)

    assert ran()
    with tempops.backend("eager"):
        assert not ran()
        with tempops.backend("cpu"):
            assert ran()
        assert not ran()
        with pytest.raises(KeyError), tempops.backend("cpu"):
            raise KeyError
        assert not ran()
    assert ran()


def test_environment():
    program = (
        "import torch, tempops\n"
        "from torch.profiler import profile\n"
        "with profile() as p: tempops.temporal_shift(torch.randn(8, 16, 5, 5), 4)\n"
        "print(any(e.name.startswith('tempops::') for e in p.events()))"
    )
    assert python(program, TEMPOPS_BACKEND="eager").stdout.strip() == "False"
    assert python(program, TEMPOPS_BACKEND="cpu").stdout.strip() == "True"


def test_eager_never_passes_through_torch_ops():
    for case in CASES:
        x, n_segment, *others = make(case, BASE, layouts(case)[0], torch.float32)
        with Recorder() as recorder, tempops.backend("eager"):
            outs = as_tuple(case.call(x, n_segment, *others))
            torch.autograd.grad(outs[0].sum(), (x, *others))
        assert not recorder.calls, case


def test_a_gpu_gets_triton_where_there_is_no_cuda_kernel_and_says_so_once_where_it_gets_eager():
    without_cuda = _backend.why_not_on_cuda("temporal_shift")
    without_triton = _backend._load_triton()
    expected = None if without_triton else "tempops_triton"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = {_backend.namespace("cuda", "temporal_shift") for _ in range(2)}
    assert chosen == {expected if without_cuda else "tempops"}
    messages = [str(w.message) for w in caught if "eager PyTorch on the GPU" in str(w.message)]
    said = f"tempops.temporal_shift runs in eager PyTorch on the GPU: {without_cuda}; {without_triton}"
    assert messages == ([said] if without_cuda and without_triton else [])


def test_compile_follows_the_choice():
    x = torch.randn(8, 16, 5, 5)
    torch._dynamo.reset()
    call = torch.compile(lambda x: tempops.temporal_shift(x, 4), fullgraph=True, backend="eager")
    for name in ("cpu", "eager", "cpu"):
        with tempops.backend(name), torch.profiler.profile() as profile:
            call(x)
        assert ("tempops::temporal_shift" in {event.name for event in profile.events()}) == (name == "cpu")


def test_threads():
    """Calls from several threads at once give what one gives."""
    inputs = [make(case, BASE, layouts(case)[0], torch.float32) for case in CASES]
    expected = [as_tuple(case.call(*i))[0] for case, i in zip(CASES, inputs)]
    wrong = []

    def work():
        for _ in range(5):
            for case, i, e in zip(CASES, inputs, expected):
                if not torch.equal(as_tuple(case.call(*i))[0], e):
                    wrong.append(case)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


@pytest.mark.parametrize("case", CASES, ids=str)
def test_export(case):
    """torch.export keeps the op of the compiled back end, and plain PyTorch under eager."""
    x, n_segment, *others = make(case, BASE, layouts(case)[0], torch.float32)
    inputs = tuple(t.detach() for t in (x, *others))

    class Module(torch.nn.Module):
        def forward(self, x, *others):
            return case.call(x, n_segment, *others)

    expected = as_tuple(Module()(*inputs))
    for backend in ("cpu", "eager"):
        with tempops.backend(backend):
            program = torch.export.export(Module(), inputs)
        assert ("tempops" in str(program.graph)) == (backend == "cpu")
        for out, wanted in zip(as_tuple(program.module()(*inputs)), expected):
            torch.testing.assert_close(out, wanted)


def test_a_gpu_older_than_the_kernels_gets_eager(monkeypatch):
    """Rather than a launch that fails: no binary is for it."""
    cached = (_backend._too_old, _backend.why_not_on_cuda, _backend._on_cuda)
    monkeypatch.setattr(_backend, "_cuda_missing", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5))
    for function in cached:
        function.cache_clear()
    try:
        with pytest.warns(UserWarning, match="on the GPU: the GPU has compute capability 7.5, and"):
            assert _backend.namespace("cuda", "temporal_shift") is None
    finally:
        for function in cached:
            function.cache_clear()


@pytest.mark.filterwarnings("ignore:tempops.temporal_shift runs in eager PyTorch on the GPU")
def test_the_choice_on_a_gpu_is_a_constant_to_compile():
    def call(x):
        return x + 1 if _backend.namespace("cuda", "temporal_shift") or _backend.why_not_on_cuda("temporal_conv") else x

    torch._dynamo.reset()
    assert torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


@pytest.mark.filterwarnings("ignore")  # the older exporter says so
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dynamo", (True, False), ids=("new", "old"))
def test_onnx(case, dynamo):
    """Under eager both exporters make ONNX of every op, and onnxruntime computes the same on inputs it has not seen."""
    x, n_segment, *others = make(case, BASE, layouts(case)[0], torch.float32)
    inputs = tuple(t.detach() for t in (x, *others))

    class Module(torch.nn.Module):
        def forward(self, x, *others):
            return case.call(x, n_segment, *others)

    file = io.BytesIO()
    with tempops.backend("eager"):
        if dynamo:
            torch.onnx.export(Module(), inputs, dynamo=True, verbose=False).save(file)
        else:
            torch.onnx.export(Module(), inputs, file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    fresh = [torch.randn_like(t) for t in inputs]
    outs = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), fresh)})
    for out, wanted in zip(outs, as_tuple(Module()(*fresh))):
        torch.testing.assert_close(torch.from_numpy(out), wanted, rtol=1e-4, atol=1e-4)


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(_free_memory() < 8 << 30, reason="needs 8 GB of free memory")
def test_more_than_2_31_elements():
    """The last clip lies where a 32-bit offset would miss it. In place, and mostly untouched pages, to be quick."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    n, t, c, h, w = 4, 2, 32, 3300, 3400
    assert (n - 1) * t * c * h * w > 2**31
    for channels_last in (False, True):  # one after the other, for what they take
        sizes = (n * t, h, w, c) if channels_last else (n * t, c, h, w)
        x = torch.zeros(sizes, dtype=torch.bfloat16)
        x = x.permute(0, 3, 1, 2) if channels_last else x
        x[-1, 0], x[-2, 1] = 1, 2
        tempops.temporal_shift_(x, t, 32)
        assert (x[-2, 0] == 1).all() and (x[-1, 1] == 2).all()
        assert not x[-1, 0].any() and not x[-2, 1].any() and not x[:-t, :2].any()
        del x
