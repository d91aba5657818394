"""What we import of detectron2 and detrex is public there; what we embed has their signatures."""

import ast
import importlib
import inspect
import json
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import api_facts
import pytest
from api_facts import PACKAGES, facts

ROOT = Path(__file__).resolve().parent.parent.parent
ROOMS = ("configs", "detectors", "engine", "ops", "projects", "tests", "tools")
EMBEDDED = {name: ROOT / "embedded" / name for name in PACKAGES}
CONFIGS = EMBEDDED["detrex"] / "detrex" / "config" / "configs"

# Public in the real packages (test_embedded_names_are_real looks there), but not recorded.
ALSO_REAL = {
    f"{module}.{name}"
    for module, names in {
        # exported here too; the record has them where they are defined, or the other way round
        "detectron2.data": "Metadata ToIterableDataset print_instances_class_histogram",
        "detectron2.data.build": "filter_images_with_only_crowd_annotations"
        " print_instances_class_histogram trivial_batch_collator worker_init_reset_seed",
        "detectron2.data.catalog": "DatasetCatalog MetadataCatalog",
        "detectron2.data.common": "AspectRatioGroupedDataset ToIterableDataset",
        "detectron2.data.datasets.coco": "convert_to_coco_dict",
        "detectron2.engine": "BestCheckpointer CallbackHook DEFAULT_TIMEOUT EvalHook"
        " IterationTimer LRScheduler PeriodicCheckpointer PeriodicWriter",
        "detectron2.evaluation.coco_evaluation": "instances_to_coco_json",
        "detectron2.modeling": "ResNet ResNetBlockBase make_stage",
        "detectron2.modeling.backbone.resnet": "ResNetBlockBase",
        "detectron2.solver": "get_default_optimizer_params",
        "detrex.modeling.backbone": "BasicBlock BasicStem BottleneckBlock ResNet ResNetBlockBase",
        "detrex.modeling.criterion": "BaseCriterion SetCriterion",
        "detrex.modeling.losses": "CrossEntropyLoss DiceLoss FocalLoss GIoULoss L1Loss"
        " cross_entropy l1_loss reduce_loss sigmoid_focal_loss weight_reduce_loss",
        "detrex.modeling.matcher.modified_matcher": "HungarianMatcher",
        "detrex.modeling.neck": "ChannelMapper",
        "detrex.layers.conv": "ConvNorm",
        # what the recorded names do with these beside them
        "detectron2.data.datasets.builtin": "register_all_coco",  # coco_2017_*
        "detectron2.data.datasets": "builtin_meta",  # their metadata
        "detectron2.data.detection_utils": "check_metadata_consistency",
        "detectron2.utils.collect_env": "collect_env_info",  # default_setup logs it
        "detectron2.utils.comm": "create_local_process_group",  # launch makes them
        "detectron2.utils.file_io": "Detectron2Handler",  # detectron2:// addresses
        "detectron2.utils.registry": "locate",  # instantiate finds targets by name with it
        "detrex.config": "try_get_key",
    }.items()
    for name in names.split()
}


@cache
def real_names() -> dict[str, dict[str, Any]]:
    """Recorded entries by every public path: where they are exported and where defined."""
    names = {}
    for path, entry in facts()["api"].items():
        names[path] = entry
        defined_in = entry.get("defined_in", "")
        if defined_in.startswith(PACKAGES) and entry["kind"] in ("class", "function"):
            names[f"{defined_in}.{path.rpartition('.')[2]}"] = entry
    for path, values in facts()["configs"].items():
        module = "detrex.config.configs." + path.removesuffix(".py").replace("/", ".")
        names |= {f"{module}.{value}": {"kind": "value"} for value in values}
    return names


@cache
def real_modules() -> set[str]:
    """Every module that the recorded or allowed names show to exist."""
    modules = set(PACKAGES)
    for name in [*real_names(), *ALSO_REAL]:
        parts = name.split(".")
        modules.update(".".join(parts[:n]) for n in range(1, len(parts)))
    return modules - set(real_names())


def is_real(name: str) -> bool:
    """Whether a dotted name is recorded or allowed, one of their modules, or a member of one."""
    names, modules = real_names(), real_modules()
    parts = name.partition(".__")[0].split(".")  # every module has its dunder names
    name = ".".join(parts)
    prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return name in modules or any(p in names or p in ALSO_REAL for p in prefixes)


# --- what our code imports ----------------------------------------------------------------------


def imported_names(tree: ast.AST) -> set[str]:
    """Names of the two packages that a file imports, reaches by attribute or names as target."""
    bound: dict[str, str] = {}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PACKAGES:
                    names.add(alias.name)
                    local = alias.asname or alias.name.split(".")[0]
                    bound[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and is_theirs(node):
            for alias in node.names:
                names.add(f"{node.module}.{alias.name}")
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    names.update(f"{bound[root]}.{rest}" for root, rest in _attributes(tree) if root in bound)
    return names | set(_static_targets(tree))


def is_theirs(node: ast.ImportFrom) -> bool:
    return node.level == 0 and str(node.module).split(".")[0] in PACKAGES


def _attributes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            yield node.id, ".".join(reversed(parts))


def _static_targets(tree: ast.AST) -> Iterator[str]:
    """Yield the strings in ``LazyCall("a.b")``, ``L("a.b")`` and ``_target_="a.b"``."""
    for node in ast.walk(tree):
        found: list[ast.expr] = []
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("L", "LazyCall"):
                found = node.args[:1]
        elif isinstance(node, ast.keyword) and node.arg == "_target_":
            found = [node.value]
        for value in found:
            if isinstance(value, ast.Constant) and str(value.value).startswith(PACKAGES):
                yield value.value


def our_files() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def used_names() -> dict[str, list[str]]:
    """Names of the two packages that our own code uses, each with the files that use it."""
    used: dict[str, list[str]] = {}
    for path in our_files():
        for name in imported_names(ast.parse(path.read_text())):
            used.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return used


def test_imported_names_are_public_in_the_real_packages() -> None:
    unknown = {name: files for name, files in used_names().items() if not is_real(name)}
    assert unknown == {}


def test_imported_names_exist_in_the_active_runtime() -> None:
    missing = {name: files for name, files in used_names().items() if resolve(name) is None}
    assert missing == {}


def test_common_configs_we_ask_for_exist() -> None:
    asked = {
        node.args[0].value
        for path in our_files()
        if not path.is_relative_to(ROOT / "tests")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "get_config"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    assert asked <= set(facts()["configs"])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import detectron2.utils.comm as comm\ncomm.get_rank()", "detectron2.utils.comm.get_rank"),
        (
            "from detectron2.engine import hooks as h\nh.EvalHook",
            "detectron2.engine.hooks.EvalHook",
        ),
        ("import detrex\ndetrex.layers.MLP(1)", "detrex.layers.MLP"),
        ("from detrex.layers import MLP as M", "detrex.layers.MLP"),
        ("x = L('detrex.layers.MLP')(a=1)", "detrex.layers.MLP"),
        ("x = dict(_target_='detrex.layers.MLP')", "detrex.layers.MLP"),
    ],
)
def test_scanner_sees(source: str, expected: str) -> None:
    assert expected in imported_names(ast.parse(source))


@pytest.mark.parametrize(
    "name", ["detectron2.engine.Trainer", "detrex.nothing", "detrex.layers.Mlp"]
)
def test_scanner_refuses(name: str) -> None:
    assert not is_real(name)


# --- what we embed ------------------------------------------------------------------------------


def resolve(name: str) -> Any:
    """Return the object behind a dotted name in the active runtime, or None.

    An attribute goes before a module of the same name (``detectron2.config.instantiate``).
    """
    parts = name.split(".")
    for length in [*range(len(parts) - 1, 0, -1), len(parts)]:
        module_name = ".".join(parts[:length])
        try:
            target = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and f"{module_name}.".startswith(f"{error.name}."):
                continue
            raise
        for attribute in parts[length:]:
            target = getattr(target, attribute, None)
        if target is not None:
            return target
    return None


def active_names() -> dict[str, tuple[dict[str, Any], Any]]:
    """Recorded names that the active runtime has, each with its entry and the object."""
    found = {name: (entry, resolve(name)) for name, entry in real_names().items()}
    return {name: pair for name, pair in found.items() if pair[1] is not None}


def test_signatures_equal_the_recorded_ones() -> None:
    differences = []
    for name, (entry, target) in active_names().items():
        if isinstance(target, type) and issubclass(target, Enum):
            if {m.name: m.value for m in target} != entry["members"]:
                differences.append(f"{name}: members {list(target)}, expected {entry['members']}")
        elif "signature" in entry:
            found = api_facts.live_signature(target)
            if found != entry["signature"]:
                differences.append(f"{name}{found}, expected {entry['signature']}")
    assert differences == []


def test_methods_are_the_recorded_ones() -> None:
    differences = []
    for name, (entry, target) in active_names().items():
        methods, properties = entry.get("methods", {}), entry.get("properties", [])
        for method, found in own_members(target if isinstance(target, type) else type(target)):
            if isinstance(found, property):
                if method not in properties:
                    differences.append(f"{name}.{method} is no property there")
            elif method not in methods:
                differences.append(f"{name}.{method} does not exist there")
            elif [kind_of(found), signature_of(found)] != methods[method]:
                differences.append(
                    f"{name}.{method}: {kind_of(found)} {signature_of(found)},"
                    f" expected {methods[method]}"
                )
    assert differences == []


def own_members(owner: type) -> Iterator[tuple[str, Any]]:
    """Yield public methods and properties that detectron2's or detrex's own classes define."""
    seen = set()
    for base in owner.__mro__:
        if base.__module__.split(".")[0] in PACKAGES:
            for name, member in vars(base).items():
                wrapped = isinstance(member, (property, staticmethod, classmethod))
                if not name.startswith("_") and name not in seen:
                    seen.add(name)
                    if wrapped or inspect.isfunction(member):
                        yield name, member


def kind_of(member: Any) -> str:
    return (
        member.__class__.__name__ if isinstance(member, (staticmethod, classmethod)) else "method"
    )


def signature_of(member: Any) -> str:
    return api_facts.live_signature(getattr(member, "__func__", member))


def embedded_modules() -> Iterator[tuple[str, Path]]:
    """Yield name and file of every public module under embedded/, config files excepted."""
    for root in EMBEDDED.values():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            names = [part for part in parts if part != "__init__"]
            private = any(name.startswith("_") for name in names)
            if not private and not path.is_relative_to(CONFIGS):
                yield ".".join(names), path


def public_names(tree: ast.Module, exports: bool) -> set[str]:
    """Names that a module defines at its top level and, if ``exports``, passes on."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif exports and isinstance(node, ast.ImportFrom) and (node.level or is_theirs(node)):
            names.update(alias.asname or alias.name for alias in node.names)
    return {name for name in names if not name.startswith("_") and name != "logger"}


def embedded_names() -> set[str]:
    """Return every public module under embedded/, and every name that is public in one."""
    names = set()
    for module, path in embedded_modules():
        tree = ast.parse(path.read_text())
        found = public_names(tree, exports=path.name == "__init__.py")
        names |= {module, *(f"{module}.{name}" for name in found)}
    return names


def test_nothing_is_embedded_that_the_real_packages_lack() -> None:
    assert sorted(name for name in embedded_names() if not is_real(name)) == []


def test_embedded_common_configs_have_the_recorded_names() -> None:
    found = [path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.py")]
    assert sorted(found) == sorted(facts()["configs"])
    for name, recorded in facts()["configs"].items():
        tree = ast.parse((CONFIGS / name).read_text())
        assert public_names(tree, exports=False) <= set(recorded), name
        assert set(recorded) <= public_names(tree, exports=True), name


# --- the record itself --------------------------------------------------------------------------


def is_installed(package: str) -> bool:
    origin = importlib.import_module(package).__file__
    return not Path(str(origin)).is_relative_to(ROOT / "embedded")


@pytest.mark.skipif(
    not all(map(is_installed, PACKAGES)), reason="detectron2 and detrex are not both installed"
)
def test_embedded_names_are_real() -> None:
    assert sorted(name for name in embedded_names() | ALSO_REAL if resolve(name) is None) == []


def test_record_agrees_with_the_reference(reference_dir: Path) -> None:
    reference = json.loads((reference_dir / "detrex" / "api.json").read_text())
    assert api_facts.condense(reference) == facts()
