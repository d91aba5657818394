"""What a yaml config may hold before detectron2, whose reader obeys every tag, gets to see it."""

import yaml

from .errors import UserError

__all__ = ["check_tags"]

_STANDARD = "tag:yaml.org,2002:"
_PYTHON = f"{_STANDARD}python/"
_NAME = f"{_PYTHON}name:"
"""Of a class or function, which is only imported."""
_ADMITTED = {
    "!",  # no particular one
    *filter(None, yaml.SafeLoader.yaml_constructors),  # of plain data
    f"{_PYTHON}tuple",
    f"{_PYTHON}object:detectron2.layers.shape_spec.ShapeSpec",  # in the configs of some necks
}


def check_tags(path: str) -> None:
    """Refuse a yaml file with a tag that no saved config holds; constructs and imports nothing.

    Other files pass, and so do those that are no yaml: their reader will tell.

    Raises:
        UserError: names the file, the line and the tag.
    """
    if not path.endswith((".yaml", ".yml")):
        return
    with open(path, encoding="utf-8") as file:
        try:
            for event in yaml.parse(file, Loader=yaml.SafeLoader):
                _check(path, event)
        except (yaml.YAMLError, UnicodeDecodeError):
            return


def _check(path: str, event: yaml.Event) -> None:
    tag = getattr(event, "tag", None)
    if tag is None or tag in _ADMITTED or tag.startswith(_NAME):
        return
    shown = tag.replace(_STANDARD, "!!", 1)
    raise UserError(
        f"config {path}, line {event.start_mark.line + 1}: the tag {shown} is refused, "
        "expected plain data, calls and names"
    )
