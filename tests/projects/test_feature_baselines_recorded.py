"""FitNet, FGD, MGD, FKD and FGFI against recorded values and gradients, in float64."""

import numpy as np
import pytest
import torch
from feature_context import context_of
from tiny_detectors import ROOT

from projects.detr_distill.fgd import FGD, box_masks
from projects.detr_distill.fgfi import FGFI
from projects.detr_distill.fitnet import FitNet
from projects.detr_distill.fkd import FKD
from projects.detr_distill.mgd import MGD
from projects.detr_distill.regions import activation_attention, boxes_in_cells

LAYERS = {"g": "value", "theta": "query", "phi": "key", "W": "output", "bn": "norm"}
"""Of the recorded non-local blocks, and what we call them."""


class Recorded:
    """Arrays by name, floating ones in float64."""

    def __init__(self, path):
        self.arrays = np.load(path)

    def __getitem__(self, name):
        array = torch.from_numpy(self.arrays[name])
        return array.double() if array.is_floating_point() else array

    @property
    def boxes(self):
        """Of the three images, in pixels."""
        return [self[f"features/gt_boxes_xyxy{image}"] for image in range(3)]

    @property
    def context(self):
        """Ground truth of the maps under ``features/``."""
        sizes = [tuple(size) for size in self["features/img_hw"].tolist()]
        return context_of(self.boxes, (56, 72), sizes)

    def load(self, module, prefix):
        """Give a module its recorded weights, which may have more axes of length 1."""
        for name, parameter in module.named_parameters():
            parameter.data.copy_(self[f"{prefix}.{name}"].reshape(parameter.shape))

    def check_gradients(self, module, prefix):
        for name, parameter in module.named_parameters():
            close(parameter.grad, self[f"{prefix}.{name}"].reshape(parameter.shape))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def reference(reference_dir):
    """All that is recorded."""
    return Recorded(reference_dir / "distill" / "losses.npz")


@pytest.fixture(scope="module", params=["stored", "reference"])
def values(request):
    """Inputs and values alone, or the whole record."""
    if request.param == "reference":
        return request.getfixturevalue("reference")
    return Recorded(ROOT / "tests" / "data" / "distill" / "feature_baselines.npz")


class Case:
    """A baseline with the recorded weights on the maps under ``features/``."""

    def __init__(self, objective, record):
        objective.make_adapters([12], [16])
        self.objective = objective.double()
        self.record = record
        self.student = record["features/student_feat"].requires_grad_()

    def loss(self):
        """The level's loss or its parts."""
        teacher = self.record["features/teacher_feat"]
        return self.objective.level_loss(0, self.student, teacher, self.record.context)


def test_stored_numbers_are_the_recorded_ones(reference):
    stored = Recorded(ROOT / "tests" / "data" / "distill" / "feature_baselines.npz")
    for name in stored.arrays.files:
        assert torch.equal(stored[name], reference[name].to(stored[name].dtype)), name


# --- FitNet -------------------------------------------------------------------------------------


def fitnet(record):
    case = Case(FitNet(), record)
    case.objective.adapters[0].weight.data.copy_(record["fitnet/w/weight"])
    case.objective.adapters[0].bias.data.copy_(record["fitnet/w/bias"])
    return case


def test_fitnet_value(values):
    close(fitnet(values).loss(), values["fitnet/loss"])


def test_fitnet_gradients(reference):
    case = fitnet(reference)
    case.loss().backward()
    close(case.student.grad, reference["fitnet/grad_student"])
    close(case.objective.adapters[0].weight.grad, reference["fitnet/gradw/weight"])
    close(case.objective.adapters[0].bias.grad, reference["fitnet/gradw/bias"])


# --- FGD ----------------------------------------------------------------------------------------


def of_fgd(objective):
    """Our modules and how the record names them."""
    for side, blocks in (("s", objective.student_contexts), ("t", objective.teacher_contexts)):
        yield blocks[0].attention, f"conv_mask_{side}"
        yield blocks[0].transform, f"channel_add_conv_{side}"
    yield objective.adapters[0], "align"


def fgd(record):
    case = Case(FGD(padded=False), record)
    for module, name in of_fgd(case.objective):
        record.load(module, f"fgd/w/{name}")
    return case


def test_fgd_values(values):
    case = fgd(values)
    parts = case.loss()
    close(parts.sum(), values["fgd/loss"])
    for part, factor, name in zip(
        parts, case.objective.factors, ("fg", "bg", "mask", "rela"), strict=True
    ):
        close(part / factor, values[f"fgd/{name}"])


def test_fgd_box_masks(values):
    found = box_masks(*boxes_in_cells(values.context, (7, 9), padded=False), (7, 9))
    close(found[0], values["fgd/mask_fg"])
    close(found[1], values["fgd/mask_bg"])


def test_fgd_attention(reference):
    cells, channels = activation_attention(reference["features/teacher_feat"], 0.5)
    close(cells, reference["fgd/att_S_t"])
    close(channels, reference["fgd/att_C_t"])


def test_fgd_gradients(reference):
    case = fgd(reference)
    case.loss().sum().backward()
    close(case.student.grad, reference["fgd/grad_student"])
    for module, name in of_fgd(case.objective):
        reference.check_gradients(module, f"fgd/gradw/{name}")


def test_padded_and_unpadded_boxes_agree_where_nothing_is_padded(values):
    sizes = [(56, 72)] * 3
    context = context_of(values.boxes, (56, 72), sizes)
    unpadded = boxes_in_cells(context, (7, 9), padded=False)
    padded = boxes_in_cells(context, (7, 9))
    close(padded[0], unpadded[0])
    close(padded[0], boxes_in_cells(values.context, (7, 9))[0])
    assert not torch.allclose(padded[0], boxes_in_cells(values.context, (7, 9), padded=False)[0])


# --- MGD ----------------------------------------------------------------------------------------


def test_mgd_value_and_gradients(reference):
    case = Case(MGD(), reference)
    objective = case.objective
    objective.draw = lambda like: reference["mgd/rand"]
    modules = ((objective.adapters[0], "align"), (objective.generators[0], "generation"))
    for module, name in modules:
        reference.load(module, f"mgd/w/{name}")
    loss = case.loss() * objective.weight
    close(loss, reference["mgd/loss"])
    loss.backward()
    close(case.student.grad, reference["mgd/grad_student"])
    for module, name in modules:
        reference.check_gradients(module, f"mgd/gradw/{name}")


# --- FKD ----------------------------------------------------------------------------------------


def fkd(record):
    objective = FKD(pools=(4,), inner_channels=4)
    objective.make_adapters([8, 8], [8, 8])
    for level in range(2):
        modules = {
            "adapt": objective.adapters[level],
            "channel": objective.channel_adapters[level],
            "spatial": objective.spatial_adapters[level],
            "nl_adapt": objective.non_local_adapters[level],
        }
        for side, blocks in (("s", objective.student_blocks), ("t", objective.teacher_blocks)):
            for theirs, ours in LAYERS.items():
                modules[f"nl_{side}/{theirs}"] = getattr(blocks[level], ours)
        for name, module in modules.items():
            module.weight.data.copy_(record[f"fkd/level{level}/{name}.w"])
            module.bias.data.copy_(record[f"fkd/level{level}/{name}.b"])
    return objective.double()


def test_fkd_values_and_gradients(reference):
    objective = fkd(reference)
    students = [reference[f"fkd/level{level}/student"].requires_grad_() for level in range(2)]
    teachers = [reference[f"fkd/level{level}/teacher"] for level in range(2)]
    parts = sum(
        objective.level_loss(level, student, teacher, None)
        for level, (student, teacher) in enumerate(zip(students, teachers, strict=True))
    )
    close(parts.sum(), reference["fkd/loss"])
    for part, factor, name in zip(
        parts, objective.factors, ("feat", "channel", "spatial", "nonlocal"), strict=True
    ):
        close(part / factor, reference[f"fkd/unweighted_{name}"])
    parts.sum().backward()
    for level, student in enumerate(students):
        close(student.grad, reference[f"fkd/level{level}/grad_student"])


def test_fkd_non_local_blocks(reference):
    objective = fkd(reference)
    for side, blocks, maps in (
        ("s", objective.student_blocks, "student"),
        ("t", objective.teacher_blocks, "teacher"),
    ):
        for level in range(2):
            found = blocks[level](reference[f"fkd/level{level}/{maps}"])
            close(found, reference[f"fkd/level{level}/nl_out_{side}"])


# --- FGFI ---------------------------------------------------------------------------------------


def fgfi(record):
    """The objective of the original's setting, and a batch of twelve by sixteen cells."""
    objective = FGFI(scales=(2, 4, 8), relu=True, legacy=True)
    objective.make_adapters([5], [6])
    convolution = objective.double().adapters[0][0]
    convolution.weight.data.copy_(record["fgfi/w/weight"])
    convolution.bias.data.copy_(record["fgfi/w/bias"])
    boxes = [each[each[:, 2] > 0] for each in record["fgfi/gt_boxes"]]
    return objective, context_of(boxes, (192, 256))


def test_fgfi_mask_and_value(values):
    objective, context = fgfi(values)
    assert torch.equal(objective.masks(context, [(12, 16)])[0], values["fgfi/mask"].bool())
    student, teacher = values["fgfi/student_feat"], values["fgfi/teacher_feat"]
    loss = objective.masked_loss([student], [teacher], context)
    close(loss, values["fgfi/loss_before_weight"])


def test_fgfi_gradients(reference):
    objective, context = fgfi(reference)
    student = reference["fgfi/student_feat"].requires_grad_()
    objective.masked_loss([student], [reference["fgfi/teacher_feat"]], context).backward()
    close(student.grad, reference["fgfi/grad_student"])
    close(objective.adapters[0][0].weight.grad, reference["fgfi/gradw/weight"])
