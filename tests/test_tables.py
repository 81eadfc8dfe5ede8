"""`python -m benchmarks.tables`: its figures of cost, what it writes, what it says to a wrong call."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
for needed in ("av", "tqdm", "matplotlib"):
    pytest.importorskip(needed)


def tables(*arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.tables", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


def test_tables(tmp_path):
    run = tables("gte1", "tdn5", "--size", "32", "--frames", "2", "--seconds", "0", "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    page = (tmp_path / "tables.md").read_text()
    assert page.strip() == run.stdout.strip()
    assert "| GTE | 4.875 (0.54x) | 4.312 (0.48x) |" in page and "| TEA | 35 (1.06x) | - | - | - | published" in page
    assert (tmp_path / "tables.png").stat().st_size > 1000
    found = json.loads((tmp_path / "tables.json").read_text())
    assert "cpu, float32, 32 pixels for 224, 2 frames for every 8, batch 1" in found["machine"]["setting"]
    (placements,) = (table for table in found["tables"] if table["title"] == "TDN table 5")
    for row in placements["rows"]:
        assert row["counted"] == pytest.approx(row["published"], rel=0.025)
        assert set(row["times"]) == {"eager", "tempops"} and min(row["times"].values()) > 0


def test_wrong_calls(tmp_path):
    for arguments, message in (
        (("gte9",), "there is no table gte9; there are menet2, gte1, "),
        (("gte1", "--out", str(tmp_path / "nowhere")), "there is no folder"),
        (("gte1", "--dtype", "int8"), "invalid choice: 'int8'"),
    ):
        run = tables(*arguments)
        assert run.returncode == 2 and message in run.stderr
