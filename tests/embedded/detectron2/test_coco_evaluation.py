"""COCOEvaluator against results recorded from the real one, and against pycocotools."""

import contextlib
import io
import json
import math
import re
from pathlib import Path

import detectron2
import pytest
import torch
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.evaluation import COCOEvaluator, print_csv_format
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

DATA = Path(__file__).parents[2] / "data" / "detectron2"
FACTS = json.loads((DATA / "facts.json").read_text())["coco_evaluator"]
GROUND_TRUTH = DATA / "coco_gt.json"
DETECTIONS = json.loads((DATA / "coco_detections.json").read_text())
NAME = "test_coco_evaluation"
embedded_only = pytest.mark.skipif(
    "embedded" not in (detectron2.__file__ or ""), reason="the real detectron2 is active"
)


@pytest.fixture(autouse=True)
def records():
    register_coco_instances(NAME, {}, str(GROUND_TRUTH), "images")
    yield DatasetCatalog.get(NAME)
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def instances(record, detections, name=NAME):
    classes = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    own = [d for d in detections if d["image_id"] == record["image_id"]]
    boxes = torch.tensor([d["bbox"] for d in own], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Instances(
        (record["height"], record["width"]),
        pred_boxes=Boxes(boxes),
        scores=torch.tensor([d["score"] for d in own], dtype=torch.float32),
        pred_classes=torch.tensor([classes[d["category_id"]] for d in own], dtype=torch.int64),
    )


def evaluate(records, detections, img_ids=None, name=NAME, **kwargs):
    """What both implementations find alike."""
    results = []
    for fast in (False, True):
        evaluator = COCOEvaluator(name, use_fast_impl=fast, **kwargs)
        evaluator.reset()
        for record in records:
            evaluator.process([record], [{"instances": instances(record, detections, name)}])
        results.append(evaluator.evaluate(img_ids))
    slow, fast = results
    assert list(slow) == list(fast)
    for task, metrics in slow.items():
        assert fast[task] == pytest.approx(metrics, abs=1e-9, nan_ok=True)
    return fast


def assert_recorded(result, recorded):
    assert list(result) == list(recorded)
    for task, metrics in recorded.items():
        assert result[task] == pytest.approx(
            {metric: float(value) for metric, value in metrics.items()}, abs=1e-6, nan_ok=True
        )
        assert list(result[task]) == list(metrics)


def test_all_detections(records):
    for kwargs in ({}, {"tasks": ("bbox",)}, {"distributed": False}):
        assert_recorded(evaluate(records, DETECTIONS, **kwargs), FACTS["all_detections"])


def test_every_third_detection(records):
    assert_recorded(evaluate(records, DETECTIONS[::3]), FACTS["every_third_detection"])


def test_perfect_detections(records):
    annotations = json.loads(GROUND_TRUTH.read_text())["annotations"]
    perfect = [{**a, "score": 0.9} for a in annotations if not a["iscrowd"]]
    assert_recorded(evaluate(records, perfect), FACTS["perfect_detections_score_0.9"])


def test_no_detections(records):
    assert_recorded(evaluate(records, []), FACTS["no_detections"])


def test_nothing_processed():
    assert evaluate([], DETECTIONS) == FACTS["nothing_processed"]


def test_some_images(records):
    fact = FACTS["two_images_processed_only"]
    some = [record for record in records if record["image_id"] in fact["image_ids"]]
    assert_recorded(evaluate(some, DETECTIONS), fact["result"])
    fact = FACTS["img_ids_argument"]
    assert_recorded(evaluate(records, DETECTIONS, fact["image_ids"]), fact["result"])


@pytest.mark.parametrize("limit", [5, 300])
def test_detection_limit(records, limit):
    result = evaluate(records, DETECTIONS, max_dets_per_image=limit)
    assert_recorded(result, FACTS[f"max_dets_per_image_{limit}"])


@pytest.mark.parametrize("limit", [None, 5, 11, 300])
def test_detection_limit_with_bad_scores(records, limit):
    bad = [{**d, "score": 1 - d["score"]} for d in DETECTIONS]
    case = "default" if limit is None else f"max_dets_per_image_{limit}"
    recorded = FACTS["scores_replaced_by_1_minus_score"][case]
    assert_recorded(evaluate(records, bad, max_dets_per_image=limit), recorded)


def test_one_category_gets_no_rows_of_its_own(tmp_path):
    fact = FACTS["single_category"]
    content = json.loads(GROUND_TRUTH.read_text())
    for key, field in (("annotations", "category_id"), ("categories", "id")):
        content[key] = [entry for entry in content[key] if entry[field] == fact["category_id"]]
    path = tmp_path / "one.json"
    path.write_text(json.dumps(content))
    name = "test_one_category"
    register_coco_instances(name, {}, str(path), "images")
    records = DatasetCatalog.get(name)
    detections = [d for d in DETECTIONS if d["category_id"] == fact["category_id"]]
    assert_recorded(evaluate(records, detections, name=name), fact["result"])


def test_class_out_of_range(records):
    evaluator = COCOEvaluator(NAME)
    evaluator.reset()
    wrong = instances(records[0], DETECTIONS)
    wrong.pred_classes = wrong.pred_classes + 4
    evaluator.process([records[0]], [{"instances": wrong}])
    with pytest.raises(AssertionError):
        evaluator.evaluate()


def test_reset_forgets(records):
    evaluator = COCOEvaluator(NAME)
    for _ in range(2):
        evaluator.reset()
        for record in records:
            evaluator.process([record], [{"instances": instances(record, DETECTIONS)}])
    assert_recorded(evaluator.evaluate(), FACTS["all_detections"])
    evaluator.reset()
    assert evaluator.evaluate() == {}


def test_written_files_hold_the_detections(records, tmp_path):
    result = evaluate(records, DETECTIONS, output_dir=str(tmp_path / "new"))
    assert_recorded(result, FACTS["all_detections"])
    written = json.loads((tmp_path / "new" / "coco_instances_results.json").read_text())

    def key(detection):
        return detection["image_id"], detection["category_id"], round(detection["score"], 5)

    assert sorted(map(key, written)) == sorted(map(key, DETECTIONS))
    assert sorted(written[0]) == ["bbox", "category_id", "image_id", "score"]
    saved = torch.load(tmp_path / "new" / "instances_predictions.pth", weights_only=True)
    assert [prediction["image_id"] for prediction in saved] == [r["image_id"] for r in records]
    # pycocotools alone, from the written file
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(GROUND_TRUTH))
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(written), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats.tolist() == pytest.approx(FACTS["pycocotools_12_stats"])


@embedded_only
def test_a_file_that_is_not_finished_leaves_the_old_one(records, tmp_path, monkeypatch):
    evaluate(records, DETECTIONS, output_dir=str(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(content, file, **options):
        file.write(b"half of the ne")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(records, DETECTIONS[::3], output_dir=str(tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_dataset_without_json_file_is_converted(records, tmp_path):
    name = "test_converted"
    load_coco_json(str(GROUND_TRUTH), "images", name)
    DatasetCatalog.register(name, lambda: records)
    with pytest.raises(ValueError, match="output_dir"):
        COCOEvaluator(name)
    result = evaluate(records, DETECTIONS, name=name, output_dir=str(tmp_path))
    # Areas are recomputed from boxes, which decides small, medium and large.
    recorded = FACTS["all_detections"]["bbox"]
    for metric in ("AP", "AP50", "AP75", "AP-round"):
        assert result["bbox"][metric] == pytest.approx(recorded[metric], abs=1e-6)


def test_ground_truth_without_annotations(records, tmp_path):
    content = json.loads(GROUND_TRUTH.read_text())
    del content["annotations"]
    path = tmp_path / "test_images.json"
    path.write_text(json.dumps(content))
    name = "test_without_annotations"
    register_coco_instances(name, {}, str(path), "images")
    DatasetCatalog.get(name)
    assert evaluate(records, DETECTIONS, name=name, output_dir=str(tmp_path)) == {}
    assert len(json.loads((tmp_path / "coco_instances_results.json").read_text())) == 163


def test_logged_tables(records, caplog):
    with caplog.at_level("INFO"):
        evaluate(records, DETECTIONS)
    lines = caplog.text.splitlines()
    columns = [re.findall(r"AP\w*", line) for line in lines]
    row = lines[columns.index(["AP", "AP50", "AP75", "APs", "APm", "APl"]) + 2]
    assert [float(v) for v in re.findall(r"\d+\.\d+", row)] == pytest.approx(
        [48.304, 67.435, 50.343, 19.802, 58.107, 76.774]
    )
    # by category
    assert re.search(r"round\s*\|\s*57\.203", caplog.text)


@embedded_only
def test_each_implementation_is_what_was_asked_for(records, caplog):
    with caplog.at_level("INFO"):
        evaluate(records, DETECTIONS)
    assert re.findall(r"Summary of (\w+):", caplog.text) == ["COCOeval", "COCOeval_faster"]


def test_csv_format(records, caplog):
    with caplog.at_level("INFO"):
        print_csv_format(evaluate(records, DETECTIONS))
    messages = [r.getMessage() for r in caplog.records if "copypaste" in r.getMessage()]
    assert messages == FACTS["print_csv_format_messages"]


def test_missing_ground_truth_is_named(tmp_path):
    name = "test_gone"
    register_coco_instances(name, {}, str(tmp_path / "gone.json"), "images")
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        COCOEvaluator(name)


@embedded_only
def test_other_tasks_are_refused():
    with pytest.raises(NotImplementedError, match="segm"):
        COCOEvaluator(NAME, tasks=("bbox", "segm"))


def in_one_of_two_processes(rank, address, queue):
    torch.set_num_threads(1)  # a forked process must not wait for threads of its parent
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    register_coco_instances(NAME, {}, str(GROUND_TRUTH), "images")
    result = evaluate(DatasetCatalog.get(NAME)[rank::2], DETECTIONS)
    queue.put((rank, result))
    torch.distributed.destroy_process_group()


def test_two_processes_evaluate_together(tmp_path):
    context = mp.get_context("fork")
    queue = context.Queue()
    address = f"file://{tmp_path / 'rendezvous'}"
    processes = [
        context.Process(target=in_one_of_two_processes, args=(rank, address, queue))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    assert_recorded(results[0], FACTS["all_detections"])
    assert results[1] == {}


def test_never_seen_class_is_nan(records):
    assert math.isnan(evaluate(records, DETECTIONS)["bbox"]["AP-never"])


@embedded_only
@pytest.mark.parametrize("kind", ["images", "categories"])
def test_ids_that_are_texts(tmp_path, kind):
    own = json.loads(GROUND_TRUTH.read_text())
    key = {"images": "image_id", "categories": "category_id"}[kind]
    found = [{**detection, key: f"{detection[key]:09d}"} for detection in DETECTIONS]
    for entry in own[kind]:
        entry["id"] = f"{entry['id']:09d}"
    for entry in own["annotations"]:
        entry[key] = f"{entry[key]:09d}"
    path, name = tmp_path / "texts.json", f"{NAME}_texts"
    path.write_text(json.dumps(own))
    register_coco_instances(name, {}, str(path), "images")
    try:
        texts = evaluate(DatasetCatalog.get(name), found, name=name)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    numbers = evaluate(DatasetCatalog.get(NAME), DETECTIONS)
    assert texts["bbox"] == pytest.approx(numbers["bbox"], nan_ok=True)


@embedded_only
def test_a_number_of_detections_that_is_none():
    with pytest.raises(ValueError, match="max_dets_per_image is 'abc', expected an integer"):
        COCOEvaluator(NAME, max_dets_per_image="abc")
