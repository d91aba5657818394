"""The cells of a study, for detectors of either size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from projects.detr_distill.configs.common.objectives import d3etr, detrdistill, mixed_matching
from projects.detr_distill.fgd import FGD
from projects.detr_distill.fgfi import FGFI
from projects.detr_distill.fitnet import FitNet
from projects.detr_distill.fkd import FKD
from projects.detr_distill.mgd import MGD
from projects.ks_detr.encoder import share_knowledge

from .cells import Cell
from .training import distillation, training

BASELINES, KS, SMCA, DISTILLED, COMBINED = (
    "Detectors",
    "KS-DETR",
    "SMCA",
    "Distillation",
    "Combinations",
)
PLACE = "memory"  # where Conditional DETR's features are distilled


@dataclass(frozen=True)
class Scale:
    """What the same cells are built with on different machines.

    Attributes:
        model: gives a detector's model config, by its family.
        iterations: of a training.
        teacher_iterations: of a teacher's.
        teacher_model: gives a teacher's model config, as `model`.
        settings: of every training, see :func:`~projects.study.training.training`.
    """

    model: Callable[[str], DictConfig]
    teacher_model: Callable[[str], DictConfig]
    iterations: int
    teacher_iterations: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def train(self, model: DictConfig, **settings: Any) -> DictConfig:
        """The training of a model."""
        return training(model, self.iterations, **{**self.settings, **settings})

    def distil(self, student: DictConfig, objectives: Sequence[Any]) -> DictConfig:
        """The training of a student under a Conditional-DETR teacher."""
        return distillation(
            student,
            self.teacher_model("conditional_detr"),
            list(objectives),
            iterations=self.iterations,
            **self.settings,
        )


def knowing(model: DictConfig, **options: Any) -> DictConfig:
    """Give a model's encoder teacher branches."""
    encoder = model.transformer.encoder
    model.transformer.encoder = L(share_knowledge)(encoder=encoder, **options)
    return model


def _plain(scale: Scale, family: str) -> DictConfig:
    return scale.train(scale.model(family))


def _modulated(scale: Scale, family: str, **options: Any) -> DictConfig:
    """An SMCA detector with another modulation."""
    model = scale.model(family)
    model.transformer.decoder.modulation.update(options)
    return scale.train(model)


def _student(scale: Scale, objectives: Sequence[Any]) -> DictConfig:
    return scale.distil(scale.model("conditional_detr"), objectives)


# --- the groups ---------------------------------------------------------------------------------


def detectors(scale: Scale) -> list[Cell]:
    """The families, each with the faster one that it is compared with."""
    titles = {
        "detr": "DETR",
        "conditional_detr": "Conditional-DETR",
        "dab_detr": "DAB-DETR",
        "dn_detr": "DN-DETR",
        "deformable_detr": "Deformable-DETR",
        "adamixer": "AdaMixer",
    }
    claims = {
        "detr": "34.8 (SMCA's Table 2, 50 epochs)",
        "conditional_detr": "41.3 (KS-DETR's Table 1, 50 epochs)",
        "dab_detr": "43.3 (KS-DETR's Table 1, 50 epochs)",
        "dn_detr": "44.7 (KS-DETR's Table 1, 50 epochs)",
        "deformable_detr": "44.1 (KS-DETR's Table 1, 50 epochs)",
        "adamixer": "42.3 (DETRDistill's Table 3, 12 epochs)",
    }
    return [
        Cell(
            name=family,
            title=title,
            group=BASELINES,
            build=partial(_plain, scale, family),
            baseline=None if family == "detr" else "detr",
            claim=claims[family],
        )
        for family, title in titles.items()
    ]


def knowledge_sharing(scale: Scale) -> list[Cell]:
    """Triple and dual attention, both kinds of teacher features, dense and deformable."""

    def cell(
        name: str, title: str, claim: str, family: str, baseline: str = "", **options: Any
    ) -> Cell:
        branches = ["student", *options.get("branches", ("share_v", "share_a"))]

        def build() -> DictConfig:
            model = knowing(scale.model(family), **options)
            return scale.train(model, branches=branches)

        return Cell(f"ks_{name}", title, KS, build, baseline=baseline or family, claim=claim)

    dual = "on DAB-DETR-R101, Table 2"
    return [
        cell(
            "conditional_detr",
            "KS-Conditional-DETR, triple",
            "+0.8 (Table 1)",
            "conditional_detr",
        ),
        cell(
            "conditional_detr_share_v",
            "dual, V shared",
            f"+1.0 ({dual})",
            "conditional_detr",
            branches=["share_v"],
        ),
        cell(
            "conditional_detr_share_a",
            "dual, A shared",
            f"+0.8 ({dual})",
            "conditional_detr",
            branches=["share_a"],
        ),
        cell(
            "conditional_detr_mark",
            "triple, mark instead of sMLP",
            "-0.2 (dual on DN-DETR, Table 3)",
            "conditional_detr",
            baseline="ks_conditional_detr",
            teacher_features="mark",
        ),
        cell("dab_detr", "KS-DAB-DETR, triple", "+0.6 (Table 1)", "dab_detr"),
        cell("dn_detr", "KS-DN-DETR, triple", "+0.5 (Table 1)", "dn_detr"),
        cell(
            "deformable_detr",
            "KS-Deformable-DETR, triple",
            "+1.1 (Table 1, 12 epochs)",
            "deformable_detr",
        ),
    ]


def gaussians(scale: Scale) -> list[Cell]:
    """SMCA's modulations on one map, and its scale-selection attention on three."""
    family = "smca_single_scale"
    base = {"head_shared": False, "scales": "independent"}
    modes: dict[str, tuple[str, dict[str, Any], float]] = {
        "head_shared": ("one Gaussian for all heads", {"head_shared": True}, 40.2),
        "fixed": ("fixed scales", {"scales": "fixed"}, 38.5),
        "single": ("one scale", {"scales": "single"}, 40.4),
        "independent": ("height and width", {}, 41.0),
    }
    cells = [
        Cell(
            name=f"smca_{name}",
            title=f"SMCA single-scale, {title}",
            group=SMCA,
            build=partial(_modulated, scale, family, **{**base, **change}),
            baseline="detr",
            claim=f"+{ap - 34.8:.1f} (Table 2, 50 epochs)",
        )
        for name, (title, change, ap) in modes.items()
    ]
    selections = {
        "smca": ("SMCA multi-scale", True, "smca_independent", "+2.7 (Table 3)"),
        "smca_without_selection": ("without scale selection", False, "smca", "-1.1 (Table 3)"),
    }
    return cells + [
        Cell(
            name=name,
            title=title,
            group=SMCA,
            build=partial(_modulated, scale, "smca", level_selection=selects),
            baseline=baseline,
            claim=claim,
        )
        for name, (title, selects, baseline, claim) in selections.items()
    ]


def teachers(scale: Scale) -> list[Cell]:
    """What the students learn from: the same detector, trained for longer."""

    def build(sharing: bool) -> DictConfig:
        model = scale.teacher_model("conditional_detr")
        model = knowing(model) if sharing else model
        return training(model, scale.teacher_iterations, **scale.settings)

    return [
        Cell("teacher", "Conditional-DETR, the teacher", DISTILLED, lambda: build(False)),
        Cell(
            "ks_teacher",
            "KS-Conditional-DETR, a teacher",
            COMBINED,
            lambda: build(True),
            baseline="teacher",
        ),
    ]


def distilled(scale: Scale) -> list[Cell]:
    """Every objective alone and together, on Conditional DETR."""
    logits, features, assignment = detrdistill(PLACE)
    table = "Conditional-DETR, Table 3, 50 epochs"
    ablation = "AdaMixer, Table 5, 12 epochs"
    others = "AdaMixer, Table 1, 12 epochs"
    methods = {
        "fitnet": ("FitNet", [L(FitNet)(place=PLACE)], f"+0.3 ({table})"),
        "fgd": ("FGD", [L(FGD)(place=PLACE)], f"-0.3 ({table})"),
        "mgd": ("MGD", [L(MGD)(place=PLACE)], f"+0.5 ({table})"),
        "fkd": ("FKD", [L(FKD)(place=PLACE)], f"-0.1 ({others})"),
        "fgfi": (
            "FGFI",
            [L(FGFI)(place=PLACE, start_iteration=scale.iterations // 10)],
            f"+0.3 ({others})",
        ),
        "logits": ("LD", [logits], f"+1.4 ({ablation})"),
        "target_aware": ("FD", [features], f"+1.2 ({ablation})"),
        "query_prior": ("AD", [assignment], f"+0.6 ({ablation})"),
        "detrdistill": ("DETRDistill", detrdistill(PLACE), f"+2.2 ({table})"),
        "adaptive": ("D3ETR, adaptive matching", d3etr("adaptive"), ""),
        "fixed": ("D3ETR, fixed matching", mixed_matching()[3:], ""),
        "d3etr": ("D3ETR", mixed_matching(), "+7.8 (12 epochs), +2.4 (50 epochs)"),
        "detrdistill_d3etr": ("DETRDistill + D3ETR", [logits, features, *mixed_matching()], ""),
    }
    return [
        Cell(
            name=name,
            title=title,
            group=DISTILLED,
            build=partial(_student, scale, objectives),
            baseline="conditional_detr",
            teacher="teacher",
            claim=claim,
        )
        for name, (title, objectives, claim) in methods.items()
    ]


def combined(scale: Scale) -> list[Cell]:
    """What no paper has."""
    student = "conditional_detr"
    return [
        Cell(
            "ks_smca",
            "KS-DETR's encoder, SMCA's decoder",
            COMBINED,
            lambda: scale.train(knowing(scale.model("smca_single_scale"))),
            baseline="smca_independent",
        ),
        Cell(
            "detrdistill_ks",
            "KS student, DETRDistill",
            COMBINED,
            lambda: scale.distil(knowing(scale.model(student)), detrdistill(PLACE)),
            baseline="detrdistill",
            teacher="teacher",
        ),
        Cell(
            "detrdistill_smca",
            "SMCA student of a Conditional-DETR teacher, DETRDistill",
            COMBINED,
            lambda: scale.distil(scale.model("smca_single_scale"), detrdistill(PLACE)),
            baseline="smca_independent",
            teacher="teacher",
        ),
        Cell(
            "detrdistill_of_ks",
            "student of a KS teacher, DETRDistill",
            COMBINED,
            lambda: scale.distil(scale.model(student), detrdistill(PLACE)),
            baseline="detrdistill",
            teacher="ks_teacher",
        ),
    ]


def backbone(scale: Scale) -> Cell:
    """What gives all others their backbone: the detector that learns soonest."""

    def build() -> DictConfig:
        model = scale.model("deformable_detr")
        config = training(model, scale.teacher_iterations, **scale.settings)
        config.dataloader.train.dataset.names = "shapes_backbone_train"
        config.dataloader.test.dataset.names = "shapes_backbone_val"
        return config

    return Cell("backbone", "Deformable-DETR", "", build)


def all_cells(scale: Scale) -> tuple[Cell, ...]:
    """The whole matrix."""
    plain, sharing = teachers(scale)
    return (
        *detectors(scale),
        *knowledge_sharing(scale),
        *gaussians(scale),
        plain,
        *distilled(scale),
        sharing,
        *combined(scale),
    )
