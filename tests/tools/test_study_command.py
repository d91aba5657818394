"""The study as a command: real trainings of seconds, interrupted in every way."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_study

from engine.errors import UserError
from projects.study.cells import Cell
from tools import study_process, study_runs
from tools.study import parse
from tools.study_process import WorkLock

WORK = Path("output/study/cpu")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", tiny_study.TRAININGS_PATH)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


class Called(NamedTuple):
    code: int
    output: str
    errors: str

    @property
    def events(self):
        """What is printed with the time of day, without that."""
        return re.findall(r"^\d\d:\d\d:\d\d  (.*)$", self.output, re.MULTILINE)


@pytest.fixture
def study(monkeypatch, capfd):
    """Calls the study in a folder; its trainings are processes of their own."""

    def call(folder, *arguments, presets=tiny_study.PRESETS):
        monkeypatch.chdir(folder)
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            tiny_study.main(presets, list(arguments))
        return Called(left.value.code or 0, *capfd.readouterr())

    return call


def rows(folder, name="runs"):
    with open(folder / f"docs/study/cpu/{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- from nothing to the report -----------------------------------------------------------------


def test_a_student_needs_its_teacher_again_and_both_are_reported(study, tmp_path):
    done = study(tmp_path, "--only", "teach*", "--seeds", "0")
    assert done.code == 0, done.output + done.errors
    assert done.events[1] == "teacher, seed 0: starts"
    first = rows(tmp_path)
    assert [r["cell"] for r in first] == ["teacher"]
    work = tmp_path / "elsewhere"
    done = study(tmp_path, "--only", "student", "--seeds", "0", "--work", str(work))
    assert done.code == 0, done.output + done.errors
    said = [event.partition(";")[0] for event in done.events]
    assert said[0] == "2 runs to do, 2 at a time, results in docs/study/cpu"
    assert said[1] == "teacher, seed 0: starts (again: others need its weights)"
    assert said[2].startswith("teacher, seed 0: done in ")
    assert said[3] == "student, seed 0: starts"
    assert said[4].startswith("student, seed 0: AP ")
    assert rows(tmp_path)[1:] == first
    check_tables(tmp_path)
    config = (work / "student/seed0/config.yaml").read_text()
    assert f"init_checkpoint: {work}/teacher/seed0/model_final.pth" in config
    check_calls_that_train_nothing(study, tmp_path)


def check_tables(folder):
    found = rows(folder)
    assert [(r["cell"], r["seed"], r["iterations"]) for r in found] == [
        *(("student", "0", "3"), ("teacher", "0", "3"))
    ]
    for r in found:
        assert re.fullmatch(r"([0-9a-f]{7,}\+?)?", r["commit"])
        assert float(r["wall_s"]) > 3 * float(r["step_s"]) > 0
        assert 50 < float(r["peak_mb"]) < 20_000
        assert 0 <= float(r["AP"]) <= float(r["AP50"]) <= 100
    curves = [(r["cell"], r["branch"], r["iteration"]) for r in rows(folder, "curves")]
    assert curves == [(name, "", step) for name in ("student", "teacher") for step in "23"]
    report = (folder / "docs/study/cpu/report.md").read_text()
    assert "- runs: 2 of 9" in report
    assert "ap_distillation.png" in report


def check_calls_that_train_nothing(study, folder):
    results = folder / "docs/study/cpu"
    before = {path.name: path.read_bytes() for path in results.iterdir() if path.suffix != ".png"}
    assert (
        study(folder, "--only", "student,teacher", "--seeds", "0").events[0][:12] == "0 runs to do"
    )
    (results / "report.md").unlink()
    assert study(folder, "--report", "--work", str(folder / "none")).code == 0
    assert not (folder / "none").exists()
    after = {path.name: path.read_bytes() for path in results.iterdir() if path.suffix != ".png"}
    assert before == after
    student, teacher = (f"{float(r['AP']):.1f}" for r in rows(folder))
    assert study(folder, "--list", "--seeds", "0,4").output.splitlines() == [
        f"teacher  seed 0  finished, AP {teacher}",
        f"student  seed 0  finished, AP {student}",
        "slow     seed 0  to do",
        *(f"{name}  seed 4  to do" for name in ("teacher", "student", "slow   ")),
    ]


@pytest.fixture
def threads(monkeypatch):
    """How many threads each training of a study on two cores is given."""
    found = []

    def recorded(config, console, variables, lock):
        found.append(variables["OMP_NUM_THREADS"])
        return study_process.start(config, console, variables, lock)

    monkeypatch.setattr(study_process, "_cores", lambda: 2)
    monkeypatch.setattr(study_runs, "start", recorded)
    return found


def test_all_start_from_a_backbone_that_other_images_have_trained(study, tmp_path, threads):
    preset = tiny_study.PRESETS["cpu"]
    shapes = {**preset.shapes, "seed": 1}
    body = Cell("body", "Conditional DETR", "", tiny_study.body)
    preset = replace(preset, backbone=body, backbone_shapes=shapes)
    listed = study(tmp_path, "--list", "--only", "teacher", "--seeds", "5", presets={"cpu": preset})
    assert listed.output == "body     seed 0  to do\nteacher  seed 5  to do\n"
    done = study(tmp_path, "--only", "teacher", "--seeds", "5", presets={"cpu": preset})
    assert done.code == 0, done.output + done.errors
    assert [event[:12] for event in done.events][1:5] == ["body, seed 0"] * 2 + ["teacher, see"] * 2
    assert threads == ["2", "1"]
    assert [(r["cell"], r["seed"]) for r in rows(tmp_path)] == [("body", "0"), ("teacher", "5")]
    log = (tmp_path / WORK / "teacher/seed5/log.txt").read_text()
    path = tmp_path / WORK / "body/seed0/backbone.pth"
    found = re.search(rf"(\d+) of the model's (\d+) weights were loaded from {path}", log)
    assert 50 < int(found[1]) < int(found[2])
    config = (tmp_path / WORK / "body/seed0/config.yaml").read_text()
    assert "names: shapes_backbone_train" in config
    images = [tmp_path / WORK / "data" / name / "train" for name in ("shapes", "shapes_backbone")]
    first, second = ((folder / "000001.jpg").read_bytes() for folder in images)
    assert first != second
    report = (tmp_path / "docs/study/cpu/report.md").read_text()
    assert "that of Conditional DETR, trained once (3 iterations, AP" in report
    assert "- runs: 0 of 9" in report
    assert "no longer in the matrix" not in report


# --- interruptions ------------------------------------------------------------------------------

SLOW = ["--only", "slow", "--seeds", "0"]
RUN = WORK / "slow/seed0"


@pytest.fixture
def begun(tmp_path):
    """A study in the middle of its only training."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("tiny_study.py")), *SLOW],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log, end = tmp_path / RUN / "metrics.json", time.monotonic() + 90
    while not (log.is_file() and log.read_text().count("\n") > 2):
        assert time.monotonic() < end
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    yield tmp_path, process
    process.kill()
    process.communicate()


def newest_checkpoint(folder):
    """The iteration after which the newest checkpoint was saved; it is no periodic one."""
    names = sorted(path.stem for path in (folder / RUN).glob("model_0*.pth"))
    return int(names[-1].removeprefix("model_")) + 1


def test_a_signal_stops_with_a_checkpoint_and_the_next_call_goes_on(begun, study):
    folder, process = begun
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    assert "stopped: 1 run left, the same command goes on" in output
    saved = newest_checkpoint(folder)
    logged = int(re.search(r"stopped at iteration (\d+)", output)[1])
    assert 0 <= saved - logged < 5  # every fifth is logged
    listed = study(folder, "--list", *SLOW)
    assert listed.output == f"slow  seed 0  started, at iteration {logged} of 300\n"
    done = study(folder, *SLOW)
    assert done.code == 0, done.output + done.errors
    assert done.events[1] == f"slow, seed 0: goes on after iteration {logged}"
    assert f"training begins at iteration {saved}" in (folder / RUN / "log.txt").read_text()
    assert [(r["cell"], r["iterations"]) for r in rows(folder)] == [("slow", "300")]


def test_a_second_study_in_the_same_folder_is_refused(begun, study):
    folder, process = begun
    os.kill(process.pid, signal.SIGSTOP)  # it is there, but does nothing
    refused = study(folder, *SLOW)
    assert refused.code == 2
    assert f"another study, process {process.pid} or" in refused.errors
    assert refused.errors.count("\n") == 1


def test_trainings_do_not_outlive_a_study_that_is_killed(begun):
    folder, process = begun
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while is_locked(folder / WORK):  # its training holds the folder until it has stopped
        assert time.monotonic() < end, "the training goes on"
        time.sleep(0.1)
    console = (folder / RUN / "console.txt").read_text()
    assert f"signal {signal.SIGTERM.value}: stopping" in console
    assert not (folder / RUN / "model_final.pth").exists()
    assert newest_checkpoint(folder) > 10


def is_locked(work):
    try:
        with WorkLock(work):
            return False
    except UserError:
        return True


def test_a_study_ends_when_its_budget_is_over(study, tmp_path):
    state = tmp_path / RUN / "state.json"
    for budget in ("0.02", "0.04", "0.08", "0.16"):  # a busy machine has not begun at first
        done = study(tmp_path, *SLOW, "--budget", budget)
        assert done.code == 0, done.errors
        assert done.events[-1] == "the budget is over: 1 run left, the same command goes on"
        assert not (tmp_path / "docs").exists()
        if state.exists():
            break
    assert state.exists()


def test_no_budget_starts_nothing(study, tmp_path):
    done = study(tmp_path, "--budget", "0")
    assert done.code == 0, done.errors
    assert done.events[-1] == "the budget is over: 9 runs left, the same command goes on"
    assert {path.name for path in (tmp_path / WORK).iterdir()} == {"lock"}


# --- failures -----------------------------------------------------------------------------------


def test_a_failing_run_is_named_and_the_others_go_on(study, tmp_path, monkeypatch):
    monkeypatch.setenv("NAN_AT", "2")
    blocked = tmp_path / WORK / "teacher" / "seed1"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("no folder")
    done = study(tmp_path, "--seeds", "1", "--jobs", "1")
    assert done.code == 1, done.output + done.errors
    said = done.events
    assert "student, seed 1: FAILED, it needs teacher, seed 1, which failed" in said
    assert "    error: loss not finite at iteration 2: loss_box = nan" in done.output
    failed = [line for line in said if line.startswith("failed: ")]
    assert [line.split(":")[1] for line in failed] == [
        *(" teacher, seed 1", " student, seed 1", " slow, seed 1")
    ]
    assert "exit code 2: error: loss not finite" in failed[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "techer"], "no cell of preset cpu is named 'techer' (did you mean 'teacher'?)"),
        (["--preset", "gpu"], "--preset: 'gpu', expected cpu"),
        (["--device", "cuda", "--preset", "cpu"], "this machine has no CUDA"),
        (["--jobs", "0"], "--jobs: 0, expected at least 1"),
        (["--budget", "-1"], "--budget: -1, expected minutes"),
        (["--seeds", "1,x"], "invalid seeds"),
        (["--seeds", "4294967296"], "invalid seeds"),
        (["--output", __file__], "test_study_command.py is a file, expected a folder"),
        (["--output", f"{__file__}/w"], "test_study_command.py is a file, expected a folder"),
        (["--work", "/dev/null/x"], "--work: cannot write to /dev/null/x"),
    ],
)
def test_wrong_input_is_one_line(study, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = study(tmp_path, *arguments)
    assert done.code == 2
    assert said in done.errors.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_device_chooses_the_preset():
    presets = {"cpu": tiny_study.PRESETS["cpu"], "gpu": tiny_study.PRESETS["cpu"]}
    gpu = presets["gpu"] = type(presets["cpu"])("gpu", "", {}, (), "cuda", (5,), 8)
    for arguments in (["--device", "cuda"], ["--preset", "gpu"]):
        args = parse(arguments, presets)
        assert (args.preset, args.device, args.seeds, args.jobs) == (gpu, "cuda", (5,), 8)
        assert (args.output, args.work) == (Path("docs/study/gpu"), Path("output/study/gpu"))
    assert parse([], presets).preset.name == "cpu"
    assert parse(["--preset", "gpu", "--device", "cpu"], presets).device == "cpu"
