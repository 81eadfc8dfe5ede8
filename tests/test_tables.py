"""`python -m benchmarks.tables`: its figures of cost, what it writes, what it says to a wrong call."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
for needed in ("av", "tqdm", "matplotlib"):
    pytest.importorskip(needed)


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.tables import main

    return main


def test_tables(main, tmp_path, capsys):
    main(["gte1", "tdn5", "--size", "32", "--frames", "2", "--seconds", "0.001", "--out", str(tmp_path)])
    page = (tmp_path / "tables.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert "| GTE | 4.875 (0.54x) | 4.312 (0.48x) |" in page and "| TEA | 35 (1.06x) | - | - | - | published" in page
    assert (tmp_path / "tables.png").stat().st_size > 1000
    found = json.loads((tmp_path / "tables.json").read_text())
    assert "cpu, float32, 32 pixels for 224, 2 frames for every 8, batch 1" in found["machine"]["setting"]
    (placements,) = (table for table in found["tables"] if table["title"] == "TDN table 5")
    for row in placements["rows"]:
        assert row["counted"] == pytest.approx(row["published"], rel=0.025)
        assert set(row["times"]) == {"eager", "tempops"} and min(row["times"].values()) > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gte9"], "there is no table gte9; there are menet2, gte1, "),
        (["gte1", "--out", "/nowhere/at/all"], "there is no folder"),
        (["gte1", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["gte1", "--size", "0"], "argument --size: must be a positive int, got 0"),
        (["gte1", "--batch", "-1"], "argument --batch: must be a positive int, got -1"),
        (["gte1", "--frames", "0"], "argument --frames: must be a positive int, got 0"),
        (["gte1", "--frames", "2.5"], "argument --frames: must be a positive int, got 2.5"),
        (["gte1", "--seconds", "0"], "argument --seconds: must be a positive float, got 0"),
        (["gte1", "--seconds", "inf"], "argument --seconds: must be a positive float, got inf"),
        (["gte1", "--seconds", "nan"], "argument --seconds: must be a positive float, got nan"),
        (["gte1", "--device", "cuda:99"], "PyTorch finds no device cuda:99"),
        (["gte1", "--device", "banana"], "PyTorch finds no device banana"),
        (["gte1", "--device", "meta"], "PyTorch finds no device meta"),
        (["gte1", "cmr3", "--frames", "1"], "--frames 1 does not suit cmr: n_segment must be at least 2, got 1"),
        (["tdn6", "--frames", "400"], "400 segments of 1 need at least 400 frames, got 132"),
    ],
)
def test_wrong_calls(main, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err
