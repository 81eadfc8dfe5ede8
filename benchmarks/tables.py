"""The papers' tables of cost, re-measured: the published figure beside eager PyTorch, torch.compile and tempops.

    python -m benchmarks.tables                      # all of them
    python -m benchmarks.tables cmr7 tdn6 --device cuda --dtype float16
    python -m benchmarks.tables --help

Multiply-adds are counted on the published input. Times are those of this machine, so that only their ratio to the
table's baseline row compares with the paper. Weights are random, models in evaluation and channels_last.
"""

import argparse
import functools
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tempops
from benchmarks.report import Contention, keep_memory, machine
from tempops.data import count_frames, model_input, normalize, read_frames, sample_segments
from tempops.models import create_model

VIDEO = Path(__file__).parent / "data" / "bigbuckbunny.mp4"
IMPLEMENTATIONS = ("eager", "compile", "tempops")
CLASSES = 174  # Something-Something
QUOTED = "published, not re-measured"


@dataclass(frozen=True)
class Run:
    """`times` passes of one model over clips of `frames` frames."""

    model: str
    frames: int = 8
    options: tuple[tuple[str, object], ...] = ()
    times: int = 1
    size: tuple[int, int] = (224, 224)

    def make(self, frames: int) -> torch.nn.Module:
        return create_model(self.model, CLASSES, n_segment=frames, **dict(self.options)).eval()


@dataclass(frozen=True)
class Row:
    """What the paper says of one method, and the runs that give our figure; none where it is only quoted."""

    name: str
    published: float | None
    runs: tuple[Run, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Table:
    """`unit` is the published figures': GFLOPs (multiply-adds), ms or videos/s; ratios are to the row `baseline`."""

    title: str
    unit: str
    protocol: str
    baseline: str
    rows: tuple[Row, ...]
    batch: int = 1
    loading: bool = False


@dataclass
class Line:
    """A row as it is printed: figures by column."""

    name: str
    published: float | None = None
    counted: float | None = None
    times: dict[str, float] = field(default_factory=dict)
    note: str = ""


def row(
    name: str, published: float | None, model: str | None = None, frames: int = 8, note: str = "", **options
) -> Row:
    times, size = options.pop("times", 1), options.pop("size", (224, 224))
    runs = () if model is None else (Run(model, frames, tuple(options.items()), times, size),)
    return Row(name, published, runs, note if runs else QUOTED)


TEFE_SIZE = (224, 256)
CENTRE = "ResNet-50, 8 frames of 224x224, one clip, centre crop"
TABLES: dict[str, tuple[Table, ...]] = {
    "gte2": (
        Table("GTE table 2", "GFLOPs", "ResNet-50, 224x224", "TSM, 16 frames", (
            row("TSM, 16 frames", 65, "tsm", 16, note="the paper prints 33, which is that of 8 frames"),
            row("S3D, 64 frames", 66.8),
            row("GST, 8 frames", 29.5, "gst"),
            row("GST, 16 frames", 59, "gst", 16),
            row("GTE, 8 frames", 25.3, "gte"),
            row("GTE, 16 frames", 50.6, "gte", 16),
        )),
    ),
    "cmr3": (
        Table("CMR table 3", "GFLOPs", CENTRE, "r = 8", tuple(
            row(f"r = {r}", published, "cmr", reduction=r, note="pooling first, r hardly changes the count")
            for r, published in ((1, 55), (4, 39), (8, 33), (16, 32))
        )),
    ),
    "cmr5": (
        Table("CMR table 5", "ms", CENTRE, "CME all, SME part", tuple(
            row(f"CME {names[0]}, SME {names[1]}", published, "cmr", cme=places[0], sme=places[1])
            for names, places, published in (
                (("all", "all"), ("all", "all"), 30.4),
                (("all", "part"), ("all", "first"), 21.4),
                (("part", "all"), ("first", "all"), 26.5),
                (("part", "part"), ("first", "first"), 17.4),
            )
        )),
    ),
    "cmr7": tuple(
        Table(f"CMR table 7, {what}", unit, f"V100, {CENTRE}, batch {batch}", "TSM", tuple(
            row(name, published[column], model, **options)
            for name, published, model, options in (
                ("TSM", (12.3, 107.3), "tsm", {}),
                ("TEI", (20.4, 78.5), "teinet", {}),
                ("STM", (14.7, 93.2), "stm", {}),
                ("TDRL", (63.8, 49.5), "tdrl", {}),
                ("TIM + CME", (18.9, 75.2), "cmr", {"sme": "none"}),
                ("TIM + SME", (16.3, 72.6), "cmr", {"cme": "none"}),
                ("TIM + CME + SME", (21.4, 61.8), "cmr", {}),
            )
        ), batch)
        for column, (what, unit, batch) in enumerate((("latency", "ms", 1), ("throughput", "videos/s", 8)))
    ),
    "tefe1": (
        Table("TEFE tables 1 and 2", "GFLOPs", "ResNet-50, 224x224, TEFE 224x256", "TSN, 8 frames", (
            row("TSN, 8 frames", 33, "tsn"),
            row("TSN, 16 frames", 66, "tsn", 16),
            row("TSM, 8 frames", 33, "tsm"),
            row("TSM, 16 frames", 65, "tsm", 16),
            row("I3D, 32 frames, 6 clips", 918, "i3d", 32, times=6),
            row("TEFE, 8 frames", 90, "tefe", size=TEFE_SIZE),
            row("TEFE, 16 frames", 181, "tefe", 16, size=TEFE_SIZE),
            Row("TEFE, 8 + 16 frames", 271, (Run("tefe", 8, size=TEFE_SIZE), Run("tefe", 16, size=TEFE_SIZE))),
        )),
    ),
    "tefe5": (
        Table("TEFE table 5", "GFLOPs", "ResNet-50, 16 frames, 224x256", "TE 1 1 1 1, FE 0 3 5 2", tuple(
            row(f"TE {' '.join(map(str, te))}, FE {' '.join(map(str, fe))}", None, "tefe", 16, te=te, fe=fe,
                size=TEFE_SIZE, note="the paper gives no cost")
            for te, fe in (
                ((3, 4, 6, 3), (0, 0, 0, 0)),
                ((0, 0, 0, 0), (0, 4, 6, 3)),
                ((3, 3, 3, 3), (0, 1, 3, 0)),
                ((2, 2, 2, 2), (0, 2, 4, 1)),
                ((1, 1, 1, 1), (0, 3, 5, 2)),
            )
        )),
    ),
    "tdn5": (
        Table("TDN table 5", "GFLOPs", CENTRE, "none", tuple(
            row(name, published, "tdn", short_stages=short, long_stages=long)
            for name, published, short, long in (
                ("none", 33, (), ()),
                ("S-TDM 1, L-TDM 2-5", 35, (1,), (2, 3, 4, 5)),
                ("S-TDM 1-2, L-TDM 3-5", 36, (1, 2), (3, 4, 5)),
                ("S-TDM 1-3, L-TDM 4-5", 38, (1, 2, 3), (4, 5)),
            )
        )),
        Table("TDN table 1d", "GFLOPs", CENTRE, "TSN", (
            row("TSN", 33, "tsn"),
            row("T-Conv", 33, "tdn", short_stages=(), long_stages=()),
            row("TSM", 33, "tsm"),
            row("TEINet", 33, "teinet"),
            row("TEA", 35),
            row("TDM", 36, "tdn"),
        )),
    ),
    "tdn6": (
        Table("TDN table 6", "ms", "V100, ResNet-50, 8 frames of 224x224, batch 16, with loading", "TSN", (
            row("TSN", 7.9, "tsn"),
            row("TSM, 16 frames", 16.7, "tsm", 16),
            row("STM", 11.1, "stm"),
            row("I3D, 32 frames, 3 crops, 2 clips", 2095, "i3d", 32, times=6),
            row("S-TDM", 12.3, "tdn", long_stages=()),
            row("L-TDM", 15.8, "tdn", short_stages=()),
            row("TDN", 22.1, "tdn"),
        ), 16, True),
    ),
}  # fmt: skip
SPECIAL = ("menet2", "gte1")  # made by functions of their own
NAMES = ("menet2", "gte1", "gte2", "cmr3", "cmr5", "cmr7", "tefe1", "tefe5", "tdn5", "tdn6")


@dataclass(frozen=True)
class Setting:
    """What the command line asks for; None: as published."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    seconds: float
    size: int
    batch: int | None
    frames: int | None

    def said(self) -> str:
        frames = f"{self.frames} frames for every 8" if self.frames else "frames as published"
        batch = f"batch {self.batch}" if self.batch else "batch as published"
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}, {self.size} pixels for 224, {frames}, {batch}"


# --- figures ----------------------------------------------------------------------------------------------------------


@functools.cache
def multiply_adds(run: Run) -> float:
    """G, of the published input."""
    with torch.device("meta"), tempops.backend("eager"), FlopCounterMode(display=False) as counter:
        model = run.make(run.frames)
        model(torch.empty(1, run.frames, model.in_channels, *run.size))
    return run.times * counter.get_total_flops() / 2e9


def frames_of(run: Run, setting: Setting) -> int:
    return run.frames if setting.frames is None else run.frames * setting.frames // 8


@functools.cache
def latencies(run: Run, batch: int, loading: bool, setting: Setting) -> dict[str, float]:
    """Seconds of one batch by every implementation, in turns; with reading the clip from its file where `loading`."""
    torch.manual_seed(0)
    sides = [round(side / 224 * setting.size) for side in run.size]
    model = run.make(frames_of(run, setting)).to(setting.device, setting.dtype, memory_format=torch.channels_last)
    x = torch.randn(batch, model.n_segment, model.in_channels, *sides).to(setting.device, setting.dtype)

    def read() -> Tensor:
        if not loading:
            return x
        clips = [model_input(model, VIDEO, size=setting.size)[0] for _ in range(batch)]
        return torch.cat(clips).to(setting.device, setting.dtype)

    seconds = timed(implementations(model, read, setting), setting)
    return {name: run.times * each for name, each in seconds.items()}


def implementations(module: torch.nn.Module, read: Callable[[], Tensor], setting: Setting) -> dict[str, Callable]:
    """What is timed: the module on what `read` gives, in plain PyTorch, on the ops, and compiled."""

    def call(forward: Callable, backend: str | None) -> None:
        with torch.inference_mode(), nullcontext() if backend is None else tempops.backend(backend):
            forward(read())

    calls = {"eager": functools.partial(call, module, "eager"), "tempops": functools.partial(call, module, None)}
    if setting.compile:
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, dynamic=False)
        calls["compile"] = functools.partial(call, compiled, "eager")
    return calls


def timed(calls: dict[str, Callable], setting: Setting) -> dict[str, float]:
    """The median seconds of each call; they take turns, so that a slower minute of the machine slows them all."""
    for call in calls.values():
        for _ in range(2):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while time.perf_counter() - start < setting.seconds * len(calls) or len(taken["tempops"]) < 3:
        for name, call in calls.items():
            synchronize(setting)
            before = time.perf_counter()
            call()
            synchronize(setting)
            taken[name].append(time.perf_counter() - before)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def synchronize(setting: Setting) -> None:
    if setting.device.type == "cuda":
        torch.cuda.synchronize()


def lines_of(table: Table, setting: Setting) -> Iterator[Line]:
    batch = setting.batch or table.batch
    for each in table.rows:
        line = Line(each.name, each.published, note=each.note)
        if each.runs:
            line.counted = sum(map(multiply_adds, each.runs))
            parts = [latencies(run, batch, table.loading, setting) for run in each.runs]
            for name in parts[0]:
                seconds = sum(part[name] for part in parts) / batch
                line.times[name] = 1 / seconds if table.unit == "videos/s" else 1e3 * seconds
        yield line


def menet2(setting: Setting) -> tuple[Table, list[Line]]:
    """Frames of motion a second; TV-L1 is OpenCV's, for two frames of the clip at this size."""
    table = Table("MENet table 2", "frames/s", "the representation of motion alone", "TV-L1", ())
    others = {"FlowNet": 52, "FlowNet2.0": 8, "MotionNet": 120, "Disp. map, 112x112": 190}
    pictures = read_frames(VIDEO, sample_segments(count_frames(VIDEO), 1, 4))[0]
    frames = normalize(pictures, setting.size)
    layer = tempops.nn.MotionEnhancement().eval().to(setting.device, setting.dtype)
    x = frames.flatten(0, 1)[None].to(setting.device, setting.dtype)
    seconds = timed(implementations(layer, lambda: x, setting), setting)
    ours = Line("ME", 1500, times={name: (layer.n_frames - 1) / each for name, each in seconds.items()})
    tv_l1 = Line("TV-L1", 15, note="OpenCV's, on the processor")
    try:
        flow_of = _tv_l1()
    except ImportError:
        tv_l1.note = "not measured: pip install opencv-contrib-python-headless"
    else:
        grey = (frames.mean(1) * 40 + 128).clamp(0, 255).byte().numpy()
        once = timed({"tempops": lambda: flow_of(grey[0], grey[1])}, setting)["tempops"]
        tv_l1.times = dict.fromkeys(seconds, 1 / once)
    quoted = [Line(name, published, note=QUOTED) for name, published in others.items()]
    return table, [tv_l1, *quoted, ours]


def _tv_l1() -> Callable:
    import cv2

    algorithm = cv2.optflow.DualTVL1OpticalFlow_create()
    return lambda first, second: algorithm.calc(first, second, None)


def gte1(setting: Setting) -> list[tuple[Table, list[Line]]]:
    """The paper's formulas for a 3x3(x3) block in units of C^2, and what is built; then the model's total over t."""
    t = 0.25
    block = Table("GTE table 1", "C^2", "parameters of a block, C in and out, t = 1/4", "C2D", ())
    built = {"C2D": built_parameters("tsn"), "GST": built_parameters("gst"), "GTE": built_parameters("gte")}
    formulas = {"C2D": 9, "C3D": 27, "GST": (1 - t + 3 * t) * 9 / 2, "GTE": (9 + 3 * t) / 2}
    lines = [Line(name, value, built.get(name)) for name, value in formulas.items()]
    lines[-1].note = "LTS reads C/2 and writes tC channels; the formula counts C/2 and C"
    lines.append(Line("GTE, depthwise LTS", None, built_parameters("gte", variant="depthwise")))
    total = Table("GTE figure 3b", "M parameters", "ResNet-50, 174 classes", "t = 1/4", ())
    totals = [Line(f"t = 1/{d}", 18.0 if d == 4 else None, built_total(t=1 / d)) for d in (2, 4, 8, 16)]
    totals.append(Line("smaller t", 19.3, note="which t, the paper does not say; not reproducible"))
    return [(block, lines), (total, totals)]


def built_parameters(name: str, **options) -> float:
    """Of the layer that takes the last 3x3 convolution's place, in units of its C^2."""
    with torch.device("meta"):
        conv2 = create_model(name, CLASSES, **options).layer4[-1].conv2
    return sum(p.numel() for p in conv2.parameters()) / 512**2


def built_total(**options) -> float:
    with torch.device("meta"):
        return sum(p.numel() for p in create_model("gte", CLASSES, **options).parameters()) / 1e6


# --- the page ---------------------------------------------------------------------------------------------------------


def markdown(table: Table, lines: list[Line]) -> str:
    """Each figure with its ratio to the baseline row's."""
    base = next(line for line in lines if line.name == table.baseline)
    timed = [name for name in IMPLEMENTATIONS if any(name in line.times for line in lines)]
    counts = "G multiply-adds" if table.unit in ("GFLOPs", "ms", "videos/s") else "built"
    unit = "ms" if table.unit == "GFLOPs" else table.unit
    columns: list[tuple[str, Callable[[Line], float | None]]] = [(f"published, {table.unit}", lambda li: li.published)]
    if any(line.counted for line in lines):
        columns.append((counts, lambda li: li.counted))
    columns += [(f"{name}, {unit}", functools.partial(lambda name, li: li.times.get(name), name)) for name in timed]
    head = ["", *(title for title, _ in columns), "note"]
    out = [f"## {table.title}", "", f"Published for: {table.protocol}. Ratios are to {table.baseline}.", ""]
    out += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        cells = [figure(value(line), value(base)) for _, value in columns]
        out.append("| " + " | ".join([line.name, *cells, line.note]) + " |")
    return "\n".join(out) + "\n"


def figure(value: float | None, base: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" + (f" ({value / base:.2f}x)" if base else "")


def plot(results: list[tuple[Table, list[Line]]], path: Path) -> None:
    """The ratio of each row's time to its baseline's, over the published ratio: on the line, ours is as published."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 7), layout="constrained")
    for table, lines in results:
        base = next(line for line in lines if line.name == table.baseline)
        chosen = [li for li in lines if li.published and base.published and {"tempops"} <= li.times.keys() & base.times]
        inverted = table.unit in ("videos/s", "frames/s")
        points = [(li.published / base.published, li.times["tempops"] / base.times["tempops"]) for li in chosen]
        points = [(1 / a, 1 / b) if inverted else (a, b) for a, b in points]
        if points:
            axes.scatter(*zip(*points), label=table.title)
    ends = axes.get_xlim()
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="published cost / that of the baseline row")
    axes.set_ylabel("our time / that of the baseline row")
    if axes.collections:
        axes.legend()
    figure.savefig(path, dpi=150)


def positive(kind: type) -> Callable[[str], float]:
    """A parser of arguments: a number of this kind above 0."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be a positive {kind.__name__}, got {text}")
        return value

    return parse


def arguments(argv: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(NAMES)}, or all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--batch", type=positive(int), help="clips at once; as published on a GPU, else 1")
    parser.add_argument("--frames", type=positive(int), help="frames for a published 8; others in proportion")
    parser.add_argument("--size", type=positive(int), help="pixels for a published 224; 224 on a GPU, else 112")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile; only on a GPU unless given"
    )
    parser.add_argument("--seconds", type=positive(float), default=0.5, help="of timed calls for each figure")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for tables.md, tables.json and tables.png")
    args = parser.parse_args(argv)
    for name in args.tables:
        if name not in (*NAMES, "all"):
            parser.error(f"there is no table {name}; there are {', '.join(NAMES)}")
    missing = [name for name in ("av", "tqdm", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"this needs {', '.join(missing)}; install with: pip install -e '.[tables]'")
    if not args.out.is_dir():
        parser.error(f"there is no folder {args.out}")
    try:
        torch.zeros((), device=args.device).item()
    except (AssertionError, ImportError, RuntimeError):
        parser.error(f"PyTorch finds no device {args.device}")
    args.tables = NAMES if not args.tables or "all" in args.tables else tuple(dict.fromkeys(args.tables))
    runs = [(t, run) for name in args.tables for t in TABLES.get(name, ()) for row in t.rows for run in row.runs]
    for table, run in runs if args.frames else ():
        try:
            with torch.device("meta"):
                model = run.make(frames_of(run, args))
            if table.loading:
                model_input(model, VIDEO, size=8)
        except ValueError as error:
            parser.error(f"--frames {args.frames} does not suit {run.model}: {error}")
    return args


def main(argv: Iterable[str] | None = None) -> None:
    from tqdm import tqdm

    args = arguments(argv)
    on_gpu = args.device.startswith("cuda")
    setting = Setting(
        device=torch.device(args.device),
        dtype=getattr(torch, args.dtype),
        compile=on_gpu if args.compile is None else args.compile,
        seconds=args.seconds,
        size=args.size or (224 if on_gpu else 112),
        batch=args.batch or (None if on_gpu else 1),
        frames=args.frames,
    )
    keep_memory()
    contention = Contention()
    results: list[tuple[Table, list[Line]]] = []
    total = sum(len(table.rows) for name in args.tables for table in TABLES.get(name, ()))
    total += len(set(args.tables) & set(SPECIAL))
    with tqdm(total=total, leave=False) as bar:
        for name in args.tables:
            bar.set_description_str(name)
            if name == "menet2":
                results.append(menet2(setting))
                bar.update()
            elif name == "gte1":
                results += gte1(setting)
                bar.update()
            for table in TABLES.get(name, ()):
                lines = []
                for line in lines_of(table, setting):
                    lines.append(line)
                    bar.update()
                results.append((table, lines))
    facts = machine({}) | {"setting": setting.said()}
    if on_gpu:
        facts["GPU"] = torch.cuda.get_device_name()
    head = [f"{key}: {value}" for key, value in facts.items()]
    if (others := float(contention)) > 0.05:
        head.append(f"Other processes kept {others:.0%} of the cores busy: these times are not to be trusted.")
    if not setting.compile:
        head.append("torch.compile was not measured; --compile does")
    page = "# The papers' tables, re-measured\n\n" + "\n".join(f"- {line}" for line in head) + "\n\n"
    page += "\n".join(markdown(table, lines) for table, lines in results)
    print(page)
    (args.out / "tables.md").write_text(page)
    found = [
        {"title": t.title, "unit": t.unit, "protocol": t.protocol, "rows": [vars(li) for li in lines]}
        for t, lines in results
    ]
    (args.out / "tables.json").write_text(json.dumps({"machine": facts, "tables": found}, indent=1) + "\n")
    plot(results, args.out / "tables.png")


if __name__ == "__main__":
    main()
