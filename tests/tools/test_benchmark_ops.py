import csv
import json
import mmap
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ops import linear_sum_assignment, multi_scale_deformable_attention
from ops.gaussian_attention import reference as gaussian_reference
from tools import benchmark_memory, benchmark_ops, benchmark_peers, benchmark_report
from tools.benchmark_cases import (
    OURS,
    REQUIRED,
    Contest,
    all_cases,
    required,
)
from tools.benchmark_inputs import (
    QUICK,
    Sizes,
    deformable_inputs,
    gaussian_inputs,
    matcher_inputs,
)
from tools.benchmark_report import Row
from tools.benchmark_roofline import (
    Work,
)

ROOT = Path(__file__).resolve().parents[2]


# --- cases and peers ----------------------------------------------------------------------------


def test_cases_are_named_once_and_judged_where_something_is_required():
    names = [case.name for case in all_cases(Sizes(), "cpu")]
    assert len(set(names)) == len(names) == 78
    assert required("cpu", "deformable_encoder/B1/float32/forward", "grid_sample") == 8
    assert required("cpu", "deformable_encoder/B1/float32/forward+backward", "grid_sample") == 6
    assert required("cpu", "deformable_decoder/N900/B1/float32/forward", "grid_sample") is None
    assert required("cpu", "matcher/6_layers", "SciPy") == 3
    for device, entries in REQUIRED.items():
        for pattern, peer, _ in entries:
            assert any(required(device, name, peer) for name in names), (device, pattern)


def test_encoder_locations_lie_around_the_cells_of_their_tokens():
    value, locations, weights = deformable_inputs(Sizes(), 1, None, torch.bfloat16, "cpu")
    assert value.shape == (1, 17821, 8, 32)
    assert value.dtype == torch.bfloat16
    assert locations.dtype == weights.dtype == torch.float32
    assert locations.shape == (1, 17821, 8, 4, 4, 2)
    torch.testing.assert_close(weights.sum((3, 4)), torch.ones(1, 17821, 8))
    # the last token of the first level: cell (x 133, y 99) of (h 100, w 134)
    offset = locations[0, 100 * 134 - 1] - torch.tensor([133.5 / 134, 99.5 / 100])
    cells = offset * torch.tensor(Sizes().levels).flip(-1)[:, None]
    assert cells.mean().abs() < 0.5
    assert 1.5 < cells.std() < 2.5


def test_padding_is_the_right_fifth_and_gaussians_are_two_to_three_cells():
    leaves, mask = gaussian_inputs(Sizes(), 2, (25, 34), True, torch.float32, "cpu")
    assert mask.view(2, 25, 34)[..., 28:].all()
    assert not mask.view(2, 25, 34)[..., :28].any()
    sigma = (2 * leaves[4]).rsqrt()
    assert sigma.min() >= 2
    assert sigma.max() <= 3


def test_targets_span_the_range():
    costs, targets = matcher_inputs(Sizes(), (6, 3), "cpu")
    assert costs.shape == (6, 3, 300, sum(targets))
    assert len(targets) == 16
    assert 7 <= min(targets) < 30
    assert 80 < max(targets) <= 100


def test_peers_compute_the_operators():
    value, locations, weights = deformable_inputs(QUICK, 2, 5, torch.float32, "cpu")
    torch.testing.assert_close(
        benchmark_peers.sampled_by_grid(value, QUICK.levels, locations, weights),
        multi_scale_deformable_attention(value, QUICK.levels, locations, weights),
    )
    (query, key, value, *gaussian), mask = gaussian_inputs(
        QUICK, 2, (4, 5), True, torch.float32, "cpu"
    )
    arguments = query, key, value, (4, 5), *gaussian, mask
    expected = gaussian_reference(*arguments)
    torch.testing.assert_close(benchmark_peers.pairwise_bias(*arguments), expected)
    torch.testing.assert_close(benchmark_peers.separable_bias(*arguments), expected)
    costs, targets = matcher_inputs(QUICK, (6, 3), "cpu")
    for ours, theirs in zip(
        linear_sum_assignment(costs, targets),
        benchmark_peers.scipy_matches(costs, targets),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("padded", [True, False])
def test_score_of_the_compiled_peer_without_compiling(padded, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    leaves, mask = gaussian_inputs(QUICK, 2, (4, 5), padded, torch.float32, "cpu")
    output = benchmark_peers.flex((4, 5), mask)(*leaves)
    expected = gaussian_reference(*leaves[:3], (4, 5), *leaves[3:], mask)
    torch.testing.assert_close(output, expected)


def test_a_peer_that_cannot_run_is_listed_with_its_reason():
    def broken():
        raise NotImplementedError("no backward here\nand more")

    def missing():
        raise benchmark_peers.Unavailable("not installed")

    contest = Contest(Work(1), 0.1, {})
    contest.admit("broken", lambda: broken)
    contest.admit("missing", missing)
    contest.admit("fine", lambda: tuple)
    assert contest.unavailable == {"broken": "no backward here", "missing": "not installed"}
    assert contest.contenders == {"fine": tuple}


def test_peers_that_differ_stop_the_run():
    runs = {OURS: lambda: (torch.tensor([3.0, 4.0]),), "peer": lambda: (torch.tensor([3.0, 4.1]),)}
    benchmark_ops.check_agreement("case", Contest(Work(1), 0.02, runs))
    message = r"case: result 0 of ours and peer differ by 0\.1 in the norm, .* 0\.01 of 5\.08$"
    with pytest.raises(benchmark_ops.UserError, match=message):
        benchmark_ops.check_agreement("case", Contest(Work(1), 0.01, runs))
    runs["peer"] = lambda: (torch.tensor([3.0, float("nan")]),)
    with pytest.raises(benchmark_ops.UserError, match="differ by nan"):
        benchmark_ops.check_agreement("case", Contest(Work(1), 0.02, runs))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_counts_what_is_touched_and_freed_within_the_call():
    size = 64 * 2**20

    def touch() -> None:
        # not through the allocator, which may hold as much that an earlier test has freed
        with mmap.mmap(-1, size) as block:
            for page in range(0, size, mmap.PAGESIZE):
                block[page] = 1

    peak = benchmark_memory.peak_of_process(touch)
    assert 0.95 * size < peak < 1.2 * size
    assert benchmark_memory.peak_of_process(lambda: None) < 0.05 * size


# --- tables and files ---------------------------------------------------------------------------

OWN = Row("deformable/one", OURS, rounds=9, median=2.0, low=1.5, high=3.0)
ROWS = [
    replace(
        OWN,
        moved=4_000_000,
        gathered=30_000_000,
        flops=5_000_000_000,
        memory_bound=0.5,
        compute_bound=1.0,
        share=0.5,
    ),
    Row(
        *("deformable/one", "grid_sample", "milliseconds", 9, 16.0, 15.0, 18.0),
        **{"ratio": 8.0, "ratio_low": 7.5, "ratio_high": 8.25, "required": 8.0},
    ),
    Row("deformable/one", "detrex", required=1.5, note="not installed"),
    Row("deformable/two", "detrex", note="not installed"),
    Row("memory/one", OURS, "MiB", 1, 26.0, 26.0, 26.0, ratio=1.3, required=1.2),
]
HEADER = {"device": "the CPU", "threads": "2"}


def test_requirements_are_lower_bounds_of_time_and_upper_bounds_of_memory():
    assert [row.met for row in ROWS] == [None, True, None, None, False]
    assert [benchmark_report.verdict(row) for row in ROWS] == [
        "",
        "≥ 8 met",
        "≥ 1.5 not measured",
        "",
        "≤ 1.2 NOT MET",
    ]
    assert replace(ROWS[1], ratio=7.99).met is False
    assert replace(ROWS[4], ratio=1.2).met is True


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1234"), (99.96, "100"), (12.34, "12.3"), (0.01234, "0.0123"), (0, "0"), (None, "–")],
)
def test_numbers_have_three_digits(value, text):
    assert benchmark_report.significant(value) == text


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_holds_every_table():
    text = benchmark_report.markdown(HEADER, ROWS)
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert ["threads", "2"] in lines
    assert ["deformable/one", OURS, "2.00 (1.50–3.00)", "", "", "9"] in lines
    assert ["", "grid_sample", "16.0 (15.0–18.0)", "8.00 (7.50–8.25)", "≥ 8 met", "9"] in lines
    assert ["memory/one", OURS, "26.0", "1.30", "≤ 1.2 NOT MET"] in lines
    assert ["deformable/one", "4.00", "30.0", "5.00", "0.500", "1.00", "2.00", "50%"] in lines
    assert ["detrex", "not installed", "2", "1", "deformable/one"] in lines
    assert "Memory" not in benchmark_report.markdown(HEADER, ROWS[:2])


def test_files_hold_the_rows_and_nothing_else_is_left(tmp_path):
    folder = tmp_path / "new" / "folder"
    files = benchmark_report.write(folder, "ops_cpu", HEADER, ROWS)
    assert sorted(folder.iterdir()) == sorted(files)
    content = json.loads((folder / "ops_cpu.json").read_text())
    assert content["header"] == HEADER
    assert [Row(**{k: v for k, v in row.items() if k != "met"}) for row in content["rows"]] == ROWS
    with (folder / "ops_cpu.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["median"] for line in lines] == ["2.0", "16.0", "", "", "26.0"]
    assert [line["met"] for line in lines] == ["", "True", "", "", "False"]
    assert (folder / "ops_cpu.md").read_text() == benchmark_report.markdown(HEADER, ROWS)


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    benchmark_report.write(tmp_path, "ops_cpu", HEADER, ROWS)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "ops_cpu.csv.partial").mkdir()
    with pytest.raises(OSError, match="partial"):
        benchmark_report.write(tmp_path, "ops_cpu", {**HEADER, "threads": "3"}, ROWS)
    assert {path: path.read_bytes() for path in before} == before


# --- the command --------------------------------------------------------------------------------


def test_quick_run_leaves_three_files(tmp_path):
    options = ["--quick", "--threads", "1", "--only", "float32", "--output", "out"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "benchmark_ops.py"), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "ops_cpu.csv",
        "ops_cpu.json",
        "ops_cpu.md",
    ]
    content = json.loads((tmp_path / "out" / "ops_cpu.json").read_text())
    assert content["header"]["threads"] == "1"
    assert content["header"]["torch"] == torch.__version__
    rows = {(row["case"], row["contender"]): row for row in content["rows"]}
    expected = [case.name for case in all_cases(QUICK, "cpu") if "float32" in case.name]
    expected.append("memory/deformable_encoder/B1/float32")
    assert list(dict.fromkeys(case for case, _ in rows)) == expected
    for name in expected:
        assert rows[name, OURS]["rounds"] == (1 if "memory" in name else 3)
    assert rows["gaussian/4x5/B2/padded/float32/forward", "eager bias"]["ratio"] > 0
    assert rows["gaussian/4x5/B2/padded/float32/forward", "FlexAttention"]["note"]
    assert all(row["met"] is None for row in rows.values())
    text = (tmp_path / "out" / "ops_cpu.md").read_text()
    assert str(tmp_path) not in text
    assert str(ROOT) not in text
    assert result.stdout.count("deformable_encoder/B1/float32/forward+backward") == 3


@pytest.mark.parametrize("pattern", ["matcher", "decoder*bfloat16", "gaussian*whole*bfloat16"])
def test_partial_runs_write_nothing_unless_told(pattern, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert benchmark_ops.main(["--quick", "--repeats", "1", "--only", pattern]) == 0
    assert "reached" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_only_a_complete_run_has_a_folder():
    assert benchmark_ops.parse([]).output == Path("docs/benchmarks")
    assert benchmark_ops.parse(["--only", "x"]).output is None
    assert benchmark_ops.parse(["--quick", "--output", "x"]).output == Path("x")


def test_list_prints_names_alone(capsys):
    assert benchmark_ops.main(["--list", "--only", "matcher"]) == 0
    assert capsys.readouterr().out == "matcher/6_layers\nmatcher/6_layers_x_3_groups\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "deformabel"], "--only deformabel matches none of the 80 cases, see --list"),
        (["--threads", "0"], "--threads is 0, expected more than 0"),
        (["--repeats", "-1"], "--repeats is -1, expected more than 0"),
        (["--seconds", "nan"], "--seconds is nan, expected more than 0"),
        (["--repeats", "x"], "argument --repeats: invalid int value: 'x'"),
        (["--repeats", "2", "--seconds", "2"], "not allowed with argument"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--output", __file__], "is a file, expected a folder"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert benchmark_ops.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", error)
    assert message in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_one_line(capsys):
    assert benchmark_ops.main(["--device", "cuda"]) == 2
    message = "error: --device is cuda, but torch finds no CUDA device here\n"
    assert capsys.readouterr().err == message
