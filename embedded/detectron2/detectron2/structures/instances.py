"""A table of per-instance fields that belong to one image."""

from collections.abc import Iterator
from typing import Any

import torch


class Instances:
    """Fields of equal length (boxes, classes, scores, ...) describing the objects of one image.

    Fields are read and written as attributes. Names with a leading underscore are ordinary
    attributes, not fields.
    """

    def __init__(self, image_size: tuple[int, int], **kwargs: Any):
        """Start with ``kwargs`` as fields, for an image of size (height, width)."""
        self._image_size = image_size
        self._fields: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self._image_size

    def __setattr__(self, name: str, val: Any) -> None:
        """Store a field, or a private attribute if the name starts with an underscore."""
        if name.startswith("_"):
            object.__setattr__(self, name, val)
        else:
            self.set(name, val)

    def __getattr__(self, name: str) -> Any:
        """Return a field; AttributeError if there is none of that name."""
        # Through __dict__, because a copy or unpickled object has no _fields yet.
        fields = self.__dict__.get("_fields", {})
        if name not in fields:
            raise AttributeError(f"no field {name!r} in these Instances, found {sorted(fields)}")
        return fields[name]

    def set(self, name: str, value: Any) -> None:
        """Store a field; its length must equal that of the fields already there."""
        if self._fields:
            assert len(value) == len(self), (
                f"field {name!r} has length {len(value)}, expected {len(self)} as in other fields"
            )
        else:
            len(value)  # a field must have a length
        self._fields[name] = value

    def has(self, name: str) -> bool:
        """Say whether a field exists."""
        return name in self._fields

    def remove(self, name: str) -> None:
        """Drop a field; KeyError if there is none of that name."""
        del self._fields[name]

    def get(self, name: str) -> Any:
        """Return a field; KeyError if there is none of that name."""
        return self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        """Return the mapping from field names to values itself, not a copy."""
        return self._fields

    def to(self, *args: Any, **kwargs: Any) -> "Instances":
        """Return new Instances with ``to`` called on every field that has it."""
        return self._map(lambda field: field.to(*args, **kwargs) if hasattr(field, "to") else field)

    def __getitem__(self, item: int | slice | torch.Tensor) -> "Instances":
        """Select instances in every field; a single index gives Instances of length one."""
        if type(item) is int:
            if not -len(self) <= item < len(self):
                raise IndexError(f"instance {item} asked for, but there are {len(self)}")
            start = item % len(self)
            item = slice(start, start + 1)
        return self._map(lambda field: field[item])

    def _map(self, function: Any) -> "Instances":
        fields = {name: function(field) for name, field in self._fields.items()}
        mapped = Instances(self._image_size)
        for name, field in fields.items():
            mapped.set(name, field)
        return mapped

    def __len__(self) -> int:
        for field in self._fields.values():
            return len(field)
        raise NotImplementedError("Instances without fields have no length")

    def __iter__(self) -> Iterator[Any]:
        """Refuse: looping over instances is nearly always a mistake, index them instead."""
        raise NotImplementedError("Instances cannot be iterated, index them instead")

    @staticmethod
    def cat(instance_lists: list["Instances"]) -> "Instances":
        """Join Instances of one image size and with the same fields.

        Raises:
            AssertionError: for an empty list, other objects, or different image sizes.
            ValueError: for a field of a type that cannot be joined.
        """
        assert len(instance_lists) > 0, "nothing to join: the list of Instances is empty"
        assert all(isinstance(i, Instances) for i in instance_lists), "expected Instances only"
        if len(instance_lists) == 1:
            return instance_lists[0]
        sizes = [i.image_size for i in instance_lists]
        assert all(size == sizes[0] for size in sizes), f"different image sizes: {sizes}"
        joined = Instances(sizes[0])
        for name in instance_lists[0].get_fields():
            joined.set(name, _join(name, [i.get(name) for i in instance_lists]))
        return joined

    def __repr__(self) -> str:
        height, width = self._image_size
        fields = ", ".join(f"{name}: {field}" for name, field in self._fields.items())
        return (
            f"{type(self).__name__}(num_instances={len(self)}, image_height={height}, "
            f"image_width={width}, fields=[{fields}])"
        )


def _join(name: str, values: list[Any]) -> Any:
    kind = type(values[0])
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    if isinstance(values[0], list):
        return [element for value in values for element in value]
    if hasattr(kind, "cat"):
        return kind.cat(values)
    raise ValueError(f"field {name!r} of type {kind.__name__} cannot be joined")
