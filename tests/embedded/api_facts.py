"""The recorded public API of detectron2 and detrex (tests/data/api.json) and how to read it."""

import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "data" / "api.json"
PACKAGES = ("detectron2", "detrex")


@cache
def facts() -> dict[str, Any]:
    """Return versions, api (name -> kind, signature, methods, ...), names in common configs."""
    return json.loads(DATA.read_text())


def condense(reference: dict[str, Any]) -> dict[str, Any]:
    """Keep of the full reference what these tests compare: no annotations, no other packages."""
    api = {
        name: _condense_entry(entry)
        for name, entry in reference["api"].items()
        if name.startswith(PACKAGES)
    }
    configs = {
        path: sorted([*config["values"], *config["functions"]])
        if "functions" in config
        else sorted(config["values"])
        for path, config in reference["common_configs"].items()
    }
    versions = {name: reference["versions"][name] for name in PACKAGES}
    return {"versions": versions, "api": api, "configs": configs}


def _condense_entry(entry: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {"kind": entry["kind"].split()[0]}
    if "defined_in" in entry:
        kept["defined_in"] = entry["defined_in"]
    if entry.get("signature"):
        kept["signature"] = canonical(entry["signature"])
    if "members" in entry:
        kept["members"] = entry["members"]
    if "properties" in entry:
        kept["properties"] = entry["properties"]
    if "methods" in entry:
        kept["methods"] = {
            name: [method["kind"], canonical(method["signature"])]
            for name, method in entry["methods"].items()
        }
    return kept


def canonical(signature: str) -> str:
    """Write a signature without annotations, line breaks and memory addresses."""
    text = re.sub(r" at 0x\w+", "", re.sub(r"\s+", " ", signature))
    parameters = []
    for parameter in _split(_between_parentheses(text), ","):
        name, *default = _split(parameter, "=")
        name = name.split(":")[0].strip()
        if name:
            parameters.append("=".join([name, *(part.strip() for part in default)]))
    return f"({', '.join(parameters)})"


def live_signature(target: Any) -> str:
    """Signature of an object of the active runtime, in canonical form."""
    signature = inspect.signature(target)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return canonical(str(inspect.Signature(parameters)))


def _between_parentheses(text: str) -> str:
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[1:position]
    raise ValueError(f"not a signature: {text}")


def _split(text: str, separator: str) -> list[str]:
    """Split at the separators that stand outside all brackets."""
    depth, parts = 0, [""]
    for character in text:
        depth += (character in "([{<") - (character in ")]}>")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
