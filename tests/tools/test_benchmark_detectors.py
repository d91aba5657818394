import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_detectors import SETTINGS, StridedBackbone, build_conditional

from engine.errors import UserError
from tools import benchmark_detector_cases as cases
from tools import benchmark_detector_process as process
from tools import benchmark_detector_report as report
from tools import benchmark_detectors
from tools.benchmark_detector_cases import BASELINE, OURS, SUBJECTS, Bound, Case, Contest, Subject
from tools.benchmark_detector_peers import DETREX, HUGGING_FACE, family_of, without_chance
from tools.benchmark_detector_process import callers
from tools.benchmark_detector_report import Row
from tools.benchmark_detector_steps import STEPS, busiest_operators, step_times

ROOT = Path(__file__).resolve().parents[2]
METHOD = ROOT / "projects/ks_detr/configs/ks_conditional_detr_quickstart.py"
PLAIN = ROOT / "projects/baselines/configs/conditional_detr_quickstart.py"
SIZES = ((480, 640), (800, 1066))


@pytest.fixture
def tiny():
    """A small Conditional-DETR whose backbone looks at the images."""
    torch.manual_seed(0)
    model = build_conditional(SETTINGS, {})
    model.backbone = StridedBackbone()
    return model


def tiny_batch(images=2):
    return cases.batch((64, 96), images, SETTINGS["num_classes"])


# --- cases --------------------------------------------------------------------------------------


def bounds(case):
    """What is required of every contender in the case of that name."""
    (found,) = [c for c in cases.all_cases(SUBJECTS, SIZES) if c.name == case]
    required = {name: found.required(name) for name in found.subject.contenders}
    return {name: bound for name, bound in required.items() if bound is not None}


@pytest.mark.parametrize(
    ("case", "required"),
    [
        ("detr/480x640/B2/train/time", {DETREX: Bound(1.15)}),
        ("dab_detr/800x1066/B1/infer/time", {DETREX: Bound(1.1)}),
        ("dn_detr/480x640/B2/train/memory", {DETREX: Bound(1.0, at_most=True)}),
        ("deformable_detr/480x640/B2/train/time", {DETREX: Bound(3.0)}),
        ("dn_deformable_detr/480x640/B2/infer/time", {DETREX: Bound(2.0)}),
        ("deformable_detr/800x1066/B2/train/memory", {DETREX: Bound(0.6, at_most=True)}),
        ("deformable_detr/800x1066/B2/infer/memory", {DETREX: Bound(1.0, at_most=True)}),
        ("ks_dab_detr/480x640/B2/train/time", {BASELINE: Bound(1.3, at_most=True)}),
        ("ks_dn_detr/800x1066/B2/train/memory", {BASELINE: Bound(1.35, at_most=True)}),
        (
            "ks_deformable_detr/480x640/B2/train/time",
            {BASELINE: Bound(1.45, at_most=True), DETREX: Bound(1.0)},
        ),
        ("ks_dn_deformable_detr/480x640/B2/train/memory", {BASELINE: Bound(1.15, at_most=True)}),
        ("smca_single_scale/480x640/B2/train/time", {}),
    ],
)
def test_required_ratios(case, required):
    assert bounds(case) == required


def test_nothing_is_required_in_mixed_precision():
    (case,) = [
        c for c in cases.all_cases(SUBJECTS, SIZES) if c.name == "detr/480x640/B2/train/time"
    ]
    assert case.required(DETREX)
    assert replace(case, amp=True).required(DETREX) is None


def test_subjects_are_files_that_exist():
    for subject in SUBJECTS:
        for file in (subject.config_file, subject.baseline):
            assert file is None or (ROOT / file).is_file()
    peers = {subject.name for subject in SUBJECTS if HUGGING_FACE in subject.peers}
    assert peers == {"detr", "conditional_detr", "deformable_detr"}


def test_a_method_is_trained_alone():
    subject = cases.over(str(METHOD), str(PLAIN))
    assert [case.name for case in cases.all_cases((subject,), ((64, 96),))] == [
        f"ks_conditional_detr_quickstart/64x96/B2/train/{measure}"
        for measure in ("time", "memory", "steps")
    ]


def test_inputs_are_the_same_each_time_and_boxes_lie_inside():
    first, second = (cases.batch((48, 80), 3, classes=4) for _ in range(2))
    for item, twin in zip(first, second, strict=True):
        assert item["image"].shape == (3, 48, 80)
        assert torch.equal(item["image"], twin["image"])
        boxes, classes = item["instances"].gt_boxes.tensor, item["instances"].gt_classes
        assert torch.equal(boxes, twin["instances"].gt_boxes.tensor)
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert boxes.min() >= 0
        assert (boxes.amax(0) <= torch.tensor([80, 48, 80, 48])).all()
        assert set(classes.tolist()) <= set(range(4))


@pytest.mark.parametrize(
    ("file", "family"),
    [
        ("a/b/dn_deformable_detr_r50_12ep.py", "dn_deformable_detr"),
        ("detr_r101_dc5_300ep.py", "detr"),
        ("conditional_detr_quickstart.py", "conditional_detr_quickstart"),
    ],
)
def test_families(file, family):
    assert family_of(file) == family


# --- agreement ----------------------------------------------------------------------------------


def contest(tiny, change):
    """Tiny against a twin that is changed."""
    torch.manual_seed(0)
    twin = build_conditional(SETTINGS, {})
    twin.backbone = StridedBackbone()
    twin.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        change(twin)
    return Contest(tiny, {OURS: tiny, DETREX: twin}, {}, tiny)


def case_of(work):
    return Case(Subject("tiny", "", (DETREX,)), (64, 96), 2, work, "time")


def test_equal_models_agree_though_they_drop_out(tiny):
    equal = contest(tiny, lambda twin: None)
    for model in equal.models.values():
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.5
    for work in ("train", "infer"):
        cases.check_agreement(case_of(work), equal)


def test_models_that_differ_are_refused(tiny):
    other = contest(tiny, lambda twin: twin.class_embed.bias.add_(0.1))
    with pytest.raises(UserError, match=r"tiny/64x96/B2/infer/time: scores of ours and detrex"):
        cases.check_agreement(case_of("infer"), other)
    # the weight of a loss shows in training alone
    heavier = contest(tiny, lambda twin: twin.criterion.weight_dict.update(loss_giou=4.0))
    cases.check_agreement(case_of("infer"), heavier)
    with pytest.raises(UserError, match=r"loss_giou.* of ours and detrex differ"):
        cases.check_agreement(case_of("train"), heavier)


def test_chance_comes_back(tiny):
    module = tiny.transformer.encoder.layers[0].attentions[0]
    module.dropout = 0.25
    with without_chance(tiny):
        assert module.dropout == 0
    assert module.dropout == 0.25


class Started(Exception):
    """What a process was to be started with."""


@pytest.mark.parametrize("measure", ["time", "steps"])
@pytest.mark.parametrize("amp", [False, True])
def test_a_process_works_in_the_case_s_precision(tiny, monkeypatch, measure, amp):
    def start(command, **_):
        raise Started(command[-1])

    monkeypatch.setattr(process.subprocess, "Popen", start)
    case = replace(case_of("train"), measure=measure, amp=amp)
    with pytest.raises(Started) as started, process._start(case, OURS, None, {}, {"repeats": 1}):
        pass
    seen = []
    layer = tiny.transformer.encoder.layers[0]
    layer.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    monkeypatch.setattr(process, "prepare", lambda *_: Contest(tiny, {OURS: tiny}, {}, tiny))
    monkeypatch.setattr("sys.argv", ["", str(started.value)])
    monkeypatch.setattr("sys.stdin", ["\n"])
    process.main()
    assert set(seen) == {amp}


def test_a_process_that_ends_says_why():
    case = Case(Subject("gone", "gone.py"), (64, 96), 2, "train", "time")
    with (
        pytest.raises(
            UserError, match=r"gone/64x96/B2/train/time: the process of ours ended: .*gone"
        ),
        callers(case, (OURS,), None, False),
    ):
        pass


# --- where the time goes ------------------------------------------------------------------------


def test_steps_taken_apart_are_an_ordinary_training_step(tiny):
    items = tiny_batch()
    tiny.train()
    torch.stack(list(tiny(items).values())).sum().backward()
    expected = {name: p.grad.clone() for name, p in tiny.named_parameters() if p.grad is not None}
    times = step_times(tiny, items)
    assert tuple(time.step for time in times) == STEPS
    assert all(time.forward > 0 and time.backward > 0 for time in times)
    found = {name: p.grad for name, p in tiny.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("amp", [False, True])
def test_mixed_precision_is_of_forward_passes(tiny, amp):
    seen = []

    def note(stage):
        return lambda *_: seen.append((stage, torch.is_autocast_enabled("cpu")))

    layer = tiny.transformer.encoder.layers[0]
    layer.register_forward_hook(note("forward"))
    layer.register_full_backward_hook(note("backward"))
    items = tiny_batch()
    for work in ("train", "infer"):
        cases.run_of(tiny, items, work, amp)()
    step_times(tiny, items, amp)
    assert set(seen) == {("forward", amp), ("backward", False)}


def test_busiest_operators_come_first():
    matrix = torch.randn(400, 400)
    operators = busiest_operators(lambda: [matrix @ matrix for _ in range(20)], count=3)
    assert operators[0][0] == "aten::mm"
    shares = [share for _, share in operators]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < shares[0] <= 1


# --- tables and files ---------------------------------------------------------------------------

ROWS = [
    Row("detr/train/time", OURS, "milliseconds", 3, 2.0, 1.5, 3.0),
    Row("detr/train/time", DETREX, "milliseconds", 3, 4.0, 3.0, 5.0, 2.0, 1.5, 2.5, 1.15),
    Row("detr/train/memory", OURS, "MiB", 1, 30.0, 30.0, 30.0),
    Row("detr/train/memory", DETREX, "MiB", 1, 20.0, 20.0, 20.0, 1.5, 1.5, 1.5, 1.0, at_most=True),
    Row("detr/train/steps", "encode", "forward", 3, 7.0, 7.0, 7.0),
    Row("detr/train/steps", "encode", "backward", 3, 9.0, 9.0, 9.0),
    Row("detr/train/steps", "aten::mm", "share", 1, 0.25, 0.25, 0.25),
    Row("dab_detr/train/time", DETREX, required=1.15, note="no --detrex-root"),
]


def test_verdicts():
    assert [row.met for row in ROWS if row.required] == [True, False, None]
    assert report.verdict(ROWS[1]) == "≥ 1.15 met"
    assert report.verdict(ROWS[3]) == "≤ 1 NOT MET"
    assert report.verdict(ROWS[-1]) == "≥ 1.15 not measured"
    assert replace(ROWS[1], ratio=1.14).met is False
    assert replace(ROWS[3], ratio=1.0).met is True


def test_files_hold_every_row_and_table(tmp_path):
    files = report.write(tmp_path, "detectors_cpu", {"threads": "2"}, ROWS)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (tmp_path / "detectors_cpu.md").read_text().splitlines()
    ]
    assert [
        "",
        "detrex",
        "4.00 (3.00–5.00)",
        "2.00 (1.50–2.50) detrex / ours",
        "≥ 1.15 met",
    ] in lines
    assert ["", "detrex", "20.0", "1.50 ours / detrex", "≤ 1 NOT MET"] in lines
    assert ["detr/train/steps", "encode", "7.00", "9.00"] in lines
    assert ["detr/train/steps", "mm 25%"] in lines
    assert ["detrex", "no --detrex-root", "1", "1"] in lines
    stored = json.loads((tmp_path / "detectors_cpu.json").read_text())["rows"]
    assert [row["met"] for row in stored] == [row.met for row in ROWS]
    with (tmp_path / "detectors_cpu.csv").open() as file:
        assert [row["contender"] for row in csv.DictReader(file)] == [r.contender for r in ROWS]


# --- command line -------------------------------------------------------------------------------


def test_a_method_over_its_baseline_from_the_command_line(tmp_path, capsys):
    arguments = ["--config-file", str(METHOD), "--over", str(PLAIN), "--quick", "--repeats", "1"]
    assert benchmark_detectors.main([*arguments, "--amp", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "ks_conditional_detr_quickstart/64x96/B2/train/memory" in printed
    assert "precision      forward passes autocast to bfloat16" in printed
    rows = json.loads((tmp_path / "detectors_cpu.json").read_text())["rows"]
    assert {row["measure"] for row in rows} >= {"milliseconds", "forward", "backward", "share"}
    for row in rows:
        if row["contender"] == BASELINE and row["rounds"]:
            ours = next(r for r in rows if (r["case"], r["contender"]) == (row["case"], OURS))
            assert row["ratio"] == pytest.approx(ours["median"] / row["median"])


def test_list_prints_names_alone(capsys):
    assert benchmark_detectors.main(["--list", "--only", "ks_dab_detr/480x640"]) == 0
    expected = [f"ks_dab_detr/480x640/B2/train/{m}" for m in ("time", "memory", "steps")]
    assert capsys.readouterr().out.split() == expected
    assert benchmark_detectors.main(["--list", "--only", "^detr/*/infer"]) == 0
    assert {line.split("/")[0] for line in capsys.readouterr().out.split()} == {"detr"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "detrr"], "--only detrr matches none of the"),
        (["--repeats", "0"], "--repeats is 0, expected 1 or more"),
        (["--over", "x.py"], "--config-file and --over belong together"),
        (["--detrex-root", "/none"], "--detrex-root /none has no projects/*/modeling"),
        (["--output", __file__], "is a file, expected a folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert benchmark_detectors.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", error)
    assert message in error


# --- peers --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detr", "conditional_detr", "deformable_detr"])
def test_hugging_face_agrees(name):
    pytest.importorskip("transformers")
    (subject,) = [subject for subject in SUBJECTS if subject.name == name]
    found = cases.prepare(subject, None, (OURS, HUGGING_FACE))
    assert found.unavailable == {}
    case = Case(replace(subject, peers=(HUGGING_FACE,)), (128, 192), 2, "infer", "time")
    cases.check_agreement(case, found)
    trainable = [
        sum(p.numel() for p in model.parameters() if p.requires_grad)
        for model in found.models.values()
    ]
    # of transformers' own frozen norms nothing is a parameter either
    assert trainable[0] == trainable[1]
