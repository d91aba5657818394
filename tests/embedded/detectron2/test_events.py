"""EventStorage and its writers."""

import json
import logging

import detectron2
import pytest
import torch
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
    has_event_storage,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture(scope="module")
def recorded(reference_dir):
    return json.loads((reference_dir / "detrex" / "runtime.json").read_text())["events"]


def record_run(writer, values, storage):
    """The run of the recording: write at even steps and once more at the end."""
    for step, value in enumerate(values):
        storage.put_scalar("loss", value)
        storage.put_scalar("lr", value / 100, smoothing_hint=False)
        if step == 2:
            storage.put_scalar("bbox_AP", 1.5)
        if step % 2 == 0:
            writer.write()
        if step < len(values) - 1:
            storage.step()
    writer.write()
    writer.close()


def test_json_lines_and_history(recorded, tmp_path):
    values = recorded["json_writer"]["values"]
    file = tmp_path / "metrics.json"
    with EventStorage(10) as storage:
        record_run(JSONWriter(str(file), window_size=4), values, storage)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == recorded["json_writer"]["lines"]
    assert list(lines[-1]) == sorted(lines[-1])

    facts = recorded["history"]
    assert {k: list(v) for k, v in storage.latest().items()} == facts["latest"]
    smoothed = storage.latest_with_smoothing_hint(3)
    assert {k: list(v) for k, v in smoothed.items()} == facts["latest_with_smoothing_hint_3"]
    history = storage.history("loss")
    assert history.median(3) == facts["median_3"]
    assert history.avg(3) == facts["avg_3"]
    assert history.global_avg() == pytest.approx(facts["global_avg"])
    assert [list(pair) for pair in history.values()] == facts["values"]
    assert storage.count_samples("loss", 3) == 3
    assert storage.count_samples("bbox_AP", 3) == 1
    assert storage.smoothing_hints() == {"loss": True, "lr": False, "bbox_AP": True}
    with pytest.raises(KeyError, match="nothing"):
        storage.history("nothing")
    with pytest.raises(AssertionError, match="lr"):
        storage.put_scalar("lr", 1.0)


def test_window_counts_iterations_not_values():
    storage = EventStorage()
    for iteration in (0, 10, 20, 21, 22):
        storage.put_scalar("x", iteration, cur_iter=iteration)
    assert storage.count_samples("x", window_size=3) == 3
    assert storage.count_samples("x", window_size=13) == 4
    assert storage.count_samples("x", window_size=1000) == 5
    assert storage.latest_with_smoothing_hint(3)["x"] == (21, 22)


def test_active_storage_and_name_scope():
    assert not has_event_storage()
    with pytest.raises(AssertionError, match="EventStorage"):
        get_event_storage()
    with EventStorage(5) as outer, EventStorage() as inner:
        assert get_event_storage() is inner
        with inner.name_scope("scope"):
            inner.put_scalars(x=torch.tensor(1.0))
        inner.put_scalars(y=2, cur_iter=7)
        assert inner.latest() == {"scope/x": (1.0, 0), "y": (2.0, 7)}
        assert outer.iter == outer.iteration == 5
        outer.iter = 9.0
        assert outer.iter == 9
    assert not has_event_storage()


@pytest.mark.skipif(
    "embedded" not in detectron2.__file__, reason="an installed detectron2 just appends"
)
@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        ('{"iteration": 1, "lo', 1),  # killed while writing
        ('{"iteration": 1}', 2),  # killed before the line break
        ("", 1),
        ('{"iteration": 1}\n', 2),
    ],
)
def test_json_writer_repairs_a_cut_file(tmp_path, tail, kept):
    file = tmp_path / "metrics.json"
    file.write_text('{"iteration": 0}\n' + tail)
    writer = JSONWriter(str(file))
    with EventStorage(2) as storage:
        storage.put_scalar("loss", 3.0)
        writer.write()
    writer.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [*range(kept), 2]


def printed_line(caplog, max_iter, iterations=6, **extra):
    caplog.set_level(logging.INFO)
    with EventStorage() as storage:
        printer = CommonMetricPrinter(max_iter)
        for k in range(iterations):
            storage.iter = k
            storage.put_scalars(total_loss=6 - k, loss_a=3 - 0.25 * k, loss_b=1e-5 * (k + 1))
            storage.put_scalars(time=0.5, data_time=0.0125, **extra)
            storage.put_scalar("lr", 0.000123456, smoothing_hint=False)
            storage.put_scalar("accuracy", 0.3)
        printer.write()
    return caplog.messages[-1] if caplog.messages else None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the line also holds the GPU memory")
def test_printed_line(recorded, caplog):
    assert printed_line(caplog, 50) == recorded["common_metric_printer"]["message"]


def test_printed_metrics_and_end_of_training(caplog):
    assert "a[metric]: 0.25" in printed_line(caplog, None, **{"a[metric]": 0.25})
    caplog.clear()
    assert printed_line(caplog, max_iter=5) is None  # iteration 5 is after the last one


def test_eta_without_iteration_times(caplog):
    caplog.set_level(logging.INFO)
    printer = CommonMetricPrinter(max_iter=10**6)
    with EventStorage() as storage:
        printer.write()
        assert "eta" not in caplog.messages[-1]
        assert "lr: N/A" in caplog.messages[-1]
        storage.iter = 1
        printer.write()
        assert "eta: " in caplog.messages[-1]


def test_tensorboard_holds_scalars_images_and_histograms(tmp_path):
    writer = TensorboardXWriter(str(tmp_path), window_size=4)
    assert not list(tmp_path.iterdir()), "no file before the first write"
    values = torch.tensor([0.0, 1.0, 1.0, 4.0])
    with EventStorage() as storage:
        for value in (5.0, 1.0, 4.0):
            storage.put_scalar("loss", value)
            storage.step()
        storage.put_image("image", torch.rand(3, 4, 5))
        storage.put_histogram("weights", values, bins=4)
        writer.write()
        writer.write()
        writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(2, 4.0)]
    (image,) = events.Images("image")
    assert (image.height, image.width, image.step) == (4, 5, 3)
    (histogram,) = events.Histograms("weights")
    value = histogram.histogram_value
    assert (value.num, value.sum, value.sum_squares) == (4, 6.0, 18.0)
    assert sum(value.bucket) == 4
