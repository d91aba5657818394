"""LazyConfig.apply_overrides against recorded behaviour of the real package."""

import json

import pytest
from detectron2.config import LazyConfig
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf


@pytest.fixture(scope="module")
def recorded(reference_dir):
    return json.loads((reference_dir / "detrex" / "runtime.json").read_text())["apply_overrides"]


def changes(before: dict, after: dict, prefix: str = "") -> dict:
    """Values of ``after`` that differ from ``before`` in value or type, by dotted key."""
    found = {}
    for key, new in after.items():
        old = before.get(key, ...)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= changes(old, new, f"{prefix}{key}.")
        elif old != new or type(old) is not type(new):
            found[prefix + key] = new
    return found


def outcome(before: dict, overrides: list[str]) -> dict:
    """What the recording says of a case: the error, or the changed values with their types."""
    cfg = OmegaConf.create(before)
    try:
        result = LazyConfig.apply_overrides(cfg, overrides)
    except Exception as error:
        return {"raises": [kind.__name__ for kind in type(error).__mro__]}
    assert result is cfg
    found = changes(before, OmegaConf.to_container(cfg, resolve=False))
    return {"changed": {k: {"value": v, "type": type(v).__name__} for k, v in found.items()}}


def test_all_recorded_cases(recorded):
    for case in recorded["cases"]:
        expected = case["with_hydra"]
        found = outcome(recorded["config_before"], case["overrides"])
        if "raises" in expected:
            assert expected["raises"] in found["raises"], case["overrides"]
        else:
            assert found == {"changed": expected["changed"]}, case["overrides"]


def test_override_below_a_value_names_the_value():
    cfg = OmegaConf.create({"train": {"max_iter": 3}})
    with pytest.raises(KeyError, match=r"train\.max_iter.*int"):
        LazyConfig.apply_overrides(cfg, ["train.max_iter.x.y=1"])
    assert cfg == {"train": {"max_iter": 3}}


@given(st.lists(st.integers(-(10**9), 10**9), max_size=4), st.floats(-1e6, 1e6))
def test_numbers_and_lists_keep_their_value(numbers, number):
    cfg = OmegaConf.create({"a": {"list": [1, 2]}})
    LazyConfig.apply_overrides(cfg, [f"a.list={numbers}", f"a.x={number!r}"])
    assert cfg.a.list == numbers
    assert cfg.a.x == number
