"""Reading of images and handling of annotations."""

import copy
import json
from pathlib import Path

import detectron2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

DATA = Path(__file__).parents[2] / "data" / "detectron2"
FACTS = json.loads((DATA / "facts.json").read_text())["transforms"]
IMAGE = np.load(DATA / "images.npz")["image"]
H, W = IMAGE.shape[:2]
ANNOTATIONS = FACTS["annotations"]
embedded_only = pytest.mark.skipif(
    "embedded" not in (detectron2.__file__ or ""), reason="the real detectron2 is active"
)


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(IMAGE).save(path)
    return str(path)


def annotations():
    return copy.deepcopy(ANNOTATIONS["input"])


def test_read_image_formats(image_file):
    np.testing.assert_array_equal(utils.read_image(image_file, "RGB"), IMAGE)
    np.testing.assert_array_equal(utils.read_image(image_file, "BGR"), IMAGE[:, :, ::-1])
    np.testing.assert_array_equal(utils.read_image(image_file), IMAGE)
    assert utils.read_image(image_file, "L").shape == (H, W, 1)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_read_image_converts_every_mode(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.fromarray(IMAGE[:, :, 0].astype(np.uint16)).save(path)
    else:
        Image.fromarray(IMAGE).convert(mode).save(path)
    image = utils.read_image(str(path), "RGB")
    assert image.shape == (H, W, 3)
    assert image.dtype == np.uint8
    if mode in ("RGBA", "CMYK"):
        np.testing.assert_array_equal(image, IMAGE)
    if mode == "I;16":
        np.testing.assert_array_equal(image[:, :, 1], IMAGE[:, :, 0])


# What a viewer shows for each orientation, as numpy operations on the stored pixels.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_read_image_honours_exif_orientation(tmp_path, orientation):
    path = tmp_path / "image.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(IMAGE).save(path, exif=exif)
    np.testing.assert_array_equal(utils.read_image(str(path), "RGB"), UPRIGHT[orientation](IMAGE))


def test_read_image_survives_damaged_exif(tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(IMAGE).save(path, exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff\x00")
    assert utils.read_image(str(path), "RGB").shape == (H, W, 3)


def test_read_image_names_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        utils.read_image(str(tmp_path / "gone.png"))


@embedded_only
@pytest.mark.parametrize("kept", [0, 0.05, 0.6])
def test_read_image_names_the_damaged_file(tmp_path, image_file, kept):
    damaged = tmp_path / "damaged.png"
    whole = Path(image_file).read_bytes()
    damaged.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises((OSError, SyntaxError), match=r"cannot decode image .*damaged\.png"):
        utils.read_image(str(damaged), "RGB")


def test_convert_image_to_rgb():
    np.testing.assert_array_equal(utils.convert_image_to_rgb(IMAGE[:, :, ::-1], "BGR"), IMAGE)
    np.testing.assert_array_equal(utils.convert_image_to_rgb(torch.tensor(IMAGE), "RGB"), IMAGE)
    grey = utils.convert_image_to_rgb(IMAGE[:, :, :1], "L")
    np.testing.assert_array_equal(grey, np.repeat(IMAGE[:, :, :1], 3, axis=2))


def test_check_image_size_compares_or_adds():
    record = {}
    utils.check_image_size(record, IMAGE)
    assert record == FACTS["read_image"]["check_image_size adds"]
    with pytest.raises(utils.SizeMismatchError, match=r"a\.png"):
        utils.check_image_size({"file_name": "a.png", "width": H, "height": W}, IMAGE)
    assert issubclass(utils.SizeMismatchError, ValueError)


def test_annotations_transform_like_recorded():
    size = tuple(ANNOTATIONS["image_size_hw"])
    transforms = [T.HFlipTransform(31), T.CropTransform(4, 2, 18, 13)]
    given = annotations()
    done = [utils.transform_instance_annotations(a, transforms, size) for a in given]
    assert all(a is b for a, b in zip(given, done, strict=True))
    for actual, expected in zip(
        done, ANNOTATIONS["after_transform_instance_annotations"], strict=True
    ):
        np.testing.assert_allclose(actual["bbox"], expected["bbox"])
        assert actual["bbox_mode"] == BoxMode.XYXY_ABS
        assert actual["category_id"] == expected["category_id"]

    instances = utils.annotations_to_instances(done, size)
    assert instances.image_size == size
    assert instances.gt_boxes.tensor.tolist() == ANNOTATIONS["instances_boxes"]
    assert instances.gt_classes.tolist() == ANNOTATIONS["instances_classes"]
    kept, mask = utils.filter_empty_instances(instances, return_mask=True)
    assert kept.gt_classes.tolist() == ANNOTATIONS["filter_empty_keeps"]
    assert mask.tolist() == [True, True, True, False, False]


def test_a_mapper_transforms_boxes_as_if_each_were_alone(image_file):
    given = annotations()
    odd = [0.1, 1 / 3, 4.7, 2 / 3]
    given += [{**given[0], "bbox": odd, "bbox_mode": BoxMode(mode)} for mode in (0, 1)]
    augmentations = [T.RandomFlip(prob=1.0), T.Resize((13, 18))]
    transforms = [T.HFlipTransform(W), T.ResizeTransform(H, W, 13, 18)]
    mapper = DatasetMapper(is_train=True, augmentations=augmentations, image_format="RGB")
    for chosen in (given, given[:2], given[-2:-1], given[-1:], []):
        record = {"file_name": image_file, "annotations": copy.deepcopy(chosen)}
        kept = [copy.deepcopy(annotation) for annotation in chosen if not annotation["iscrowd"]]
        alone = [utils.transform_instance_annotations(a, transforms, (13, 18)) for a in kept]
        wanted = utils.filter_empty_instances(utils.annotations_to_instances(alone, (13, 18)))
        found = mapper(record)["instances"]
        assert torch.equal(found.gt_boxes.tensor, wanted.gt_boxes.tensor)
        assert torch.equal(found.gt_classes, wanted.gt_classes)
        assert record["annotations"] == chosen  # left as they were


def test_boxes_are_transformed_in_double_precision():
    box = [0.1, 1 / 3, 4.7, 2 / 3]
    x0, y0, width, height = np.float32(box)
    corners = np.array([x0, y0, x0 + width, y0 + height], dtype=np.float64)
    flipped = np.array([W - corners[2], corners[1], W - corners[0], corners[3]])
    expected = flipped * [18 / W, 13 / H, 18 / W, 13 / H]
    annotation = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS}
    transforms = [T.HFlipTransform(W), T.ResizeTransform(H, W, 13, 18)]
    found = utils.transform_instance_annotations(annotation, transforms, (13, 18))["bbox"]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_no_annotations_give_empty_instances():
    instances = utils.annotations_to_instances([], (3, 4))
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.shape == (0,)
    assert instances.gt_classes.dtype == torch.int64
    assert len(utils.filter_empty_instances(instances)) == 0


def test_filter_threshold():
    boxes = Boxes([[0.0, 0, 9, 9], [0, 0, 9, 2e-5], [0, 0, 9, 5e-6], [3, 3, 2, 4]])
    instances = Instances((9, 9), gt_boxes=boxes)
    assert len(utils.filter_empty_instances(instances)) == 2
    assert len(utils.filter_empty_instances(instances, box_threshold=1.0)) == 1
    with pytest.raises(AssertionError):
        utils.filter_empty_instances(instances, by_box=False, by_mask=False)


@embedded_only
@pytest.mark.parametrize("key", ["segmentation", "keypoints"])
def test_masks_and_keypoints_are_refused(key):
    annotation = {**annotations()[0], key: [[0, 0, 4, 0, 4, 4]]}
    with pytest.raises(NotImplementedError, match=key):
        utils.transform_instance_annotations(annotation, [], (9, 9))
    with pytest.raises(NotImplementedError, match=key):
        utils.annotations_to_instances([annotation], (9, 9))


def test_metadata_consistency():
    for name, classes in [("metadata_a", ["x"]), ("metadata_b", ["x"]), ("metadata_c", ["y"])]:
        MetadataCatalog.get(name).set(thing_classes=classes)
    utils.check_metadata_consistency("thing_classes", ["metadata_a", "metadata_b"])
    with pytest.raises(ValueError, match="thing_classes"):
        utils.check_metadata_consistency("thing_classes", ["metadata_a", "metadata_c"])
    with pytest.raises(AttributeError):
        utils.check_metadata_consistency("colors", ["metadata_a"])


def mapper(is_train, **kwargs):
    return DatasetMapper(
        is_train,
        augmentations=[T.RandomFlip(prob=1.0), T.ResizeShortestEdge(20, 26)],
        image_format="BGR",
        **kwargs,
    )


def test_dataset_mapper(image_file):
    polygon = [[2.0, 3.0, 12.0, 3.0, 12.0, 9.0]]
    record = {"file_name": image_file, "annotations": annotations()}
    record["annotations"][0].update(segmentation=polygon, keypoints=[1, 2, 2])
    before = copy.deepcopy(record)
    output = mapper(True)(record)
    assert record == before
    recorded = FACTS["DetrDatasetMapper"]["train"]
    assert output["instances"].gt_classes.tolist() == recorded["gt_classes"]
    torch.testing.assert_close(
        output["instances"].gt_boxes.tensor, torch.tensor(recorded["gt_boxes"])
    )
    assert (output["height"], output["width"]) == (H, W)
    expected = np.load(DATA / "images.npz")["mapper/train_image"]
    difference = output["image"].numpy().astype(int)[::-1] - expected
    assert abs(difference).max() <= 1
    assert "annotations" not in output
    assert "instances" not in mapper(False)(record)
    assert "instances" not in mapper(True)({"file_name": image_file})


@embedded_only
def test_dataset_mapper_refuses_masks():
    with pytest.raises(NotImplementedError, match="masks"):
        mapper(True, use_instance_mask=True)


def test_an_image_of_one_pixel_can_be_flipped(tmp_path):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "pixel.png")
    flip = T.RandomFlip(prob=1.0)
    mapper = DatasetMapper(is_train=True, augmentations=[flip], image_format="RGB")
    sample = mapper({"file_name": str(tmp_path / "pixel.png"), "annotations": []})
    assert sample["image"].flatten().tolist() == [10, 20, 30]
