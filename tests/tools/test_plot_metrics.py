import json

import pytest
from PIL import Image

from engine.errors import UserError
from tools import plot_metrics


def write(path, records, tail=""):
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)


def test_a_cut_off_line_is_skipped_also_in_the_middle(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(
        '{"iteration": 19, "total_loss": 3.0}\n{"iteration": 39, "tot\n'
        '{"iteration": 39, "total_loss": 2.0}\n7\n{"total_loss": 1}\n{"iter'
    )
    assert plot_metrics.series(plot_metrics.read_metrics(path), "total_loss") == ([19, 39], [3, 2])


def test_a_resumed_run_replaces_what_was_lost(tmp_path):
    path = tmp_path / "metrics.json"
    first = [{"iteration": i, "total_loss": 10.0 - i, "bbox/AP": i} for i in (1, 2, 3, 4)]
    resumed = [{"iteration": i, "total_loss": 20.0 - i} for i in (3, 5)]
    write(path, first + resumed)
    records = plot_metrics.read_metrics(path)
    assert plot_metrics.series(records, "total_loss") == ([1, 2, 3, 5], [9, 8, 17, 15])


def test_lines_of_one_iteration_are_joined(tmp_path):
    path = tmp_path / "metrics.json"
    write(path, [{"iteration": 9, "total_loss": 1.0}, {"iteration": 9, "bbox/AP": 30.0}])
    assert plot_metrics.read_metrics(path) == [{"iteration": 9, "total_loss": 1.0, "bbox/AP": 30.0}]


def test_layers_share_a_curve_and_branches_do_not():
    names = [
        f"loss_class{branch}{layer}" for branch in ("", "_share_v") for layer in ("", "_0", "_1")
    ]
    groups = plot_metrics.loss_groups(dict.fromkeys([*names, "lr", "total_loss"]))
    assert groups == {
        "loss_class": ["loss_class", "loss_class_0", "loss_class_1"],
        "loss_class_share_v": [
            "loss_class_share_v",
            "loss_class_share_v_0",
            "loss_class_share_v_1",
        ],
    }
    assert plot_metrics.loss_groups({"loss_bbox_0_share_a": 1}) == {
        "loss_bbox_share_a": ["loss_bbox_0_share_a"]
    }
    assert plot_metrics.branch_of("loss_class") == "student"
    assert plot_metrics.branch_of("loss_giou_share_a") == "share_a"


@pytest.mark.parametrize("evaluated", [True, False])
def test_writes_a_picture(tmp_path, evaluated):
    records = [
        {
            "iteration": i,
            "total_loss": 5.0 / i,
            "loss_class": 3.0 / i,
            "loss_bbox_dn": 2 / i,
            "lr": 1,
        }
        for i in range(1, 9)
    ]
    if evaluated:
        records[-1].update({"bbox/AP": 20.0, "bbox/AP50": 40.0, "bbox/APl": float("nan")})
    write(tmp_path / "metrics.json", records, tail='{"iteration": 9, "tot')
    plot_metrics.main(["--output-dir", str(tmp_path)])
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(maxcolors=10**6)) > 50


def test_evaluated_branches_get_a_panel_of_their_own(tmp_path, monkeypatch):
    records = [
        {
            "iteration": i,
            "total_loss": 5.0 / i,
            "bbox/AP": 10.0 + i,
            "student/bbox/AP": 10.0 + i,
            "share_a/bbox/AP": 20.0 + 2 * i,
            "share_v/bbox/AP": 30.0,
            "share_v/bbox/AP-chair": 1.0,
            "ema/bbox/AP": 12.0,
            "ema/share_a/bbox/AP": 12.0,
        }
        for i in range(1, 5)
    ]
    assert plot_metrics.evaluated_branches(records) == ["student", "share_a", "share_v"]
    assert plot_metrics.evaluated_branches([{"bbox/AP": 1.0, "ema/bbox/AP": 1.0}]) == []
    figures = []
    monkeypatch.setattr(plot_metrics.plt, "close", figures.append)
    plot_metrics.plot(records, tmp_path / "curves.png")
    panel = figures[0].axes[2]
    curves = {line.get_label(): list(line.get_ydata()) for line in panel.lines}
    assert curves == {
        "student 14.0": [11.0, 12.0, 13.0, 14.0],
        "share_a 28.0 (+14.0)": [22.0, 24.0, 26.0, 28.0],
        "share_v 30.0 (+16.0)": [30.0] * 4,
    }


def test_a_teacher_alone_has_no_gap(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot_metrics.plt, "close", figures.append)
    plot_metrics.plot([{"iteration": 1, "share_v/bbox/AP": 30.0}], tmp_path / "curves.png")
    assert [line.get_label() for line in figures[0].axes[2].lines] == ["share_v 30.0"]


def test_errors_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.json"):
        plot_metrics.main(["--output-dir", str(tmp_path)])
    (tmp_path / "metrics.json").write_text('{"half')
    with pytest.raises(UserError, match="holds no record"):
        plot_metrics.main(["--output-dir", str(tmp_path)])


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_bytes(
        b'\xff\xfe\n{"iteration": 1, "total_loss": 2.0, "loss_class": null, "loss_bbox": "x"}\n'
        b'{"iteration": null, "total_loss": 1}\n{"iteration": [1]}\n{"iteration": 1e400}\n'
        b'{"iteration": "2", "total_loss": 1.5, "loss_class": 1.0, "share/bbox/AP": "a"}\n'
    )
    records = plot_metrics.read_metrics(path)
    assert plot_metrics.series(records, "total_loss") == ([1, 2], [2.0, 1.5])
    plot_metrics.main(["--output-dir", str(tmp_path)])
    assert (tmp_path / "curves.png").is_file()
