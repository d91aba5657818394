"""The report's numbers and pictures, from tables made by hand."""

import re
from dataclasses import replace

import pytest
from PIL import Image
from study_cases import cell, preset, row

from tools.study_plots import above_student, band
from tools.study_report import write_report
from tools.study_results import CurveRow, Results

MATRIX = preset(
    cell("base", group="Plain", title="Plain DETR"),
    cell("better", baseline="base", group="Better ones", title="Better DETR", claim="+1.2 AP"),
    cell("idle", baseline="base", group="Better ones", title="Idle DETR", claim="+9 AP"),
)


def curve(name, seed, iteration, precision, branch="", seconds=0.0):
    return CurveRow(name, seed, branch, iteration, seconds, precision, precision)


@pytest.fixture
def results(tmp_path):
    results = Results(tmp_path, MATRIX)
    for seed, value in enumerate((10.0, 12.0, 17.0)):
        results.add(row("base", seed, value, step=0.5), [curve("base", seed, 50, value)])
    results.add(row("better", 0, 13.0, step=0.6), [curve("better", 0, 50, 13.0)])
    results.add(row("better", 2, 16.0, step=1.0, peak_mb=700.0), [curve("better", 2, 50, 16.0)])
    return results


def lines_of(report):
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in report.splitlines()]
    return {line[0]: line[1:] for line in cells if len(line) > 2}


def test_a_line_per_method(results, tmp_path):
    text = write_report(MATRIX, results, tmp_path).read_text()
    lines = lines_of(text)
    assert lines["Plain DETR"] == [
        *("3", "13.0 ± 3.6", "26.0 ± 7.2", "6.5 ± 1.8", "–", "–", "–", "0.500", "–", "500", "–")
    ]
    # differences +3 and -1: mean 1, deviation sqrt(8), error 2; times 0.6 / 0.5 and 1.0 / 0.5
    assert lines["Better DETR"] == [
        *("2 of 3", "14.5 ± 2.1", "29.0 ± 4.2", "7.2 ± 1.1", "Plain DETR", "+1.0 ± 2.0", "1/2"),
        *("0.800", "1.60", "700", "+1.2 AP"),
    ]
    assert lines["Idle DETR"] == ["not run", *["–"] * 9, "+9 AP"]
    assert text.index("## Plain") < text.index("Plain DETR |") < text.index("## Better ones")
    assert "\n- runs: 5 of 9\n" in text
    assert "\n- seeds: 0, 1, 2 for each method, fixed before the runs\n" in text
    assert "--preset quickstart --size 64x96`" in text
    assert "other seeds" not in text
    assert "differ in more" not in text


def test_one_seed_has_no_spread(tmp_path):
    results = Results(tmp_path, MATRIX)
    results.add(row("base", 0, 10.0), [])
    results.add(row("better", 0, 9.5), [])
    line = lines_of(write_report(MATRIX, results, tmp_path).read_text())["Better DETR"]
    assert (line[0], line[1], line[5], line[6]) == ("1 of 3", "9.5", "-0.5", "0/1")


def test_a_disturbed_run_does_not_spoil_the_times(tmp_path):
    results = Results(tmp_path, MATRIX)
    for seed, step in enumerate((0.5, 0.5, 0.5)):
        results.add(row("base", seed, 10.0, step=step), [])
    for seed, step in enumerate((0.7, 6.0, 0.6)):
        minutes = curve("better", seed, 50, 10.0, seconds=60 * step)
        results.add(row("better", seed, 11.0, step=step), [minutes])
    line = lines_of(write_report(MATRIX, results, tmp_path).read_text())["Better DETR"]
    assert (line[7], line[8]) == ("0.700", "1.40")
    assert band(results.curves, "better").minutes == pytest.approx([0.7])


def test_what_is_not_as_planned_is_said(results, tmp_path):
    results.add(row("base", 7, 11.0), [])
    results.add(row("former", 0, 11.0), [])
    results.add(row("better", 1, 11.0, config="another", iterations=50), [])
    text = write_report(MATRIX, results, tmp_path).read_text()
    assert "- other seeds, run too: 7\n" in text
    assert "- in runs.csv, but no longer in the matrix: former\n" in text
    assert "- runs that differ in more than the seed: Better DETR" in text
    assert "- iterations: 100; 50 (Better DETR)\n" in text
    assert lines_of(text)["Plain DETR"][0] == "4"


def test_notes_are_kept(results, tmp_path):
    assert "## Notes" not in write_report(MATRIX, results, tmp_path).read_text()
    (tmp_path / "notes.md").write_text("It was **us**.\n")
    text = write_report(MATRIX, results, tmp_path).read_text()
    assert text.endswith("\n\n## Notes\n\nIt was **us**.\n")
    assert write_report(MATRIX, results, tmp_path).read_text() == text


def test_every_picture_is_linked_and_there(results, tmp_path):
    for branch in ("student", "share_v", "share_a"):
        results.curves += [curve("better", 0, 50, 13.0, branch)]
    text = write_report(MATRIX, results, tmp_path).read_text()
    linked = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert linked == ["gains.png", "ap_plain.png", "ap_better_ones.png", "branches.png"]
    assert {path.name for path in tmp_path.glob("*.png")} == set(linked)
    for name in linked:
        with Image.open(tmp_path / name) as picture:
            assert 300 < picture.width < 1500


def test_an_empty_study_has_a_report(tmp_path):
    text = write_report(MATRIX, Results(tmp_path, MATRIX), tmp_path).read_text()
    assert [line[0] for line in lines_of(text).values()].count("not run") == 3
    assert list(tmp_path.glob("*.png")) == []


def test_a_report_needs_only_the_tables(results, tmp_path):
    text = write_report(MATRIX, results, tmp_path).read_text()
    assert write_report(MATRIX, Results(tmp_path, MATRIX), tmp_path).read_text() == text
    titled = replace(MATRIX, cells=(replace(MATRIX.cells[0], title="New"), *MATRIX.cells[1:]))
    assert "New" in lines_of(write_report(titled, results, tmp_path).read_text())


def test_a_band_is_over_the_seeds():
    rows = [
        *(curve("m", 0, 20, 4.0, seconds=60.0), curve("m", 0, 10, 1.0, seconds=30.0)),
        *(curve("m", 1, 10, 3.0, seconds=90.0), curve("other", 0, 10, 50.0)),
        curve("m", 0, 10, 50.0, "share_v"),
    ]
    found = band(rows, "m")
    assert (found.iterations, found.minutes) == ([10, 20], [1.0, 1.0])
    assert (found.mean, found.low, found.high) == ([2.0, 4.0], [1.0, 4.0], [3.0, 4.0])
    assert band(rows, "m", "share_v").mean == [50.0]
    assert band(rows, "absent").iterations == []


def test_teachers_stand_beside_the_student_of_the_same_weights():
    rows = [
        *(curve("m", 0, 10, 5.0, "student"), curve("m", 0, 10, 7.0, "share_v")),
        *(curve("m", 1, 10, 8.0, "student"), curve("m", 1, 10, 7.0, "share_v")),
        *(curve("m", 0, 10, 5.0), curve("m", 0, 20, 9.0, "share_a")),
    ]
    found = above_student(rows)
    assert [(row.branch, row.seed, row.AP) for row in found] == [
        ("share_v", 0, 2.0),
        ("share_v", 1, -1.0),
    ]
