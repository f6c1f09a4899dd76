from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from conftest import REPOSITORY

import trajkit


def test_the_public_face() -> None:
    assert sorted(trajkit.__all__) == [
        "CMD",
        "Decomposition",
        "EmbeddedCMD",
        "OnlineCMD",
        "ParameterLayout",
        "Recorder",
        "Run",
        "RunWriter",
        "TrajkitError",
        "check",
        "evaluate",
        "fit",
        "follow",
        "import_checkpoints",
        "load_weights",
        "open_run",
        "repair",
        "update",
        "verify",
        "write_checkpoint",
    ]
    for name in (*trajkit.__all__, "DistanceCut", "TrajkitWarning"):
        assert getattr(trajkit, name).__doc__
        assert name in dir(trajkit) or name in ("DistanceCut", "TrajkitWarning")
    with pytest.raises(AttributeError, match="module 'trajkit' has no attribute 'nonsense'"):
        _ = trajkit.nonsense  # type: ignore[attr-defined]


def test_importing_trajkit_imports_nothing_heavy() -> None:
    code = "import sys, trajkit; sys.exit(bool({'torch', 'zarr', 'numpy', 'cupy', 'matplotlib'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_error_is_also_a_builtin() -> None:
    import trajkit.errors as errors

    own = [kind for kind in vars(errors).values() if getattr(kind, "__module__", None) == errors.__name__]
    kinds = [kind for kind in own if isinstance(kind, type) and kind is not errors.TrajkitError]
    assert len(kinds) > 5
    for kind in kinds:
        assert issubclass(kind, errors.TrajkitError)
        assert any(base.__module__ == "builtins" and base not in (Exception, object) for base in kind.__mro__[1:-3])


def test_every_package_is_listed() -> None:
    """An explicit list forgets new subpackages."""
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"trajkit_cli"} | {
        ".".join(path.parent.relative_to(REPOSITORY).parts) for path in REPOSITORY.glob("trajkit/**/__init__.py")
    }
    assert set(listed) == found


def test_a_wheel_works_in_a_clean_environment(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, REPOSITORY], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("trajkit-*.whl")
    venv.create(tmp_path / "clean", with_pip=False)
    python = tmp_path / "clean/bin/python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    # The dependencies come from this environment, without its editable install of trajkit: a path is no site folder.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    said = subprocess.run(
        [tmp_path / "clean/bin/trajkit", "--help"], env=environment, check=True, capture_output=True, text=True
    )
    assert "Record the weights of every epoch" in said.stdout
    where = "import trajkit, trajkit.demo, trajkit_cli; print(trajkit.__file__, trajkit_cli.__file__)"
    files = subprocess.run(
        [python, "-c", where], env=environment, check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout.split()
    assert all(file.startswith(str(tmp_path / "clean")) for file in files)
