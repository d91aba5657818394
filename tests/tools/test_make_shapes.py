import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from engine.errors import UserError
from tools.make_shapes import PRESETS, generate, main, parse
from tools.shapes_drawing import OUTLINES, clip_polygon, polygon_area, polygon_layer, transform
from tools.shapes_scene import Scene, Settings, draw_image

SMALL = Settings(train_images=12, val_images=5)


def decode(annotation: dict, height: int, width: int) -> np.ndarray:
    rle = coco_mask.frPyObjects(annotation["segmentation"], height, width)
    return coco_mask.decode(coco_mask.merge(rle) if isinstance(rle, list) else rle).astype(bool)


def mask_box(mask: np.ndarray) -> list[float]:
    """Smallest x, y, right, bottom around a mask's pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def corners(annotation: dict) -> np.ndarray:
    x, y, w, h = annotation["bbox"]
    return np.array([x, y, x + w, y + h])


def pixels_of(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob("*"))}


# --- the same, again ------------------------------------------------------------------------------


def test_same_parameters_give_the_same_bytes_whatever_the_processes(tmp_path):
    generate(SMALL, tmp_path / "a", workers=1)
    generate(SMALL, tmp_path / "b", workers=2)
    for split in ("train", "val"):
        name = f"annotations/instances_{split}.json"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        first, second = pixels_of(tmp_path / "a" / split), pixels_of(tmp_path / "b" / split)
        assert first.keys() == second.keys()
        assert all((first[name] == second[name]).all() for name in first)


def test_seed_split_and_index_each_give_another_picture():
    pictures = [
        draw_image(replace(SMALL, seed=seed), split, index)[0].tobytes()
        for seed in (0, 1)
        for split in ("train", "val")
        for index in (0, 1)
    ]
    assert len(set(pictures)) == len(pictures)


def test_an_image_does_not_depend_on_how_many_there_are():
    few, many = replace(SMALL, train_images=1), replace(SMALL, train_images=1000)
    assert (draw_image(few, "train", 0)[0] == draw_image(many, "train", 0)[0]).all()


def test_second_call_does_nothing_and_other_parameters_are_refused(tmp_path, capsys):
    output = tmp_path / "shapes"
    arguments = ["--output", str(output), "--train-images", "3", "--val-images", "2"]
    main([*arguments, "--workers", "1"])
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    main([*arguments, "--workers", "1"])
    assert "already there" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before
    with pytest.raises(UserError, match="seed 0 instead of 7"):
        main([*arguments, "--seed", "7"])
    main([*arguments, "--seed", "7", "--overwrite", "--workers", "1"])
    assert json.loads((output / "generation.json").read_text())["seed"] == 7


def test_a_folder_of_other_files_is_never_replaced(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no generated data set"):
        generate(SMALL, tmp_path, overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_interrupted_and_damaged_data_sets_are_redone(tmp_path):
    output = tmp_path / "shapes"
    leftover = tmp_path / "shapes.partial" / "train" / "stale.jpg"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("half")
    assert generate(SMALL, output)
    assert not (tmp_path / "shapes.partial").exists()
    assert len(list((output / "train").iterdir())) == SMALL.train_images
    next((output / "val").iterdir()).unlink()
    assert generate(SMALL, output)
    assert not generate(SMALL, output)


# --- annotations ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many() -> list[tuple[np.ndarray, list[dict]]]:
    return [draw_image(Settings(), "train", index) for index in range(300)]


def test_boxes_and_areas_are_those_of_the_rendered_masks(many):
    errors = []
    for picture, annotations in many[:150]:
        height, width = picture.shape[:2]
        for annotation in annotations:
            mask = decode(annotation, height, width)
            exact = annotation["iscrowd"] == 1
            error = np.abs(corners(annotation) - mask_box(mask)).max()
            assert error <= (0 if exact else 3)  # a pointed tip fills few pixels by half
            errors.append(error)
            slack = 0 if exact else 2 + 0.35 * sum(annotation["bbox"][2:])
            assert abs(annotation["area"] - mask.sum()) <= slack
            x, y, right, bottom = corners(annotation)
            assert 0 <= x < right <= width + 1e-6
            assert 0 <= y < bottom <= height + 1e-6
    assert np.mean(errors) < 0.75


@pytest.mark.parametrize("category", range(len(OUTLINES)), ids=list(OUTLINES))
def test_box_is_tight_around_the_painted_pixels(category):
    settings = Settings(categories=len(OUTLINES), clutter=0, background_contrast=0)
    rng = np.random.default_rng(category)
    for longest in (9, 14, 30, 60, 100, 110):
        scene = Scene(settings, rng)
        scene.rng = _FixedCategory(rng, category)
        before = scene.pixels.copy()
        scene.object(longest)
        (annotation,) = scene.annotations
        assert annotation["category_id"] == category + 1
        change = np.linalg.norm(scene.pixels - before, axis=2)
        assert np.abs(corners(annotation) - mask_box(change > 2)).max() <= 1.25
        painted = change > 0.4 * np.quantile(change[change > 2], 0.9)
        mask = decode(annotation, *painted.shape)
        assert (painted & mask).sum() / (painted | mask).sum() > (0.65 if longest < 15 else 0.85)


class _FixedCategory:
    """A generator whose first integer is given."""

    def __init__(self, rng: np.random.Generator, category: int):
        self._rng, self._next = rng, [category]

    def integers(self, *args):
        return self._next.pop() if self._next else self._rng.integers(*args)

    def __getattr__(self, name):
        return getattr(self._rng, name)


def test_every_object_stays_visible():
    settings = Settings(max_objects=6, min_visible=0.4, clutter=0, truncation=0)
    for index in range(40):
        scene = Scene(settings, np.random.default_rng(index))
        painted: list[np.ndarray] = []
        for longest in (90, 60, 40, 30, 60, 20):
            before = scene.pixels.copy()
            scene.object(longest)
            painted.append(np.abs(scene.pixels - before).max(axis=2) > 20)
        for i, mine in enumerate(painted):
            covered = np.any(painted[i + 1 :], axis=0) if painted[i + 1 :] else np.zeros_like(mine)
            if mine.sum() > 60:
                assert (mine & ~covered).sum() / mine.sum() > 0.4 - 0.1


def test_contents_are_as_varied_as_promised(many):
    objects = [a for _, annotations in many for a in annotations if not a["iscrowd"]]
    crowds = [a for _, annotations in many for a in annotations if a["iscrowd"]]
    per_category = Counter(a["category_id"] for a in objects)
    assert len(per_category) == Settings().categories >= 8
    assert min(per_category.values()) > 0.5 * len(objects) / len(per_category)
    sizes = Counter(int(np.searchsorted([32**2, 96**2], a["area"])) for a in objects)
    assert all(sizes[bucket] >= 2 for bucket in range(3))
    longest = [max(a["bbox"][2:]) for a in objects]
    assert min(longest) < 10
    assert max(longest) > 0.9 * 128
    aspects = [a["bbox"][2] / a["bbox"][3] for a in objects]
    assert np.quantile(aspects, 0.05) < 0.7
    assert np.quantile(aspects, 0.95) > 1.4
    counts = [sum(not a["iscrowd"] for a in annotations) for _, annotations in many]
    assert max(counts) == Settings().max_objects
    assert 0.01 < np.mean([not annotations for _, annotations in many]) < 0.08
    assert 5 <= len(crowds) <= 35


def test_a_ring_has_a_hole():
    points = transform(OUTLINES["ring"], 60, 1, 20) + 40
    mask = polygon_layer(points, 80, 80).mask
    assert not mask[40, 40]
    assert mask.sum() == pytest.approx(np.pi * 30**2 * (1 - 0.55**2), rel=0.02)
    assert polygon_area(points) == pytest.approx(mask.sum(), rel=0.02)


@pytest.mark.parametrize("name", OUTLINES)
def test_outlines_are_distinct(name):
    others = set(OUTLINES) - {name}
    mine = _silhouette(name)
    for other in others:
        overlap = _silhouette(other)
        assert (mine & overlap).sum() / (mine | overlap).sum() < 0.9


def _silhouette(name: str) -> np.ndarray:
    layer = polygon_layer(transform(OUTLINES[name], 40, 1, 0) + 21, 42, 42)
    mask = np.zeros((42, 42), dtype=bool)
    mask[layer.window] = layer.mask
    return mask


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(OUTLINES)),
    longest=st.floats(8, 120),
    aspect=st.floats(0.4, 2.5),
    degrees=st.floats(-180, 180),
    x=st.floats(-20, 100),
    y=st.floats(-20, 80),
)
def test_clipped_polygon_is_the_part_inside(name, longest, aspect, degrees, x, y):
    points = transform(OUTLINES[name], longest, aspect, degrees) + np.array([x, y])
    clipped = clip_polygon(points, 60, 80)
    area = polygon_layer(points, 60, 80).coverage.sum()  # rendered, without clipping the outline
    assert (polygon_area(clipped) if len(clipped) else 0) == pytest.approx(
        area, rel=0.03, abs=2 + 0.15 * longest
    )
    if len(clipped):
        assert (clipped.min(axis=0) >= -1e-6).all()
        assert (clipped.max(axis=0) <= np.array([80, 60]) + 1e-6).all()


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(16, 200), st.integers(16, 200)),
    jitter=st.floats(0, 0.4),
    seed=st.integers(0, 2**31),
    crowd=st.floats(0, 1),
)
def test_any_size_gives_a_valid_image(size, jitter, seed, crowd):
    settings = Settings(size=size, size_jitter=jitter, seed=seed, crowd_share=crowd)
    picture, annotations = draw_image(settings, "val", 3)
    height, width = picture.shape[:2]
    assert picture.dtype == np.uint8
    for actual, nominal in zip((height, width), size, strict=True):
        assert max(16, nominal * (1 - jitter) - 1) <= actual <= max(16, nominal * (1 + jitter) + 1)
    for annotation in annotations:
        assert min(annotation["bbox"][2:]) > 0
        assert annotation["area"] > 0
        assert decode(annotation, height, width).any()


def test_pycocotools_reads_the_files(tmp_path):
    generate(replace(SMALL, crowd_share=1.0, image_format="png"), tmp_path / "shapes")
    coco = COCO(str(tmp_path / "shapes" / "annotations" / "instances_train.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(OUTLINES)[:10]
    assert len(coco.imgs) == SMALL.train_images
    for image in coco.imgs.values():
        with Image.open(tmp_path / "shapes" / "train" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
    ids = [a["id"] for a in coco.dataset["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    assert all(coco.annToMask(a).any() for a in coco.anns.values())
    assert any(a["iscrowd"] for a in coco.anns.values())


# --- command line ---------------------------------------------------------------------------------


def test_options_override_the_preset():
    settings, _ = parse(
        ["--output", "x", "--preset", "quickstart", "--size", "60x80", "--scales", "0.1", "0.5"]
    )
    assert settings.size == (60, 80)
    assert settings.scales == (0.1, 0.5)
    assert settings.categories == PRESETS["quickstart"]["categories"]
    assert parse(["--output", "x", "--size", "64"])[0].size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "8"], "at least 16"),
        (["--categories", "99"], "--categories: 99, expected 1 to 12"),
        (["--scales", "0.9", "0.1"], "--scales"),
        (["--min-objects", "5"], "--max-objects: 4, expected at least min-objects"),
        (["--empty-share", "1.5"], "--empty-share: 1.5, expected 0 to 1"),
        (["--train-images", "-1"], "--train-images: -1, expected at least 0"),
        (["--max-aspect", "inf"], "--max-aspect: inf, expected a finite number"),
        (["--max-rotation", "inf"], "--max-rotation: inf, expected a finite number"),
        (["--object-contrast", "nan"], "--object-contrast: nan, expected a finite number"),
        (["--workers", "0"], "--workers: 0, expected at least 1"),
    ],
)
def test_bad_options_name_themselves(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--output", "x", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_as_a_script_from_anywhere(tmp_path):
    script = Path(__file__).resolve().parents[2] / "tools" / "make_shapes.py"
    command = [sys.executable, str(script), "--output", "out", "--train-images", "2"]
    subprocess.run(
        [*command, "--val-images", "1", "--workers", "2"],
        cwd=tmp_path,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert len(list((tmp_path / "out" / "train").iterdir())) == 2
