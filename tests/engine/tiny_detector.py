"""A detector of a few hundred weights that trains in milliseconds, and its data."""

import json
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn
from torch.nn import functional as F

CLASSES = ("left", "right", "middle")


class TinyDetector(nn.Module):
    """One box per image; losses are divided by the boxes per process, averaged over the world."""

    def __init__(self, num_classes=3, width=8, dropout=0.1, nan_at=-1):
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(3, width, 5, stride=4)
        self.dropout = nn.Dropout(dropout)
        self.boxes = nn.Linear(width, 4)
        self.classes = nn.Linear(width, num_classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.nan_at = nan_at

    def forward(self, batch):
        device = self.boxes.weight.device
        features = torch.stack([self._features(x["image"].to(device)) for x in batch])
        boxes, logits = self.boxes(features).sigmoid(), self.classes(features)
        if not self.training:
            return [self._detect(x, b, c) for x, b, c in zip(batch, boxes, logits, strict=True)]
        losses = self._losses(batch, boxes, logits, device)
        self.calls += 1
        if self.calls - 1 == self.nan_at:
            losses["loss_box"] = losses["loss_box"] * float("nan")
        return losses

    def _features(self, image):
        x = F.relu(self.stem(image[None].float() / 255))
        return self.dropout(x.mean((2, 3)))[0]

    def _losses(self, batch, boxes, logits, device):
        box_loss, class_loss, count = boxes.sum() * 0, logits.sum() * 0, 0
        for x, box, logit in zip(batch, boxes, logits, strict=True):
            truth = x["instances"].to(device)
            count += len(truth)
            height, width = truth.image_size
            scale = torch.tensor([width, height, width, height], device=device)
            for target, label in zip(truth.gt_boxes.tensor / scale, truth.gt_classes, strict=True):
                box_loss = box_loss + (box - target).abs().sum()
                class_loss = class_loss + F.cross_entropy(logit, label)
        number = torch.tensor(float(count), device=device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(number)
            number /= torch.distributed.get_world_size()
        number = number.clamp(min=1)
        return {"loss_box": 5 * box_loss / number, "loss_class": class_loss / number}

    def _detect(self, x, box, logit):
        height, width = x["height"], x["width"]
        result = Instances((height, width))
        scale = torch.tensor([width, height, width, height], device=box.device)
        low, high = torch.minimum(box[:2], box[2:]), torch.maximum(box[:2], box[2:])
        result.pred_boxes = Boxes((torch.cat([low, high]) * scale)[None])
        result.scores = logit.softmax(0).max()[None]
        result.pred_classes = logit.argmax()[None]
        return {"instances": result}


def write_tiny_data(folder: Path, count: int = 12) -> None:
    """Write ``count`` noisy images, wide and tall ones, with one bright box each; COCO format."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(0)
    images, annotations = [], []
    for index in range(count):
        width, height = ((32, 24), (24, 32))[index % 3 == 0]
        pixels = rng.randint(0, 100, (height, width, 3)).astype(np.uint8)
        x, y = int(rng.randint(0, 12)), int(rng.randint(0, 12))
        pixels[y : y + 10, x : x + 10] += 100
        name = f"{index:03d}.png"
        Image.fromarray(pixels).save(folder / name)
        images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
        annotations.append(
            {
                "id": index + 1,
                "image_id": index + 1,
                "category_id": index % len(CLASSES) + 1,
                "bbox": [x, y, 10, 10],
                "area": 100,
                "iscrowd": 0,
            }
        )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
