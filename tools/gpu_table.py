"""Writes what was measured on GPUs into README.md and docs/kernels.md, from benchmarks/results/*.json.

    pytest benchmarks --report benchmarks/results/h200.json && python tools/gpu_table.py
    python tools/gpu_table.py speed.json     # prints the README's section for that report, writes nothing

Between the two marker comments of the README everything is this script's; in docs/kernels.md it is the last column.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- made by tools/gpu_table.py -->", "<!-- end of what tools/gpu_table.py made -->"
DIRECTIONS = ("forward", "backward")
NONE = "No GPU result has been recorded yet."
NOT_YET = "not measured yet"
LEGEND = """\
Each cell has the worst case over shapes, dtypes and layouts, and in parentheses the geometric mean. "of copy" is the
time of a device-to-device copy of as many bytes over that of the op, "eager" and "compile" how many times faster it is
than plain PyTorch and `torch.compile` of it, "call" the host's time of a call on a kilobyte over that of `torch.add`.
Tensors have 2^25 elements or more: at least 64 MiB."""


def load(folder: Path) -> list[dict]:
    """The reports of a folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def section(reports: list[dict]) -> str:
    """What stands between the markers of the README."""
    return "\n\n".join([LEGEND, *map(_measured, reports)]) if reports else NONE


def _measured(report: dict) -> str:
    """The table of one report, and what it was measured with."""
    machine, rows = report["machine"], report["rows"]
    known = [name for name in ("driver", "CUDA", "cuDNN", "torch", "triton", "commit") if name in machine]
    versions = [f"{name} {machine[name]}" for name in known]
    copies = [row["bytes"] / row["seconds"]["copy"] for row in rows if "copy" in row["seconds"]]
    copy = f" A copy moves up to {max(copies) / 1e9:.0f} GB/s." if copies else ""
    lines = [
        f"**{machine['GPU']}** ({', '.join(versions)}).{copy}",
        "",
        "| op | back end | " + " | ".join(f"{d}: of copy | eager | compile" for d in DIRECTIONS) + " | call |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for op, backend in dict.fromkeys((row["op"], row["backend"]) for row in rows):
        cells = []
        for direction in DIRECTIONS:
            chosen = [r for r in rows if (r["op"], r["backend"], r["direction"]) == (op, backend, direction)]
            shares = [] if any(row["matmul"] for row in chosen) else list(_over(chosen, "copy"))
            cells.append(_worst(shares, "{:.0%}"))
            cells += [_worst(list(_over(chosen, name)), "{:.2f}x") for name in ("eager", "compile")]
        calls = [o for o in report["overheads"] if (o["op"], o["implementation"]) == (op, backend)]
        cells.append(f"{calls[0]['seconds'] / calls[0]['add']:.2f}x" if calls else "-")
        lines.append(f"| `{op}` | {backend} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_worst_cases(rows), *map(_against_convolution, _groups(rows)), *_notes(report)])


def _worst_cases(rows: list[dict]) -> Iterator[str]:
    """By back end and baseline: the comparison that came out worst, by name."""
    names = {"eager": "eager", "compile": "`torch.compile`", "max-autotune": "`torch.compile`, `max-autotune`"}
    for backend in dict.fromkeys(row["backend"] for row in rows):
        for baseline, name in names.items():
            found = [(f, row) for row in rows if row["backend"] == backend for f in _over([row], baseline)]
            if found:
                worst, row = min(found, key=lambda pair: pair[0])
                place = " ".join(row[key] for key in ("direction", "layout", "dtype", "shape"))
                yield f"- {backend} over {name}, worst of {len(found)}: {worst:.2f}x, `{row['op']}` {place}."


def _notes(report: dict) -> Iterator[str]:
    """What the run said against its own figures."""
    doubts = [note for note in report["notes"] if "missing" in note or "not to be trusted" in note]
    yield from (["", *doubts] if doubts else [])


def _groups(rows: list[dict]) -> list[list[dict]]:
    """The rows of each op, back end and direction, with the convolution alone beside them."""
    rows = [row for row in rows if {"tempops", "conv"} <= row["seconds"].keys()]
    keys = dict.fromkeys((row["op"], row["backend"], row["direction"]) for row in rows)
    return [[row for row in rows if (row["op"], row["backend"], row["direction"]) == key] for key in keys]


def _against_convolution(rows: list[dict]) -> str:
    """A sentence: by shape the worst case against the convolution without a shift, and the mean over all."""
    shapes = {
        shape: min(_over([row for row in rows if row["shape"] == shape], "conv"))
        for shape in dict.fromkeys(row["shape"] for row in rows)
    }
    told = ", ".join(f"{figure:.2f}x at {shape}" for shape, figure in shapes.items())
    name = f"`{rows[0]['op']}` ({rows[0]['backend']}), {rows[0]['direction']}"
    return f"- {name}, over the convolution without a shift: {told}; mean {_mean(list(_over(rows, 'conv'))):.2f}x."


def outcome(reports: list[dict], op: str, direction: str) -> str:
    """What the last column of docs/kernels.md says: of each GPU the CUDA kernels' share of a copy, worst to best."""
    found = []
    for report in reports:
        rows = [row for row in report["rows"] if (row["op"], row["backend"]) == (op, "cuda")]
        shares = list(_over([row for row in rows if direction in ("both", row["direction"])], "copy"))
        if shares:
            found.append(f"{report['machine']['GPU']}: {min(shares):.0%} to {max(shares):.0%} of a copy")
    return "; ".join(found) or NOT_YET


def _over(rows: Iterable[dict], baseline: str) -> Iterator[float]:
    """How many times faster the op is than a baseline, wherever both were timed."""
    for row in rows:
        seconds = row["seconds"]
        if "tempops" in seconds and baseline in seconds:
            yield seconds[baseline] / seconds["tempops"]


def _worst(figures: list[float], form: str) -> str:
    return f"{form.format(min(figures))} ({form.format(_mean(figures))})" if figures else "-"


def _mean(figures: list[float]) -> float:
    return math.exp(sum(map(math.log, figures)) / len(figures))


def in_readme(text: str, reports: list[dict]) -> str:
    """The README with what lies between its markers made anew."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md must have a line {BEGIN!r} and after it a line {END!r}")
    return f"{before}{BEGIN}\n{section(reports)}\n{END}{after}"


def in_kernels(text: str, reports: list[dict]) -> str:
    """docs/kernels.md with the last column of its table made anew. A row without an op belongs to the op above it."""
    lines, op = [], ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and cells[1] in ("both", "in place", *DIRECTIONS):
            op = cells[0].strip("`") or op
            line = "| " + " | ".join([*cells[:-1], outcome(reports, op, cells[1])]) + " |"
            line = line.replace("|  |", "| |")
        lines.append(line)
    return "\n".join(lines) + "\n"


def made(root: Path) -> dict[Path, str]:
    """By file: the text that it should have."""
    reports = load(root / "benchmarks" / "results")
    readme, kernels = root / "README.md", root / "docs" / "kernels.md"
    return {readme: in_readme(readme.read_text(), reports), kernels: in_kernels(kernels.read_text(), reports)}


def main() -> None:
    """Writes both files, or prints the section of the reports named on the command line."""
    if sys.argv[1:]:
        print(section([json.loads(Path(path).read_text()) for path in sys.argv[1:]]))
        return
    for path, text in made(ROOT).items():
        path.write_text(text)


if __name__ == "__main__":
    main()
