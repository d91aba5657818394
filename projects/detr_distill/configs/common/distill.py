"""A student under a teacher, whose checkpoint ``teacher.init_checkpoint=FILE`` names."""

from detectron2.config import LazyCall as L

from projects.detr_distill.distiller import Distiller
from projects.detr_distill.teacher import load_teacher

teacher = {"init_checkpoint": "", "dtype": "float32"}


def distill(student, detector, objectives):
    """Put a student's config, a teacher's and the objectives together."""
    return L(Distiller)(
        student=student,
        teacher=L(load_teacher)(
            detector=detector,
            init_checkpoint="${teacher.init_checkpoint}",
            dtype="${teacher.dtype}",
        ),
        objectives=objectives,
    )
