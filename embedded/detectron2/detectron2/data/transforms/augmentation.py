"""The machinery of augmentations: policies that look at an input and choose a transform for it."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from fvcore.transforms.transform import Transform, TransformList

__all__ = [
    "AugInput",
    "Augmentation",
    "AugmentationList",
    "apply_augmentations",
    "apply_transform_gens",
]


class Augmentation:
    """A policy, often random, that chooses a deterministic transform.

    A subclass implements :meth:`get_transform`. If that takes one parameter, it is given the image;
    otherwise the attributes of the input that are named like its parameters.
    """

    def get_transform(self, *args: Any) -> Transform:
        """Choose a transform for the given image (or other attributes of the input)."""
        raise NotImplementedError(f"{type(self).__name__} does not implement get_transform")

    def __call__(self, aug_input: Any) -> Transform:
        """Choose a transform, apply it to ``aug_input`` in place and return it."""
        transform = self.get_transform(*self._arguments_from(aug_input))
        assert isinstance(transform, Transform), (
            f"{type(self).__name__}.get_transform must return a Transform, found {type(transform)}"
        )
        aug_input.transform(transform)
        return transform

    def _arguments_from(self, aug_input: Any) -> list[Any]:
        policy: Any = type(self)
        names = _parameters_of(policy)
        if len(names) == 1:
            return [aug_input.image]
        missing = [name for name in names if not hasattr(aug_input, name)]
        if missing:
            raise AttributeError(
                f"{type(self).__name__} needs {missing}, not found in {type(aug_input).__name__}"
            )
        return [getattr(aug_input, name) for name in names]

    def __repr__(self) -> str:
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(type(self)).parameters.items()
        }
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name, default in defaults.items()
            if hasattr(self, name) and getattr(self, name) != default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"


@functools.cache  # every image asks
def _parameters_of(policy: type[Augmentation]) -> list[str]:
    """The names of what ``get_transform`` takes."""
    parameters = list(inspect.signature(policy.get_transform).parameters.values())
    if inspect.isfunction(inspect.getattr_static(policy, "get_transform")):
        parameters = parameters[1:]  # without "self"
    if len(parameters) > 1 and any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise TypeError(
            f"{policy.__name__}.get_transform takes any number of arguments, "
            "so its class must implement __call__ too"
        )
    return [parameter.name for parameter in parameters]


class _Always(Augmentation):
    """The policy of one fixed transform."""

    def __init__(self, transform: Transform):
        self.transform = transform

    def get_transform(self, *args: Any) -> Transform:
        return self.transform

    def _arguments_from(self, aug_input: Any) -> list[Any]:
        return []

    def __repr__(self) -> str:
        return repr(self.transform)


def _as_augmentation(augmentation: Augmentation | Transform) -> Augmentation:
    if isinstance(augmentation, Transform):
        return _Always(augmentation)
    assert isinstance(augmentation, Augmentation), (
        f"expected an Augmentation or a Transform, found {augmentation!r}"
    )
    return augmentation


class AugmentationList(Augmentation):
    """Augmentations applied one after the other; each one sees the result of those before."""

    def __init__(self, augs: Sequence[Augmentation | Transform]):
        """Take augmentations and fixed transforms, mixed."""
        self.augs = [_as_augmentation(aug) for aug in augs]

    def __call__(self, aug_input: Any) -> TransformList:
        """Apply all to ``aug_input`` in place and return the transforms that were chosen."""
        return TransformList([aug(aug_input) for aug in self.augs])

    def __repr__(self) -> str:
        return f"AugmentationList{self.augs!r}"


class AugInput:
    """An image, with its boxes and label map if there are any, to be transformed together."""

    def __init__(
        self,
        image: np.ndarray,
        *,
        boxes: np.ndarray | None = None,
        sem_seg: np.ndarray | None = None,
    ):
        """Hold the data to transform.

        Args:
            image: (H, W) or (H, W, C), uint8 or floating point.
            boxes: absolute xyxy, shape (N, 4).
            sem_seg: label of every pixel, shape (H, W).
        """
        assert isinstance(image, np.ndarray), f"expected an array as image, found {type(image)}"
        assert image.ndim in (2, 3), f"an image has 2 or 3 dimensions, found shape {image.shape}"
        self.image = image
        self.boxes = boxes
        self.sem_seg = sem_seg

    def transform(self, tfm: Transform) -> None:
        """Replace all attributes by their transformed versions."""
        kinds = {"image": "image", "boxes": "box", "sem_seg": "segmentation"}
        for attribute, kind in kinds.items():
            data = getattr(self, attribute)
            if data is not None:
                setattr(self, attribute, getattr(tfm, f"apply_{kind}")(data))

    def apply_augmentations(
        self, augmentations: Sequence[Augmentation | Transform]
    ) -> TransformList:
        """Apply augmentations in place and return the transforms that were chosen."""
        return AugmentationList(augmentations)(self)


def apply_augmentations(
    augmentations: Sequence[Augmentation | Transform], inputs: np.ndarray | AugInput
) -> tuple[np.ndarray | AugInput, TransformList]:
    """Apply augmentations to an image or an AugInput; return the result and the transforms."""
    if isinstance(inputs, np.ndarray):
        aug_input = AugInput(inputs)
        transforms = aug_input.apply_augmentations(augmentations)
        return aug_input.image, transforms
    return inputs, inputs.apply_augmentations(augmentations)


apply_transform_gens = apply_augmentations
