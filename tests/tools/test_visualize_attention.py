"""The command line that draws attention, for every detector."""

import json
import os

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from tiny_detectors import ROOT, pattern_image
from tiny_views import images

from engine.errors import UserError
from tools import attention_drawing as drawing
from tools import visualize_attention as vis
from tools.attention_views import look

QUICKSTARTS = sorted(ROOT.glob("projects/*/configs/*quickstart.py"))


@pytest.mark.parametrize("path", QUICKSTARTS, ids=lambda path: path.stem)
def test_every_detector_can_be_seen(path):
    torch.manual_seed(0)
    node = LazyConfig.load(str(path)).model
    model = instantiate(node.get("student", node)).eval()
    inputs = images((48, 64))
    with torch.no_grad():
        detected = model(inputs)[0]["instances"]
    (view,) = look(model, inputs)
    best = int(detected.scores.argmax())
    (query,) = view.best_queries(1)
    torch.testing.assert_close(view.scores[query], detected.scores[best])
    assert view.classes[query] == detected.pred_classes[best]
    expected = view.boxes[query].clamp(min=0).minimum(torch.tensor([64.0, 48, 64, 48]))
    torch.testing.assert_close(expected, detected.pred_boxes.tensor[best], rtol=1e-4, atol=1e-3)
    picture = inputs[0]["image"].permute(1, 2, 0).byte().numpy()
    entry = drawing.Entry(picture, "a.png", "something", view, query)
    figure = drawing.draw([entry], [0], among_queries=True)
    rows = 2 + (view.gaussian is not None)
    assert len(figure.axes) == 1 + rows + 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a config and two checkpoints that differ."""
    folder = tmp_path_factory.mktemp("run")
    config = LazyConfig.load(
        str(ROOT / "projects/baselines/configs/conditional_detr_quickstart.py")
    )
    config.train.output_dir = str(folder)
    LazyConfig.save(config, str(folder / "config.yaml"))
    torch.manual_seed(0)
    state = instantiate(config.model).state_dict()
    torch.save({"model": state}, folder / "model_0000009.pth")
    state["class_embed.bias"] += 4
    torch.save({"model": state}, folder / "model_best.pth")
    return folder


@pytest.fixture
def dataset(tmp_path):
    """A registered data set of images of several sizes."""
    records = []
    for index, size in enumerate([(96, 64), (40, 70), (1, 50), (1, 1)]):  # (w, h)
        pixels = pattern_image(index, size[1], size[0]).permute(1, 2, 0).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        record = {"id": index, "file_name": f"{index}.png", "width": size[0], "height": size[1]}
        records.append(record)
    categories = [{"id": index, "name": f"kind{index}"} for index in range(8)]
    content = {"images": records, "annotations": [], "categories": categories}
    (tmp_path / "gt.json").write_text(json.dumps(content))
    register_coco_instances("seen", {}, str(tmp_path / "gt.json"), str(tmp_path))
    yield tmp_path
    DatasetCatalog.remove("seen")
    MetadataCatalog.remove("seen")


def draw_and_record(monkeypatch, *arguments):
    """Run the command and return what it has drawn."""
    drawn = []

    def recorded(entries, heads, among_queries):
        drawn.extend(entries)
        return drawing.draw(entries, heads, among_queries)

    monkeypatch.setattr(vis, "draw", recorded)
    vis.main(vis.parse([str(argument) for argument in arguments]))
    return drawn


def test_a_run_and_a_data_set(run, dataset, monkeypatch, capsys):
    """All four images, of one pixel too; by default the best checkpoint and the best queries."""
    common = ["--output-dir", run, "--dataset", "seen", "--heads", "0", "5"]
    entries = draw_and_record(monkeypatch, *common, "--images", "5", "--self")
    assert capsys.readouterr().out == f"attention: {run / 'attention.png'}\n"
    with Image.open(run / "attention.png") as picture:
        assert picture.width > 900
    assert [item.title for item in entries] == [f"{i}.png" for i in range(4) for _ in range(2)]
    assert [item.picture.shape[:2] for item in entries[::2]] == [
        (64, 96), (70, 40), (50, 1), (1, 1)
    ]  # fmt: skip
    scores = [float(item.view.scores[item.query]) for item in entries]
    assert all(first >= second for first, second in zip(scores[::2], scores[1::2], strict=True))
    assert min(scores) > 0.2  # those of model_best.pth; the others begin at 0.01
    assert "kind" in entries[0].caption


def test_files_queries_layer_and_overrides(run, dataset, monkeypatch, tmp_path):
    weights = run / "model_0000009.pth"
    common = ["--output-dir", run, "--output", tmp_path / "a.png", "--heads", "2"]
    files = ["--files", dataset / "1.png", dataset / "0.png"]
    last = draw_and_record(
        monkeypatch, *common, *files, "--queries", "7", "3", "--checkpoint", weights
    )
    assert [(item.title, item.query) for item in last] == [
        ("1.png", 7), ("1.png", 3), ("0.png", 7), ("0.png", 3)
    ]  # fmt: skip
    assert max(float(item.view.scores.max()) for item in last) < 0.2
    common += ["--files", dataset / "1.png", "--top", "1"]
    (first,) = draw_and_record(monkeypatch, *common, "--layer", "0", "--checkpoint", weights)
    assert not torch.equal(last[0].view.cross, first.view.cross)
    assert torch.equal(last[0].view.boxes, first.view.boxes)
    (alone,) = draw_and_record(
        monkeypatch, "model.transformer.decoder.num_layers=1", *common,
        "--checkpoint", shallow(run, tmp_path),
    )  # fmt: skip
    torch.testing.assert_close(alone.view.cross, first.view.cross)


def shallow(run, folder):
    """The run's checkpoint without the second and the third layer of the decoder."""
    state = torch.load(run / "model_0000009.pth")["model"]
    later = [f"transformer.decoder.layers.{layer}." for layer in (1, 2)]
    state = {key: value for key, value in state.items() if not key.startswith(tuple(later))}
    torch.save({"model": state}, folder / "shallow.pth")
    return folder / "shallow.pth"


def test_without_a_checkpoint_the_weights_are_the_first_ones(dataset, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    config = ROOT / "projects/baselines/configs/detr_quickstart.py"
    (item,) = draw_and_record(
        monkeypatch, "--config-file", config, "--files", dataset / "0.png", "--top", "1",
        "--heads", "0", "--output", tmp_path / "a.png",
    )  # fmt: skip
    assert "class" in item.caption  # nobody says what the classes are called
    assert (tmp_path / "a.png").stat().st_size > 5_000


def test_more_than_there_are_queries(run, dataset, monkeypatch, tmp_path):
    entries = draw_and_record(
        monkeypatch, "model.num_queries=1", "--config-file",
        ROOT / "projects/baselines/configs/conditional_detr_quickstart.py",
        "--files", dataset / "0.png", "--top", "5", "--self", "--heads", "0",
        "--output", tmp_path / "a.png",
    )  # fmt: skip
    assert [item.query for item in entries] == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "8"], "there is no head 8: there are 0 to 7"),
        (["--queries", "20"], "there is no query 20: there are 0 to 19"),
        (["--layer", "3"], "there is no layer 3: the decoder has 0 to 2"),
        (["--dataset", "sean"], r"data set 'sean' is not registered \(did you mean 'seen'\?\)"),
        (["--files", "{dataset}/9.png"], "9.png not found"),
        (["--files", "{dataset}/gt.json"], "cannot decode image .*gt.json"),
        (["--heads", "0", "--output", "{dataset}/no/a.png"], "cannot write .*a.png"),
        (["--heads", "0", "--output", "{dataset}/a.doc"], "cannot write .*a.doc: .*not supported"),
        (["--output-dir", "{dataset}"], "is not a run's folder: it has no config.yaml"),
        (["--checkpoint", "{dataset}/none.pth"], "none.pth not found"),
        (["--top", "0"], "0 queries to draw"),
        (["--top", "51"], "51 queries to draw, expected 1 to 50"),
        (["model.num_querys=3"], "unknown key 'model.num_querys'"),
    ],
)
def test_errors_are_one_line(run, dataset, arguments, message):
    arguments = [argument.format(dataset=dataset) for argument in arguments]
    if "--output-dir" not in arguments:
        arguments += ["--output-dir", str(run)]
    if "--files" not in arguments and "--dataset" not in arguments:
        arguments += ["--files", str(dataset / "0.png")]
    with pytest.raises(UserError, match=message) as caught:
        vis.main(vis.parse(arguments))
    assert "\n" not in str(caught.value)


def test_indices_do_not_count_from_the_end():
    with pytest.raises(UserError, match="there is no head -1: there are 0 to 3"):
        vis.check_range("head", [0, -1], 4)


def test_a_run_without_config_or_weights(run, dataset, tmp_path):
    with pytest.raises(UserError, match="neither --output-dir nor --config-file"):
        vis.main(vis.parse(["--files", str(dataset / "0.png")]))
    os.link(run / "config.yaml", tmp_path / "config.yaml")
    with pytest.raises(UserError, match="holds no checkpoint"):
        vis.main(vis.parse(["--output-dir", str(tmp_path), "--files", str(dataset / "0.png")]))
    os.link(run / "model_0000009.pth", tmp_path / "model_0000009.pth")
    arguments = vis.parse(["--output-dir", str(tmp_path), "--files", "x"])
    assert vis.weights_path(arguments) == str(tmp_path / "model_0000009.pth")
