"""Tables of a study: read, written, and made from what a training logs."""

import json
import math
import re

import pytest
from study_cases import cell, preset, row

from engine.errors import UserError
from tools.study_folder import RunFolder
from tools.study_results import CurveRow, Facts, Results, RunRow, read_rows, rows_of_run, write_rows

FACTS = Facts("tiny", "abc1234+", "a processor", "2.13.0")


def write_log(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def step(iteration, seconds=None, **others):
    time = {} if seconds is None else {"time": seconds}
    return {"iteration": iteration, "total_loss": 1.0, **time, **others}


def evaluation(iteration, value, prefix="bbox"):
    numbers = {"AP": value, "AP50": value + 1, "AP75": value + 2, "APs": value + 3, "APm": 0.0}
    named = {f"{prefix}/{name}": number for name, number in numbers.items()}
    return {"iteration": iteration, **named, f"{prefix}/APl": math.nan}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path, "m", 1)
    folder.path.mkdir(parents=True)
    (folder.path / "state.json").write_text('{"settings": "x", "parts": [[10, 15], [100, 107.5]]}')
    return folder


def test_a_run_becomes_rows(folder):
    peak = "max_mem_MB[metric]"
    write_log(
        folder.metrics,
        [
            step(3, 0.5, **{peak: 300.0}),
            step(7, 0.25, **{peak: 420.0}),
            evaluation(4, 10.0),
            step(9, 0.3, **{peak: 410.0}),
            evaluation(10, 20.0),
        ],
    )
    run, curves = rows_of_run(folder, cell("m"), 1, "digest", FACTS)
    assert (run.cell, run.seed, run.config, run.commit) == ("m", 1, "digest", "abc1234+")
    assert (run.iterations, run.wall_s, run.step_s, run.peak_mb) == (10, 12.5, 0.3, 420.0)
    assert (run.AP, run.AP50, run.AP75, run.APs, run.APm) == (20.0, 21.0, 22.0, 23.0, 0.0)
    assert math.isnan(run.APl)
    # 4 iterations of 0.5 s and one of 0.25 s; then three more of these and two of 0.3 s
    assert curves == [
        CurveRow("m", 1, "", 5, pytest.approx(2.25, abs=0.051), 10.0, 11.0),
        CurveRow("m", 1, "", 10, pytest.approx(3.6), 20.0, 21.0),
    ]


def test_time_that_was_not_logged_is_that_of_the_nearest_lines(folder):
    lines = [step(0), step(1), step(2, 1.0), step(3, 2.0), evaluation(1, 1.0), evaluation(9, 2.0)]
    write_log(folder.metrics, lines)
    _, curves = rows_of_run(folder, cell("m"), 1, "digest", FACTS)
    assert [(c.iteration, c.wall_s) for c in curves] == [(2, 2.0), (9, 3 * 1.0 + 2.0 + 5 * 2.0)]


def test_an_iteration_that_was_done_twice_counts_once(folder):
    lost = [step(1, 9.0), step(2, 9.0), evaluation(2, 99.0)]
    again = [step(1, 1.0), step(2, 1.0), evaluation(2, 5.0), evaluation(4, 6.0)]
    write_log(folder.metrics, [step(0, 1.0), *lost, *again])
    run, curves = rows_of_run(folder, cell("m"), 1, "digest", FACTS)
    assert [(c.iteration, c.wall_s, c.AP) for c in curves] == [(3, 3.0, 5.0), (4, 4.0, 6.0)]
    assert run.step_s == 1.0


def test_branches_have_curves_of_their_own(folder):
    last = {
        **evaluation(4, 10.0),
        **evaluation(4, 10.0, "student/bbox"),
        **evaluation(4, 12.0, "share_v/bbox"),
    }
    write_log(folder.metrics, [step(3, 1.0), last])
    run, curves = rows_of_run(folder, cell("m"), 1, "digest", FACTS)
    assert run.AP == 10.0
    assert [(c.branch, c.AP, c.AP50) for c in curves] == [
        *(("", 10.0, 11.0), ("student", 10.0, 11.0), ("share_v", 12.0, 13.0))
    ]


def test_memory_of_a_gpu_is_read_from_the_log(folder):
    write_log(folder.metrics, [step(3, 1.0), evaluation(4, 1.0)])
    folder.log.write_text("iter: 1  max_mem: 210M\niter: 2  max_mem: 1830M\niter: 1  max_mem: 9M\n")
    assert rows_of_run(folder, cell("m"), 1, "digest", FACTS)[0].peak_mb == 1830.0


@pytest.mark.parametrize("lines", [[], [step(3, 1.0)], [evaluation(2, 1.0), step(3, 1.0)]])
def test_a_run_without_a_final_evaluation_has_no_row(folder, lines):
    write_log(folder.metrics, lines)
    with pytest.raises(UserError, match="no final evaluation"):
        rows_of_run(folder, cell("m"), 1, "digest", FACTS)


def test_tables_come_back_as_they_were(tmp_path):
    rows = [row("a", 0, 1.5, device='GPU "x", 80 GB'), row("b", 1, 2.0, commit="")]
    write_rows(tmp_path / "new" / "runs.csv", rows, RunRow)
    read = read_rows(tmp_path / "new" / "runs.csv", RunRow)
    assert repr(read) == repr(rows)  # nan differs from itself
    assert [type(value) for value in vars(read[0]).values()] == [
        type(value) for value in vars(rows[0]).values()
    ]
    assert read_rows(tmp_path / "none.csv", RunRow) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cell,seed\na,1\n", "the columns are not cell, seed, branch"),
        ("cell,seed,branch,iteration,wall_s,AP,AP50\na,one,,1,1,1,1\n", "line 2: invalid literal"),
        ("cell,seed,branch,iteration,wall_s,AP,AP50\na,1,,1,1\n", "line 2"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, text, said):
    path = tmp_path / "curves.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + said):
        read_rows(path, CurveRow)


def test_results_replace_a_run_and_keep_the_matrix_order(tmp_path):
    matrix = preset(cell("z"), cell("a"))
    results = Results(tmp_path, matrix)
    results.add(row("gone", 0, 3.0), [])
    results.add(row("a", 0, 1.0), [CurveRow("a", 0, "", 5, 1.0, 1.0, 2.0)])
    results.add(row("z", 1, 2.0), [])
    results.add(row("z", 0, 2.0), [])
    results.add(row("a", 0, 4.0), [CurveRow("a", 0, "", 7, 1.0, 4.0, 5.0)])
    read = Results(tmp_path, matrix)
    assert [(r.cell, r.seed, r.AP) for r in read.runs] == [
        *(("z", 0, 2.0), ("z", 1, 2.0), ("a", 0, 4.0), ("gone", 0, 3.0))
    ]
    assert [(c.iteration, c.AP) for c in read.curves] == [(7, 4.0)]
    assert set(read.finished()) == {("z", 0), ("z", 1), ("a", 0), ("gone", 0)}
    assert {path.name for path in tmp_path.iterdir()} == {"runs.csv", "curves.csv"}
