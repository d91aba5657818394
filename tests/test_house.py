"""The project around the code: installation, commands, rooms, dependencies, documents."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TINY_EXTENSION = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""
HAS_HEADERS = shutil.which("c++") and Path(sys.base_prefix, "include").is_dir()


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end with an environment changed by the keywords."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# --- rooms --------------------------------------------------------------------------------------

# What a room may import of the others. detectron2 and detrex count as neither.
MAY_IMPORT = {
    "ops": set(),
    "embedded": set(),
    "detectors": {"ops"},
    "engine": set(),
    "configs": {"ops", "detectors", "engine"},
    "projects": {"ops", "embedded", "detectors", "engine", "configs"},
    "tools": {"ops", "embedded", "detectors", "engine", "projects", "configs"},
}


def imported_roots(path: Path) -> Iterator[str]:
    """Yield the first part of each absolute import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]


def python_files(*rooms: str) -> Iterator[Path]:
    """Yield the Python files of some rooms, or of all."""
    for room in rooms or MAY_IMPORT:
        yield from sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_never_run_upwards(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room}
    wrong = {
        (str(path.relative_to(ROOT)), name)
        for path in python_files(room)
        for name in imported_roots(path)
        if name in MAY_IMPORT and name not in allowed
    }
    assert wrong == set()


def test_only_projects_activates_the_embedded_packages() -> None:
    users = {
        str(path.relative_to(ROOT)) for path in python_files() if "embedded" in imported_roots(path)
    }
    assert users <= {"projects/__init__.py"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_source_is_ignored_by_git() -> None:
    sources = [f"{room}/**.{ending}" for room in MAY_IMPORT for ending in ("py", "cpp", "cu", "h")]
    command = ("git", "ls-files", "--others", "--ignored", "--exclude-standard", *sources)
    assert run(*command, cwd=ROOT).stdout == ""


# --- dependencies -------------------------------------------------------------------------------


def requirements() -> dict[str, Requirement]:
    """Return the declared run-time requirements by canonical name."""
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)
    assert block
    found = [Requirement(line) for line in re.findall(r'^ *"([^"]+)"', block[1], re.M)]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_requirements_have_a_bound_and_a_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    lines = [line for line in text.splitlines() if re.match(r'^ {4}"[A-Za-z0-9-]+[><=]', line)]
    assert len(lines) > len(requirements())
    assert [line for line in lines if not re.search(r'>=[\d.post]+[^"]*", *# \w', line)] == []


def test_readme_lists_the_requirements() -> None:
    table = re.findall(r"^\| ([\w-]+) \| ([\d.post]+) \|", (ROOT / "README.md").read_text(), re.M)
    declared = [(r.name, str(r.specifier).removeprefix(">=")) for r in requirements().values()]
    assert table == declared


def test_what_we_import_is_what_we_require() -> None:
    imported = {name for path in python_files() for name in imported_roots(path)}
    if any("torch.utils.tensorboard" in path.read_text() for path in python_files()):
        imported.add("tensorboard")  # which torch imports for us
    # torch's CUDA builds bring triton with them; without it the operators do without. A benchmark
    # compares with transformers where they are installed
    optional = {"triton", "transformers"}
    ours = {*MAY_IMPORT, "detectron2", "detrex", *optional, *sys.stdlib_module_names}
    distributions = packages_distributions()
    required = {canonicalize_name(distributions.get(name, [name])[0]) for name in imported - ours}
    assert required == set(requirements())


# --- the environment ----------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the files that an installation reads."""
    folder = tmp_path / "checkout"
    for name in ("tools", "ops"):
        (folder / name).mkdir(parents=True)
    files = ("pyproject.toml", "setup.py", "Makefile", "tools/setup_env.py", "ops/_sources.py")
    for name in files:
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """Return an environment whose Python only notes what pip would be asked, and has torch 9.9."""
    folder = tmp_path / "env"
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    log = folder / "pip.log"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
    *setup_env.py*) exec {sys.executable} "$@" ;;
    *" install "*) echo "$*" >> {log} ;;
    *torch*) cat {folder}/torch 2>/dev/null ;;
esac
"""
    )
    python.chmod(0o755)
    log.touch()
    (folder / "torch").write_text("9.9\n")
    return folder


def installs(checkout: Path, environment: Path, *options: str, **variables: str) -> list[str]:
    """Run ``make env`` and return what pip was asked to install."""
    log = environment / "pip.log"
    log.write_text("")
    result = run("make", "env", f"VENV={environment}", *options, cwd=checkout, **variables)
    assert result.returncode == 0, result.stderr
    return [line.split("--no-input ")[1] for line in log.read_text().splitlines()]


def test_environment_is_prepared_once(checkout: Path, environment: Path) -> None:
    first = installs(checkout, environment)
    assert len(first) == 2
    assert first[0].startswith("setuptools")
    assert f"--editable {checkout}[dev]" in first[1]
    assert "--no-build-isolation" in first[1]
    assert (environment / "constraints.txt").read_text() == "torch==9.9\n"
    assert installs(checkout, environment) == []


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.py", "ops/csrc/new.h"])
def test_environment_follows_the_sources(checkout: Path, environment: Path, name: str) -> None:
    installs(checkout, environment)
    path = checkout / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n# changed\n")
    assert len(installs(checkout, environment)) == 2
    assert installs(checkout, environment) == []


def test_torch_comes_first_and_only_if_it_must(checkout: Path, environment: Path) -> None:
    assert not any(line.startswith("torch") for line in installs(checkout, environment))
    chosen = installs(checkout, environment, "TORCH=torch==2.9.1 --index-url U")
    assert chosen[0] == "torch==2.9.1 --index-url U"
    assert installs(checkout, environment) == []  # asking for nothing keeps the choice
    assert installs(checkout, environment, "TORCH=torch==2.9.1 --index-url U") == []
    (environment / "torch").unlink()
    (environment / ".detr-methods").unlink()
    assert re.match(r"torch==2\.\d+\.\d+$", installs(checkout, environment)[0])


def test_a_new_compiler_is_noticed(checkout: Path, environment: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "my-c++"
    installs(checkout, environment, CXX=str(compiler))
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert len(installs(checkout, environment, CXX=str(compiler))) == 2


def test_missing_compiler_is_one_warning(checkout: Path, environment: Path) -> None:
    (checkout / "ops" / "csrc").mkdir(parents=True)
    (checkout / "ops" / "csrc" / "tiny.cpp").write_text(TINY_EXTENSION)
    result = run("make", "env", f"VENV={environment}", cwd=checkout)
    assert result.returncode == 0
    assert result.stderr.count("warning: compiled operators were not built") == 1
    assert "pure-PyTorch" in result.stderr


def test_failed_installation_stops_make(checkout: Path, environment: Path) -> None:
    python = environment / "bin" / "python"
    python.write_text(python.read_text().replace(f">> {environment}/pip.log", "&& exit 3"))
    result = run("make", "env", f"VENV={environment}", cwd=checkout)
    assert result.returncode != 0
    assert "error: exit status 3 from:" in result.stderr
    assert not (environment / ".detr-methods").exists()


def test_old_python_is_refused_in_one_line(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.version_info = (3, 9, 7)")
    script = checkout / "tools" / "setup_env.py"
    result = run(sys.executable, script, tmp_path / "new", cwd=checkout, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert re.fullmatch(r"error: Python is 3\.9\.7, but 3\.10 .*\n", result.stderr)
    assert not (tmp_path / "new").exists()


# --- the extension ------------------------------------------------------------------------------


def build(checkout: Path, source: str, **variables: str) -> subprocess.CompletedProcess[str]:
    folder = checkout / "ops" / "csrc" / "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.cpp").write_text(source)
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    return run(*command, cwd=checkout, MAX_JOBS="1", **variables)


@pytest.mark.skipif(not HAS_HEADERS, reason="no C++ compiler or no Python headers")
def test_sources_become_an_importable_extension(checkout: Path) -> None:
    result = build(checkout, TINY_EXTENSION)
    assert result.returncode == 0, result.stderr
    imported = run(sys.executable, "-c", "import torch, ops._C", cwd=checkout, PYTHONPATH=".")
    assert imported.returncode == 0, imported.stderr


@pytest.mark.parametrize(
    ("source", "compiler"), [(TINY_EXTENSION, "/nonexistent"), ("not C++", "c++")]
)
def test_failed_build_is_a_warning(checkout: Path, source: str, compiler: str) -> None:
    stale = checkout / "ops" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    other = checkout / "ops" / "_C.cpython-12-of-another-python.so"
    stale.touch()
    other.touch()
    result = build(checkout, source, CXX=compiler)
    assert result.returncode == 0
    assert result.stderr.count("warning: compiled operators were not built (") == 1
    assert not stale.exists()
    assert other.exists()


def test_without_sources_there_is_nothing_to_build(checkout: Path) -> None:
    code = "import sys, runpy; sys.argv[1:] = ['--version']; runpy.run_path('setup.py')"
    result = run(sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr


# --- commands and documents ---------------------------------------------------------------------


@pytest.mark.parametrize("target", ["quickstart", "study", "test", "lint"])
def test_commands_name_files_that_exist(target: str) -> None:
    result = run("make", "-n", target, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    named = re.findall(r"\b(?:tools|projects|configs)/[\w/.]+\.py\b", result.stdout)
    assert "tools/setup_env.py" in named
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize(("lint", "test"), [(0, 0), (1, 0), (0, 1)])
def test_ci_runs_both_and_fails_with_either(tmp_path: Path, lint: int, test: int) -> None:
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "ran $1"\n[ "$1" = lint ] && exit {lint}\nexit {test}\n')
    make.chmod(0o755)
    result = run(ROOT / ".ci/run", cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.stdout.split("\n")[:2] == ["ran lint", "ran test"]
    assert (result.returncode == 0) == (lint == test == 0)


def test_readme_names_files_that_exist() -> None:
    text = re.sub(r"```python.*?```", "", (ROOT / "README.md").read_text(), flags=re.S)
    rooms = "|".join([*MAY_IMPORT, "docs", "tests"])
    named = set(re.findall(rf"(?<![\w/.])(?:{rooms})/[\w/.]*\w(?:\.py|\.md)", text))
    named |= {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    assert len(named) > 5
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_links_lead_somewhere_and_nothing_is_left_to_do() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("projects/**/*.md")]
    for page in pages:
        text = page.read_text()
        assert "TODO" not in text, page
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        assert [link for link in links if not (page.parent / link).exists()] == [], page


def test_version_heads_the_changelog() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert version
    assert heading
    assert heading[1] == version[1]
