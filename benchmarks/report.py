"""The report that closes the run: the machine, one line a comparison, means for each op, the worst cases named."""

import ctypes
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tempops import _C

DIRECTIONS = ("forward", "backward")
LAYOUTS = ("contiguous", "channels_last")
# What the op is compared with, in sentences; the first two have their columns in every report.
BASELINES = {
    "eager": "eager",
    "compile": "torch.compile",
    "max-autotune": "torch.compile, max-autotune",
    "conv": "the convolution alone",
    "copy": "a copy",
}


@dataclass
class Row:
    """One comparison: the same op on the same tensors by one back end and every baseline, a copy of the bytes too."""

    op: str
    direction: str
    layout: str
    dtype: str
    shape: str
    backend: str
    matmul: bool
    bytes: int
    seconds: dict[str, float] = field(default_factory=dict)  # median, by implementation: "tempops" or a baseline

    def __str__(self) -> str:
        return f"{self.op} {self.backend} {self.layout} {self.shape} {self.dtype}"

    def over(self, baseline: str) -> float | None:
        """How many times faster the op is than a baseline; None where either was not timed."""
        if "tempops" not in self.seconds or baseline not in self.seconds:
            return None
        return self.seconds[baseline] / self.seconds["tempops"]


@dataclass
class Overhead:
    """What a call costs the host: the wall clock of many on a kilobyte, never waiting for the device."""

    op: str
    implementation: str
    seconds: float
    add: float  # torch.add's

    @property
    def over_add(self) -> float:
        return self.seconds / self.add


@dataclass
class NetworkRow:
    """One model in one direction."""

    name: str
    direction: str
    size: int
    seconds: dict[str, float] = field(default_factory=dict)  # median, by implementation

    @property
    def over_eager(self) -> float | None:
        if self.seconds.keys() < {"eager", "tempops"}:
            return None
        return self.seconds["eager"] / self.seconds["tempops"]


def machine(device: Mapping[str, str | int]) -> dict[str, str | int]:
    """Where the figures come from: what there is to say of the device, and the rest."""
    return {
        **device,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "instruction set": _C.instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def keep_memory() -> None:
    """Has glibc keep freed memory, as PyTorch's GPU allocators do: page faults would drown the large tensors."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    trim_threshold, mmap_max = -1, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


class Contention:
    """How busy other processes keep the cores, from its creation on; 0 where the system does not say."""

    def __init__(self) -> None:
        self.before = self._seconds()

    def __float__(self) -> float:
        busy, own, wall = (after - before for after, before in zip(self._seconds(), self.before))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        """Processor seconds of all processes, processor seconds of this one and its children, wall clock."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0, 0.0, time.monotonic()
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:4]), time.monotonic()


@dataclass
class Report:
    """A run of the benchmarks."""

    machine: dict[str, str | int]
    notes: list[str]
    rows: list[Row]
    overheads: list[Overhead]
    networks: list[NetworkRow]

    @property
    def described(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.machine.items())


def lines(report: Report) -> list[str]:
    """The report as text."""
    rows = report.rows
    out = [report.described, *report.notes]
    if rows:
        out += _table(rows)
    for backend, dtype in dict.fromkeys((row.backend, row.dtype) for row in rows):
        chosen = [row for row in rows if (row.backend, row.dtype) == (backend, dtype)]
        out += ["", *_means(chosen, f"geometric mean, {backend}, {dtype}")]
    if any(row.matmul for row in rows):
        out.append("(of copy's times, the mean over all leaves out the ops whose time goes into matrix products)")
    for backend in dict.fromkeys(row.backend for row in rows):
        out += ["", *_worst([row for row in rows if row.backend == backend])]
    if report.overheads:
        out += ["", *_overheads(report.overheads)]
    if report.networks:
        out += ["", *_networks(report.networks)]
    return out


def write_json(report: Report, path: Path) -> None:
    """One row a line, so that two runs can be compared by diff."""

    def listed(items: Iterable[Row | Overhead | NetworkRow]) -> str:
        return "[\n" + ",\n".join(json.dumps(vars(item)) for item in items) + "\n]"

    machine, notes = json.dumps(report.machine), json.dumps(report.notes)
    path.write_text(
        f'{{"machine": {machine},\n"notes": {notes},\n'
        f'"overheads": {listed(report.overheads)},\n"networks": {listed(report.networks)},\n'
        f'"rows": {listed(report.rows)}}}\n'
    )


def _networks(rows: list[NetworkRow]) -> list[str]:
    """The models: times on the ops beside eager PyTorch, and over TSN's."""
    text = [("model", "direction", "size", "eager", "tempops", "over eager", "x tsn")]
    base = {row.direction: row.seconds.get("tempops") for row in rows if row.name == "tsn"}
    for row in rows:
        eager, ours = row.seconds.get("eager"), row.seconds.get("tempops")
        times = ("-" if seconds is None else f"{seconds * 1e3:.1f} ms" for seconds in (eager, ours))
        tsn = base.get(row.direction)
        ratio = ours / tsn if ours and tsn else None
        text.append((row.name, row.direction, str(row.size), *times, _times(row.over_eager), _times(ratio)))
    widths = [max(map(len, column)) for column in zip(*text)]
    pads = [f"<{width}" for width in widths[:2]] + [f">{width}" for width in widths[2:]]
    lines = ["  ".join(format(cell, pad) for cell, pad in zip(cells, pads)) for cells in text]
    return [*lines, "", f"geometric mean over eager: {_times(_mean(row.over_eager for row in rows))}"]


def plot(report: Report, path: Path) -> None:
    """Every time over that of a copy of the same bytes: a panel a direction, a line an op, a point a comparison."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report.rows
    ops = list(dict.fromkeys(row.op for row in rows))[::-1]
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 1.5 + 0.5 * len(ops)), sharey=True, layout="constrained")
    backends = dict.fromkeys(row.backend for row in rows)
    colours = dict(zip(backends, ("tab:blue", "tab:cyan")))
    drawn = [("eager", "eager", "tab:red", None), ("compile", "torch.compile", "tab:orange", None)]
    drawn += [("tempops", f"tempops {backend}", colours[backend], backend) for backend in backends]
    for panel, direction in zip(panels, DIRECTIONS):
        for i, (name, label, colour, backend) in enumerate(drawn):
            chosen = [row for row in rows if row.direction == direction and {name, "copy"} <= row.seconds.keys()]
            chosen = [row for row in chosen if row.backend == backend or backend is None]
            panel.scatter(
                [row.seconds[name] / row.seconds["copy"] for row in chosen],
                [ops.index(row.op) + 0.2 * (i - 1) for row in chosen],
                s=14,
                color=colour,
                label=label,
            )
        panel.axvline(1, color="grey", linewidth=0.8)
        panel.set(title=direction, xscale="log", xlabel="time / time of a copy of the same bytes")
        panel.set_yticks(range(len(ops)), ops)
        panel.grid(axis="x", alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(drawn))
    figure.suptitle(report.described, fontsize=9)
    figure.savefig(path, dpi=150)


def _table(rows: list[Row]) -> list[str]:
    """One line a comparison; a gap between ops."""
    over = [name for name in BASELINES if name != "copy"]
    over = [name for name in over if name in ("eager", "compile") or any(name in row.seconds for row in rows)]
    head = ("op", "direction", "layout", "dtype", "shape", "back end", "time", "speed", "of copy")
    text = [(*head, *(f"over {name}" for name in over))]
    for row in rows:
        mine, share = row.seconds.get("tempops"), row.over("copy")
        figures = ("-", "-") if mine is None else (f"{mine * 1e6:.0f} us", f"{row.bytes / mine / 1e9:.1f} GB/s")
        text.append(
            (
                row.op,
                row.direction,
                row.layout,
                row.dtype,
                row.shape,
                row.backend,
                *figures,
                "-" if share is None else f"{share:.0%}",
                *(_times(row.over(name)) for name in over),
            )
        )
    widths = [max(map(len, column)) for column in zip(*text)]
    pads = [f"<{width}" for width in widths[:6]] + [f">{width}" for width in widths[6:]]
    out = []
    for before, cells in zip([text[0], *text], text):
        if before[0] != cells[0]:
            out.append("")
        out.append("  ".join(format(cell, pad) for cell, pad in zip(cells, pads)))
    return out


def _means(rows: list[Row], title: str) -> list[str]:
    """Over layouts and shapes, for each op and over all: speed-ups, and multiples of a copy's time."""
    ops = [*dict.fromkeys(row.op for row in rows), "all"]
    width = max(map(len, (title, *ops)))
    out = [title.ljust(width) + "".join(f" |{d + ': over eager':>21}  over compile  x copy's time" for d in DIRECTIONS)]
    for op in ops:
        cells = ""
        for direction in DIRECTIONS:
            chosen = [row for row in rows if op in ("all", row.op) and row.direction == direction]
            share = _mean(row.over("copy") for row in chosen if op != "all" or not row.matmul)
            cells += f" |{_times(_mean(row.over('eager') for row in chosen)):>21}"
            cells += f"  {_times(_mean(row.over('compile') for row in chosen)):>12}"
            cells += f"  {_times(1 / share if share else None):>13}"
        out.append(op.ljust(width) + cells)
    return out


def _worst(rows: list[Row]) -> list[str]:
    half = _half(rows)
    out = [f"bfloat16 takes {half:.2f} of the time of float32 (geometric mean)"] if half else []
    for direction in DIRECTIONS:
        for baseline, name in BASELINES.items():
            timed = [row for row in rows if row.direction == direction and row.over(baseline) is not None]
            if timed:
                worst = min(timed, key=lambda row: row.over(baseline))
                over = worst.over(baseline)
                figure = f"{_times(1 / over)} its time" if baseline == "copy" else f"{_times(over)} as fast"
                out.append(f"worst {direction} against {name}: {worst}, {figure}")
    return out


def _overheads(overheads: list[Overhead]) -> list[str]:
    """What a call costs the host, an op a line."""
    names = list(dict.fromkeys(overhead.implementation for overhead in overheads))
    ops = list(dict.fromkeys(overhead.op for overhead in overheads))
    width = max(map(len, ops))
    out = ["a call on a kilobyte, time on the host and over that of torch.add"]
    out.append(" " * width + "".join(f"{name:>20}" for name in names))
    for op in ops:
        cells = {
            overhead.implementation: f"{overhead.seconds * 1e6:.1f} us {_times(overhead.over_add):>7}"
            for overhead in overheads
            if overhead.op == op
        }
        out.append(op.ljust(width) + "".join(f"{cells.get(name, '-'):>20}" for name in names))
    return out


def _half(rows: list[Row]) -> float | None:
    """bfloat16's time over float32's, where both were timed."""
    times = {(row.op, row.direction, row.layout, row.shape, row.dtype): row.seconds.get("tempops") for row in rows}
    pairs = [(seconds, times.get((*key, "float32"))) for (*key, dtype), seconds in times.items() if dtype == "bfloat16"]
    return _mean(half / single for half, single in pairs if half and single)


def _mean(values: Iterable[float | None]) -> float | None:
    logs = [math.log(value) for value in values if value]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    named = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return named[0] if named else platform.processor() or platform.machine()


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
