import json
import os
from pathlib import Path

import pytest

from engine.errors import UserError
from tools import subset_coco


def write_coco(root: Path, labelled: int = 8, empty: int = 3, crowded: int = 2) -> Path:
    """A COCO-layout folder; ids: labelled images first, then empty ones, then crowd-only ones."""
    count = labelled + empty + crowded
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for i in range(count):
        (root / "train2017" / f"{i:03d}.jpg").write_bytes(bytes([i]))
    boxes = [(i, 0) for i in range(labelled) for _ in range(i % 3 + 1)]
    boxes += [(labelled + empty + i, 1) for i in range(crowded)]
    content = {
        "info": {"year": 2017},
        "images": [{"id": i, "file_name": f"{i:03d}.jpg"} for i in range(count)],
        "annotations": [
            {"id": k, "image_id": image, "iscrowd": crowd, "category_id": 5}
            for k, (image, crowd) in enumerate(boxes)
        ],
        "categories": [{"id": 5, "name": "cat"}],
    }
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return root


def run(source: Path, output: Path, *options: str) -> None:
    subset_coco.main(["--source", str(source), "--output", str(output), *options])


def read(output: Path, split: str = "train2017") -> dict:
    return json.loads((output / "annotations" / f"instances_{split}.json").read_text())


def test_keeps_the_chosen_images_with_all_their_annotations(tmp_path):
    source = write_coco(tmp_path / "coco")
    run(source, tmp_path / "tiny", "--images", "5")
    whole, part = read(source), read(tmp_path / "tiny")
    chosen = {image["id"] for image in part["images"]}
    assert len(chosen) == 5
    assert max(chosen) < 8  # neither empty nor with crowds only
    assert part["annotations"] == [a for a in whole["annotations"] if a["image_id"] in chosen]
    assert (part["categories"], part["info"]) == (whole["categories"], whole["info"])
    files = {p.name: p.read_bytes() for p in (tmp_path / "tiny" / "train2017").iterdir()}
    assert files == {f"{i:03d}.jpg": bytes([i]) for i in chosen}


def test_choice_depends_on_the_seed_alone(tmp_path):
    source = write_coco(tmp_path / "coco", labelled=40)
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        run(source, tmp_path / name, "--images", "6", "--seed", seed)
    assert read(tmp_path / "a") == read(tmp_path / "b") != read(tmp_path / "c")


def test_as_val_writes_the_same_images_twice(tmp_path):
    source = write_coco(tmp_path / "coco")
    run(source, tmp_path / "tiny", "--images", "4", "--as-val")
    assert read(tmp_path / "tiny") == read(tmp_path / "tiny", "val2017")
    names = [
        sorted(p.name for p in (tmp_path / "tiny" / s).iterdir())
        for s in subset_coco.OTHER
        if (tmp_path / "tiny" / s).exists()
    ]
    assert len(names) == 2
    assert names[0] == names[1]


def test_copies_where_links_do_not_work_and_may_run_again(tmp_path, monkeypatch):
    source = write_coco(tmp_path / "coco")
    run(source, tmp_path / "tiny", "--images", "3")
    linked = next((tmp_path / "tiny" / "train2017").iterdir())
    assert linked.samefile(source / "train2017" / linked.name)

    def refuse(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    run(source, tmp_path / "tiny", "--images", "3")
    run(source, tmp_path / "copied", "--images", "3")
    copied = tmp_path / "copied" / "train2017" / linked.name
    assert copied.read_bytes() == linked.read_bytes()
    assert not copied.samefile(linked)
    assert not list(tmp_path.rglob("*.partial"))


def test_errors_are_one_line(tmp_path):
    source = write_coco(tmp_path / "coco")
    with pytest.raises(UserError, match=r"--images 9, expected 1 to the 8 images"):
        run(source, tmp_path / "tiny", "--images", "9")
    with pytest.raises(UserError, match="instances_val2017"):
        run(source, tmp_path / "tiny", "--split", "val2017")
    (source / "train2017" / "000.jpg").unlink()
    with pytest.raises(UserError, match=r"000\.jpg"):
        run(source, tmp_path / "tiny", "--images", "8")
    assert not (tmp_path / "tiny" / "annotations").exists()  # written last
    with pytest.raises(SystemExit):
        run(source, source)


def test_file_names_cannot_leave_the_folder(tmp_path):
    source = write_coco(tmp_path / "coco", labelled=1)
    content = read(source)
    content["images"][0]["file_name"] = "../../outside.jpg"
    (source / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="expected a path below"):
        run(source, tmp_path / "tiny", "--images", "1")


@pytest.mark.parametrize("text", ["[]", "{}", '{"images": [{"id": 1}], "annotations": []}'])
def test_what_is_no_annotation_file_is_named(tmp_path, text):
    source = write_coco(tmp_path / "coco")
    (source / "annotations" / "instances_train2017.json").write_text(text)
    with pytest.raises(UserError) as caught:
        run(source, tmp_path / "out", "--images", "2")
    message = str(caught.value)
    assert "\n" not in message
    assert "instances_train2017.json" in message or "0 images with a box" in message


def test_an_image_without_a_name_is_named(tmp_path):
    source = write_coco(tmp_path / "coco")
    path = source / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        del image["file_name"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"instances_train2017.json: image 0 has the file_name"):
        run(source, tmp_path / "out", "--images", "2")
