"""Options of `pytest benchmarks`, the bar while it runs, and the report that closes it.

    pip install -e '.[bench]' && pytest benchmarks
    pytest benchmarks -k "temporal_conv and backward" --plot speed.png

The options of pytest-benchmark work too; --benchmark-verbose brings its own table back.
"""

import ctypes
import importlib.util
from pathlib import Path

import pytest

NEEDED = {"tempops": "tempops", "pytest_benchmark": "pytest-benchmark", "av": "av", "tqdm": "tqdm"}
rows_key = pytest.StashKey[dict]()
network_rows_key = pytest.StashKey[dict]()
contention_key = pytest.StashKey[object]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tempops")
    group.addoption("--full", action="store_true", help="every dtype, and torch.compile at every shape and layout")
    group.addoption("--plot", type=Path, metavar="FILE", help="draw every time over that of a copy (png, svg, pdf)")
    group.addoption("--report", type=Path, metavar="FILE", help="write the rows of the report as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    plot, report = config.getoption("--plot"), config.getoption("--report")
    needed = NEEDED | ({"matplotlib": "matplotlib"} if plot else {})
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise pytest.UsageError(f"the benchmarks need {', '.join(missing)}; install with: pip install -e '.[bench]'")
    for path in filter(None, (plot, report)):
        if not path.absolute().parent.is_dir():
            raise pytest.UsageError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    config.option.benchmark_quiet = True
    from report import Contention

    config.stash[rows_key] = {}
    config.stash[network_rows_key] = {}
    config.stash[contention_key] = Contention()
    _keep_memory()


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> dict:
    """The rows of the report, by point."""
    return request.config.stash[rows_key]


@pytest.fixture
def network_rows(request: pytest.FixtureRequest) -> dict:
    """The rows of the models' report, by model and direction."""
    return request.config.stash[network_rows_key]


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if session.items and not config.option.collectonly:
        config.pluginmanager.register(Bar(config, len(session.items)))


class Bar:
    """A progress bar instead of pytest's dots; only on a terminal, and only where pytest is not asked for more."""

    def __init__(self, config: pytest.Config, total: int) -> None:
        from tqdm import tqdm

        reporter = config.pluginmanager.get_plugin("terminalreporter")
        self.shown = reporter is not None and reporter.isatty and config.option.verbose == 0
        if self.shown:
            reporter.showfspath = False
        form = "{percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc}"
        self.tqdm = tqdm(total=total, bar_format=form, dynamic_ncols=True, leave=False, disable=not self.shown)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tqdm.set_description_str(nodeid.partition("[")[2].rstrip("]"))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.tqdm.update()

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return ("passed", "", "") if self.shown and report.when == "call" and report.passed else None

    def pytest_sessionfinish(self) -> None:
        self.tqdm.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows, networks = (list(config.stash[key].values()) for key in (rows_key, network_rows_key))
    if not rows and not networks:
        return
    import report

    terminalreporter.section("tempops")
    for line in report.lines(rows, _notes(config)) if rows else []:
        terminalreporter.write_line(line)
    for line in report.network_lines(networks, _contention(config)) if networks else []:
        terminalreporter.write_line(line)
    if rows and (path := config.getoption("--plot")):
        report.plot(rows, path)
        terminalreporter.write_line(f"wrote {path}")
    if path := config.getoption("--report"):
        report.write_json(rows, networks, path)
        terminalreporter.write_line(f"wrote {path}")


def _notes(config: pytest.Config) -> list[str]:
    compiled = "at every shape and layout" if config.getoption("--full") else "at two shapes, one in each layout"
    return [
        "Medians, all memory warm. A copy moves as many bytes as the op must, reads and writes together.",
        f"torch.compile: of the eager reference, {compiled}.",
        *_contention(config),
    ]


def _contention(config: pytest.Config) -> list[str]:
    if (others := float(config.stash[contention_key])) <= 0.05:
        return []
    return [f"Other processes kept {others:.0%} of the cores busy: these times are not to be trusted."]


def _keep_memory() -> None:
    """Has glibc keep freed memory, as PyTorch's GPU allocators do: page faults would drown the large tensors."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    trim_threshold, mmap_max = -1, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
