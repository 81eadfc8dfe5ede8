"""Options of `pytest benchmarks`, the bar while it runs, and the report that closes it.

    pip install -e '.[bench]' && pytest benchmarks
    pytest benchmarks -k "temporal_conv and backward" --plot speed.png

The options of pytest-benchmark work too; --benchmark-verbose brings its own table back.
"""

import importlib.util
import time
from pathlib import Path

import pytest

NEEDED = {"tempops": "tempops", "pytest_benchmark": "pytest-benchmark", "av": "av", "tqdm": "tqdm"}
rows_key = pytest.StashKey[dict]()
overheads_key = pytest.StashKey[dict]()
start_key = pytest.StashKey[float]()
network_rows_key = pytest.StashKey[dict]()
contention_key = pytest.StashKey[object]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tempops")
    group.addoption(
        "--device",
        choices=("cpu", "cuda", "rehearsal"),
        help="what to measure; default: a GPU where there is one, else the CPU (rehearsal is for the tests)",
    )
    group.addoption("--minutes", type=float, help="skip what is left then; default: 7.5 on a GPU without --full")
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
    import devices
    from report import Contention, keep_memory

    device = config.stash[devices.key] = devices.choose(config.getoption("--device"))
    if config.getoption("--minutes") is None:
        config.option.minutes = float("inf") if config.getoption("--full") else device.minutes
    config.stash[start_key] = time.monotonic()
    config.stash[rows_key], config.stash[overheads_key], config.stash[network_rows_key] = {}, {}, {}
    config.stash[contention_key] = Contention()
    keep_memory()


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> dict:
    """The rows of the report, by point and back end."""
    return request.config.stash[rows_key]


@pytest.fixture
def overheads(request: pytest.FixtureRequest) -> dict:
    """What calls cost the host, by op and implementation."""
    return request.config.stash[overheads_key]


@pytest.fixture
def network_rows(request: pytest.FixtureRequest) -> dict:
    """The rows of the models' report, by model and direction."""
    return request.config.stash[network_rows_key]


@pytest.fixture
def device(request: pytest.FixtureRequest):
    """What is measured; see devices.py."""
    import devices

    return request.config.stash[devices.key]


@pytest.fixture(scope="session")
def bar(request: pytest.FixtureRequest) -> "Bar":
    return request.config.pluginmanager.get_plugin("bar")


@pytest.fixture
def in_time(request: pytest.FixtureRequest) -> None:
    """Skips what would begin after --minutes."""
    minutes = request.config.getoption("--minutes")
    if time.monotonic() - request.config.stash[start_key] > 60 * minutes:
        pytest.skip(f"the {minutes:g} minutes of --minutes are over")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Ends the run where the device is broken: after a fault in a kernel, a GPU takes no more work of this process."""
    if call.excinfo is not None and "device" in item.funcargs:
        try:
            item.funcargs["device"].synchronize()
        except RuntimeError as error:
            item.session.shouldstop = f"the device is broken: {error}"
    return (yield)


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if session.items and not config.option.collectonly:
        config.pluginmanager.register(Bar(config, len(session.items)), "bar")


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
        self.say(nodeid.partition("[")[2].rstrip("]"))

    def say(self, what: str) -> None:
        self.tqdm.set_description_str(what)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.tqdm.update()

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return ("passed", "", "") if self.shown and report.when == "call" and report.passed else None

    def pytest_sessionfinish(self) -> None:
        self.tqdm.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows, overheads, networks = (
        list(config.stash[key].values()) for key in (rows_key, overheads_key, network_rows_key)
    )
    if not rows and not overheads and not networks:
        return
    import devices
    import report
    from cases import CASES

    device = config.stash[devices.key]
    compiled = "at every shape and layout" if config.getoption("--full") else device.sparsely
    notes = [
        f"{device.note} A copy moves as many bytes as the op must, reads and writes together.",
        f"torch.compile: of the eager reference, {compiled}.",
    ]
    if skipped := len(terminalreporter.stats.get("skipped", [])):
        notes.append(
            f"{skipped} measurements are missing: the {config.option.minutes:g} minutes of --minutes were over."
        )
    if without := [case.name for case in CASES if case.benchmark and not device.tested(case.op)]:
        notes.append(f"{', '.join(without)}: missing, as no back end of tempops runs them here.")
    # Beside a GPU the others are torch.compile's own processes, and the device's time does not mind them.
    if device.type == "cpu" and (others := float(config.stash[contention_key])) > 0.05:
        notes.append(f"Other processes kept {others:.0%} of the cores busy: these times are not to be trusted.")
    written = report.Report(report.machine(device.machine()), notes, rows, overheads, networks)
    terminalreporter.section("tempops")
    for line in report.lines(written):
        terminalreporter.write_line(line)
    for option, write in {"--plot": report.plot, "--report": report.write_json}.items():
        if path := config.getoption(option):
            write(written, path)
            terminalreporter.write_line(f"wrote {path}")
