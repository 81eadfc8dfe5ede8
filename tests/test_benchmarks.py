"""The benchmarks and their tables, without a GPU: the run rehearsed on the CPU, the tables made of made-up figures."""

import contextlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tempops import _backend

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import gpu_table  # noqa: E402

MISSING = [name for name in ("pytest_benchmark", "av", "tqdm") if importlib.util.find_spec(name) is None]
needs_extras = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def benchmarks(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", *arguments]
    # pytest-benchmark times nothing in a process that pytest-xdist shares the tests with.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_extras
def test_a_rehearsal_fills_the_report(tmp_path):
    """Everything of a run on a GPU but the timing: sets of tensors, every baseline, the report, the README's table."""
    report, rounds = tmp_path / "report.json", tmp_path / "rounds.json"
    select = "(frame_difference or shift_conv1x1 or gate) and not autotune"
    select += " and (test_call or bfloat16 and (15x224 or 2048x7))"
    files = ("--report", str(report), "--benchmark-json", str(rounds))
    run = benchmarks("--device", "rehearsal", *files, "-k", select)
    assert run.returncode == 0, run.stdout[-4000:]
    written = json.loads(report.read_text())
    rows = {(row["op"], row["direction"], row["layout"]): row for row in written["rows"]}
    assert len(rows) == len(written["rows"]) == 4 * 4 + 2
    for (op, *_), row in rows.items():
        expected = {"tempops", "eager", "copy"} | ({"conv"} if op == "shift_conv1x1" else set())
        compiled = {"compile"} if op == "frame_difference" and row["layout"] == "contiguous" else set()
        assert row["seconds"].keys() == expected | compiled and all(t > 0 for t in row["seconds"].values())
    timed = {tuple(b["params"].values()): b["stats"] for b in json.loads(rounds.read_text())["benchmarks"]}
    for (op, direction, layout), row in rows.items():
        for name, seconds in row["seconds"].items():
            point = op, direction, layout, row["dtype"], row["shape"], "cpu" if name == "tempops" else name
            assert timed[point]["median"] == seconds and timed[point]["rounds"] > 1
    elements = 16 * 2048 * 7 * 7
    assert rows["cosine_gate", "forward", "channels_last"]["bytes"] == 2 * 2 * elements
    assert rows["cosine_gate", "forward", "contiguous"]["bytes"] == 3 * 2 * elements
    assert {(o["op"], o["implementation"]) for o in written["overheads"]} >= {(op, "cpu") for op, *_ in rows}
    assert "| `cosine_gate` | cpu | " in gpu_table.section([written])
    assert "`shift_conv1x1` (cpu), backward, over the convolution without a shift: " in gpu_table.section([written])


@needs_extras
def test_a_run_out_of_time_skips_the_rest():
    run = benchmarks("--device", "rehearsal", "--minutes", "0", "-k", "temporal_shift and 2048x7", "-rs")
    assert "the 0 minutes of --minutes are over" in run.stdout and " passed" not in run.stdout


@needs_extras
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said():
    run = benchmarks("--device", "cuda")
    assert run.returncode != 0 and "no back end of tempops runs on the GPU (cuda: " in run.stderr


@needs_extras
def test_turns(monkeypatch):
    """The implementations take turns, each under its back end, and pytest-benchmark is told the times of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import turns

    called, told = [], []

    def call(name):
        called.append((name, _backend._choice.name))
        ticks[0] += {"eager": 3.0, "tempops": 1.0}[name]

    ticks = [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: ticks[0])
    prepared = {
        "eager": turns.Prepared("eager", [lambda: call("eager")]),
        "tempops": turns.Prepared(None, [lambda: call("tempops")]),
    }
    seconds = turns.seconds_in_turns(prepared, {"eager": 1, "tempops": 2})
    assert called == 3 * [("eager", "eager"), *2 * [("tempops", None)]]
    assert seconds == {"eager": [3.0] * 3, "tempops": [1.0] * 6}

    clock = turns.Clock()

    class Benchmark:
        def pedantic(self, target, rounds):
            for _ in range(rounds):
                start = clock()
                target()
                told.append(clock() - start)
            target()  # as pytest-benchmark does, for the result

    clock.tell(Benchmark(), [0.5, 0.25, 1.0])
    assert told == [0.5, 0.25, 1.0]


@needs_extras
def test_device_time(monkeypatch):
    """The times are those of the replays over the calls of a graph, and every buffer has its turn in it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import devices
    import turns

    calls, replays, ticks = [], [], itertools.count()

    class Graph:
        def replay(self):
            replays.append(len(calls))

        def reset(self):
            pass

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(ticks), len(replays)

        def elapsed_time(self, later):
            assert later.at[0] == self.at[0] + 1 and later.at[1] == self.at[1] + 1  # one replay lies between them
            return 1000.0 if self.at[0] == 3 else 24.0  # milliseconds; one replay was disturbed

    @contextlib.contextmanager
    def graph(graph, stream):
        calls.clear()
        yield

    for name, fake in {"CUDAGraph": Graph, "Event": Event, "graph": graph}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(devices.Cuda, "__init__", lambda self: None)
    prepared = turns.Prepared(None, [lambda i=i: calls.append(i) for i in range(3)])
    seconds = devices.Cuda().seconds({"op": prepared})["op"]
    assert calls == [0, 1, 2] * 4 and statistics.median(seconds) == pytest.approx(0.024 / 12)


def test_sizes_for_a_gpu(monkeypatch):
    pytest.importorskip("av")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import devices
    from activations import SIZES

    device = devices.Cuda.__new__(devices.Cuda)
    device.cache = 60_000_000
    for shape, (_, *sizes) in SIZES.items():
        frames = device.frames(shape)
        assert frames % 16 == 0 and frames * torch.Size(sizes).numel() * 2 >= 64 << 20
        traffic = 2 * 64 << 20
        assert device.buffers(traffic) * traffic > 3 * device.cache


def made_report() -> dict:
    def row(op, direction, backend, copy, eager, **more):
        seconds = {"tempops": 1e-4, "copy": copy * 1e-4, "eager": eager * 1e-4, "compile": 2e-4, **more}
        matmul = op == "shift_conv1x1"
        return {"op": op, "direction": direction, "layout": "contiguous", "dtype": "float32", "shape": "256x56",
                "backend": backend, "matmul": matmul, "bytes": 400_000_000, "seconds": seconds}  # fmt: skip

    return {
        "machine": {"GPU": "NVIDIA X100", "driver": "1.2", "CUDA": "13.0", "cuDNN": 9, "torch": "2.11.0",
                    "triton": "3.6.0", "commit": "abc"},
        "notes": ["3 measurements are missing: the 7.5 minutes of --minutes were over."],
        "overheads": [{"op": "temporal_shift", "implementation": "cuda", "seconds": 6e-6, "add": 4e-6}],
        "rows": [
            row("temporal_shift", "forward", "cuda", 0.9, 4.0),
            row("temporal_shift", "forward", "cuda", 1.0, 9.0),
            row("temporal_shift", "backward", "cuda", 0.8, 3.0),
            row("temporal_shift", "forward", "triton", 0.7, 1.0),
            row("shift_conv1x1", "forward", "cuda", 0.1, 2.0, conv=0.95e-4),
        ],
    }  # fmt: skip


def test_the_tables_of_made_figures(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/kernels.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "benchmarks" / "results" / "x100.json").write_text(json.dumps(made_report()))
    readme, kernels = gpu_table.made(tmp_path).values()
    for line in (
        "**NVIDIA X100** (driver 1.2, CUDA 13.0, cuDNN 9, torch 2.11.0, triton 3.6.0, commit abc). "
        "A copy moves up to 40000 GB/s.",
        "| `temporal_shift` | cuda | 90% (95%) | 4.00x (6.00x) | 2.00x (2.00x) "
        "| 80% (80%) | 3.00x (3.00x) | 2.00x (2.00x) | 1.50x |",
        "| `temporal_shift` | triton | 70% (70%) | 1.00x (1.00x) | 2.00x (2.00x) | - | - | - | - |",
        "| `shift_conv1x1` | cuda | - | 2.00x (2.00x) | 2.00x (2.00x) | - | - | - | - |",
        "- cuda over eager, worst of 4: 2.00x, `shift_conv1x1` forward contiguous float32 256x56.",
        "- `shift_conv1x1` (cuda), forward, over the convolution without a shift: 0.95x at 256x56; mean 0.95x.",
        "3 measurements are missing: the 7.5 minutes of --minutes were over.",
    ):
        assert f"\n{line}\n" in readme
    assert gpu_table.NONE not in readme
    rows = [line.split(" | ") for line in kernels.splitlines() if line.startswith("| `temporal_shift")]
    assert [row[-1] for row in rows] == ["NVIDIA X100: 80% to 100% of a copy |", "not measured yet |"]
    assert gpu_table.in_readme(readme, []) == gpu_table.in_readme((ROOT / "README.md").read_text(), [])


def test_the_files_are_what_the_tool_makes_of_the_results():
    for path, text in gpu_table.made(ROOT).items():
        assert path.read_text() == text, f"{path.name}: run python tools/gpu_table.py"
