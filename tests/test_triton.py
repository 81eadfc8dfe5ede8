"""The Triton kernels without a GPU: in Triton's interpreter, and as PyTorch's tracers see them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
pytest.importorskip("triton")


def python(*arguments: str, **environment: str) -> str:
    """What a Python of its own prints: whether kernels are interpreted is decided when they are imported."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {
        **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        "PYTHONPATH": path,
        **environment,
    }
    run = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    return run.stdout


def test_importing_tempops_leaves_the_kernels_alone():
    assert python("-c", "import sys, tempops; print('tempops.triton' in sys.modules)") == "False\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_and_the_interpreter():
    program = (
        "import torch, tempops\n"
        "from tempops import _backend\n"
        "print(_backend.why_not('triton'))\n"
        "try: torch.ops.tempops_triton.temporal_shift(torch.randn(8, 16, 5, 5), 4)\n"
        "except RuntimeError as error: print(error)"
    )
    first, second = python("-c", program).splitlines()
    assert first == "PyTorch finds no GPU" and "set TRITON_INTERPRET=1" in second


SCHEMAS = """
import torch
from tempops import _backend
assert _backend._load_triton() is None
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tempops::")]
for name in names:
    of = lambda space: str(getattr(getattr(torch.ops, space), name.split("::")[1]).default._schema)
    mine, theirs = of("tempops_triton").replace("SymInt", "int"), of("tempops").replace("SymInt", "int")
    assert mine.split("::")[1] == theirs.split("::")[1], (mine, theirs)
print(len(names))
"""


@pytest.mark.parametrize("interpret", ("0", "1"))
def test_every_entry_is_there_with_the_same_schema(interpret):
    assert int(python("-c", SCHEMAS, TRITON_INTERPRET=interpret)) > 20


# Runs on tensors without memory, with a stand-in for the GPU whose code PyTorch asks Triton for to see what kernels
# write.
TRACED = """
import re, torch, triton
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from cases import CASES
from inputs import BASE, as_tuple, layouts, make
from tempops import _backend

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
assert _backend._load_triton() is None
_backend._choice.name = "triton"
for case in CASES:
    x, n_segment, *others = make(case, BASE, layouts(case)[0], torch.float32)
    inputs = tuple(a.detach().to("meta").requires_grad_() for a in (x, *others))
    def call(x, *others):
        return case.call(x, n_segment, *others)
    class Module(torch.nn.Module):
        forward = staticmethod(call)
    exported = torch.export.export(Module(), inputs).graph
    assert any("tempops_triton" in str(node.target) for node in exported.nodes), case

    torch._dynamo.reset()
    graphs = []
    def keep(graph, _):
        graphs.append(graph.graph)
        return make_boxed_func(graph)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    outs = as_tuple(torch.compile(call, fullgraph=True, backend=backend)(*inputs))
    torch.autograd.grad(outs, inputs, [torch.empty_like(out) for out in outs])
    assert len(graphs) == 2
    for graph in graphs:
        assert not any("tempops" in str(node.target) for node in graph.nodes), case
        launches = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        assert launches, case
        for node in launches:
            written = [node.kwargs["kwargs"][name] for name in node.kwargs["tensors_to_clone"]]
            # In memory of the entry's own, or in what an earlier kernel made of it.
            assert written, case
            assert all(re.search("empty|getitem", str(tensor.target)) for tensor in written), (case, written)
print("seen")
"""


def test_export_keeps_the_op_and_compile_sees_what_its_kernels_read_and_write():
    assert python("-c", TRACED).splitlines()[-1] == "seen"


LOOP = """
import torch, triton, triton.language as tl

@triton.jit
def count(x, n):
    for i in range(n):
        tl.store(x + i, i)

x = torch.zeros(3)
try:
    count[(1,)](x, 3)
except triton.runtime.errors.InterpreterError as error:
    print(error)
"""


def test_kernels_pass_the_tests_of_the_ops(tmp_path):
    """In its interpreter, every order of derivative at the smallest size; options, layouts and dtypes: .ci/triton."""
    (tmp_path / "loop.py").write_text(LOOP)
    if error := python(str(tmp_path / "loop.py"), TRITON_INTERPRET="1"):
        pytest.skip(f"this Triton's interpreter runs no loop with this numpy: {error}")
    command = ("-m", "pytest", "-qx", "-p", "no:cacheprovider", str(HERE / "test_ops.py"))
    python(
        *command,
        "-k",
        "triton and test_double_backward and not (wide or neighbor or clip or long)",
        TRITON_INTERPRET="1",
    )
