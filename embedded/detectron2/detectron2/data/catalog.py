"""Global registries of data sets and of what is known about them."""

import builtins
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

__all__ = ["DatasetCatalog", "Metadata", "MetadataCatalog"]


class _DatasetCatalog(UserDict):
    """Maps the name of a data set to a function that loads it."""

    def register(self, name: str, func: Callable[[], list[dict]]) -> None:
        """Add a data set; AssertionError if the name is taken.

        Args:
            name: such as "coco_2017_train".
            func: returns the records of the data set, the same ones at each call.
        """
        assert callable(func), f"data set {name!r} needs a function, found {func!r}"
        assert name not in self, f"data set {name!r} is registered already"
        self[name] = func

    def get(self, name: str) -> list[dict]:  # type: ignore[override]
        """Load a data set; KeyError if the name is unknown."""
        if name not in self:
            raise KeyError(f"data set {name!r} is not registered, known are: {', '.join(self)}")
        return self[name]()

    def list(self) -> list[str]:
        """Return the names of all data sets."""
        return builtins.list(self)

    def remove(self, name: str) -> None:
        """Forget a data set; KeyError if the name is unknown."""
        del self[name]

    def __repr__(self) -> str:
        return f"DatasetCatalog({', '.join(self)})"


class Metadata(SimpleNamespace):
    """Attributes describing one data set; once set, an attribute can only be set to an equal value.

    Reading an attribute that was never set is an AttributeError.
    """

    name: str = "N/A"

    def __getattr__(self, key: str) -> Any:
        """Explain which attribute is missing; only called for those."""
        known = ", ".join(self.__dict__) or "nothing"
        raise AttributeError(f"metadata of {self.name!r} has no {key!r}, it has: {known}")

    def __setattr__(self, key: str, val: Any) -> None:
        """Set an attribute; AssertionError if it has another value already."""
        if key in self.__dict__:
            old = self.__dict__[key]
            assert old == val, (
                f"metadata {key!r} of {self.name!r} is {old!r} and cannot become {val!r}"
            )
        else:
            super().__setattr__(key, val)

    def as_dict(self) -> dict[str, Any]:
        """Return a copy of all attributes."""
        return dict(self.__dict__)

    def set(self, **kwargs: Any) -> "Metadata":
        """Set several attributes and return the metadata itself."""
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """Return an attribute, or ``default`` where there is none."""
        return getattr(self, key, default)


class _MetadataCatalog(UserDict):
    """Maps the name of a data set to its :class:`Metadata`."""

    def get(self, name: str) -> Metadata:  # type: ignore[override]
        """Return the one metadata object of this name, a new empty one at first."""
        assert name, "metadata needs a name"
        return self.data.setdefault(name, Metadata(name=name))

    def list(self) -> list[str]:
        """Return the names that have metadata."""
        return builtins.list(self)

    def remove(self, name: str) -> None:
        """Forget the metadata of a data set; KeyError if the name is unknown."""
        del self[name]

    def __repr__(self) -> str:
        return f"MetadataCatalog({', '.join(self)})"


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()
