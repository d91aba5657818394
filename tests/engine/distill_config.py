"""A narrow student and a teacher of quickstart size on the tiny data; queries need an adapter."""

from ...projects.baselines.configs.models.conditional_detr_quickstart import model as _student
from ...projects.baselines.configs.models.conditional_detr_quickstart import model as _teacher
from ...projects.detr_distill.configs.common.distill import distill, teacher  # noqa: F401
from ...projects.detr_distill.configs.common.objectives import detrdistill
from .tiny_config import dataloader, lr_multiplier, optimizer, train  # noqa: F401

_teacher.num_classes = 3
_student.num_classes = 3
_student.embed_dim = 32
_student.position_embedding.num_pos_feats = 16
_student.transformer.encoder.layer.attention.embed_dim = 32
_student.transformer.encoder.num_layers = 1
_student.transformer.decoder.update(embed_dim=32, num_layers=2)

model = distill(_student, _teacher, detrdistill())
