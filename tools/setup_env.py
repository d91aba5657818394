"""Prepare the virtual environment of ``make``: torch first, then this project, nothing twice.

Needs only the standard library, since it runs before anything is installed.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_TORCH = "torch==2.13.0"
BUILD_TOOLS = ["setuptools>=77", "wheel", "ninja"]
INSTALLED_TORCH = "import importlib.metadata as m; print(m.version('torch'))"


def main() -> None:
    """Read the command line and bring the environment up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", type=Path, help="environment to use; made if it is not there")
    parser.add_argument("--torch", default="", help="what pip shall install as torch")
    args = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever starts this may have an older one
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"error: Python is {found}, but 3.10 or newer is needed (choose one: PYTHON=...)")
    stamp = args.venv / ".detr-methods"
    if not is_current(stamp, args.torch):
        try:
            install(args.venv, args.torch)
        except subprocess.CalledProcessError as error:
            command = " ".join(map(str, error.cmd))
            sys.exit(f"error: exit status {error.returncode} from: {command}")
        stamp.write_text(f"{fingerprint()}\n{args.torch}")


def is_current(stamp: Path, torch: str) -> bool:
    """Tell whether the environment holds this project as it is now, and the torch asked for."""
    if not stamp.is_file():
        return False
    project, _, its_torch = stamp.read_text().partition("\n")
    return project == fingerprint() and torch in ("", its_torch)


def fingerprint() -> str:
    """Digest of what decides an installation: place, metadata, sources, compiler."""
    digest = hashlib.sha256(str(ROOT).encode())
    digest.update(str(shutil.which(os.environ.get("CXX", "c++"))).encode())
    sources = sorted(path for path in ROOT.glob("ops/csrc/**/*") if path.is_file())
    for path in [ROOT / "pyproject.toml", ROOT / "setup.py", *sources]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def install(folder: Path, torch: str) -> None:
    """Install torch (unless one is there and none was asked for), then the project beside it."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making the environment {folder}", flush=True)
        venv.create(folder, symlinks=True)  # without pip: Debian may lack ensurepip
    ensure_pip(python)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--no-input"]
    if torch or not installed_torch(python):
        subprocess.run([*pip, *(torch or DEFAULT_TORCH).split()], check=True)
    subprocess.run([*pip, *BUILD_TOOLS], check=True)
    keep_torch = folder / "constraints.txt"  # whatever the project asks for, torch stays as it is
    keep_torch.write_text(f"torch=={installed_torch(python)}\n")
    pip += ["--no-build-isolation", "--constraint", str(keep_torch)]
    subprocess.run([*pip, "--editable", f"{ROOT}[dev]"], check=True)
    if any(ROOT.glob("ops/csrc/**/*.cpp")) and not any(ROOT.glob("ops/_C*.so")):
        print(
            "warning: compiled operators were not built; the pure-PyTorch path is used"
            f" (to see why: {python} setup.py build_ext --inplace)",
            file=sys.stderr,
        )


def ensure_pip(python: Path) -> None:
    """Give the environment pip: its own, ensurepip's, or one installed by the base Python's pip."""
    base = getattr(sys, "_base_executable", sys.executable)
    attempts: list[list[object]] = [
        [python, "-m", "ensurepip", "--default-pip"],
        [base, "-m", "pip", "--python", python, "install", "pip"],
    ]
    while subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode != 0:
        if not attempts:
            sys.exit(f"error: no pip for {python}; install python3-venv or python3-pip, then retry")
        subprocess.run([str(part) for part in attempts.pop(0)], capture_output=True)


def installed_torch(python: Path) -> str:
    """Version of the environment's torch, or an empty string."""
    result = subprocess.run([python, "-c", INSTALLED_TORCH], capture_output=True, text=True)
    return result.stdout.strip()


if __name__ == "__main__":
    main()
