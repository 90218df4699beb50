"""What is installed: a wheel built from nothing but the repository holds all that the page needs."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def hook():
    """The build hook as a module; its place is no package."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_of_the_repository(folder):
    """What git has: nothing that a build or an installation has put there."""
    leave = shutil.ignore_patterns("vendor", "__pycache__", "*.pyc")
    for name in ("gup", "deploy/man", "deploy/completions"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_wheel_brings_the_page_with_its_chart_library_manual_pages_and_completions(tmp_path):
    source = copy_of_the_repository(tmp_path / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path / "wheels"), str(source)]
    subprocess.run(command, check=True, timeout=50, capture_output=True)
    (wheel,) = (tmp_path / "wheels").glob("gup-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for name, (_, digest) in hook().FILES.items():
            body = archive.read(f"gup/control/page/vendor/{name}")
            assert hashlib.sha256(body).hexdigest() == digest
        licence = archive.read("gup/control/page/uPlot.LICENSE").decode()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert "Leon Sorokin" in licence
    assert "MIT" in licence
    for folder in ("static", "templates"):
        for path in (ROOT / "gup/control/page" / folder).iterdir():
            assert f"gup/control/page/{folder}/{path.name}" in names
    for name in ("man/man1/gup.1", "man/man1/gup-cache-purge.1", "bash-completion/completions/gup",
                 "zsh/site-functions/_gup", "fish/vendor_completions.d/gup.fish"):  # fmt: skip
        assert any(found.endswith(f".data/data/share/{name}") for found in names), name
    assert hook().CARRIER not in metadata.split("Provides-Extra: dev")[0]


@pytest.mark.parametrize(
    ("carrier", "complaint"),
    [("youplot", "is not the released"), ("nobody-has-this", "build with isolation")],
)
def test_another_library_than_the_released_one_is_not_taken(tmp_path, monkeypatch, carrier, complaint):
    module = hook()
    monkeypatch.setattr(module, "CARRIER", carrier)
    with pytest.raises(SystemExit, match=complaint):
        module._copy("youplot/vendor/uplot.min.css", tmp_path / "uPlot.min.css", "0" * 64)
    assert list(tmp_path.iterdir()) == []
