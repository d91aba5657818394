"""``make env`` reaches the tool, wherever the environment lies."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_an_environment_whose_path_has_a_blank(tmp_path):
    python = tmp_path / "a b" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/arguments"\n')
    python.chmod(0o755)
    command = ["make", "env", f"VENV={tmp_path}/a b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments == ["tools/setup_env.py", f"{tmp_path}/a b", "--torch", ""]
