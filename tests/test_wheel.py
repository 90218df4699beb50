"""What is installed: a wheel built from nothing but the repository holds all that the page needs."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email import message_from_bytes
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
    """What the image is built from: nothing that a build or an installation has put there."""
    leave = shutil.ignore_patterns("vendor", "__pycache__", "*.pyc")
    admitted = (ROOT / "deploy/container/Dockerfile.dockerignore").read_text()
    for pattern in re.findall(r"^!(.+)$", admitted, re.MULTILINE):
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(path, target, ignore=leave) if path.is_dir() else shutil.copy(path, target)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Every file of the wheel, by its name; what is below .dist-info goes by the name there."""
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_of_the_repository(folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, timeout=50, capture_output=True)
    (file,) = folder.glob("gup-*.whl")
    with zipfile.ZipFile(file) as archive:
        return {name.rpartition(".dist-info/")[2]: archive.read(name) for name in archive.namelist()}


def test_the_wheel_brings_the_page_with_its_chart_library_manual_pages_and_completions(wheel):
    for name, (_, digest) in hook().FILES.items():
        assert hashlib.sha256(wheel[f"gup/control/page/vendor/{name}"]).hexdigest() == digest
    for folder in ("static", "templates"):
        for path in (ROOT / "gup/control/page" / folder).iterdir():
            assert f"gup/control/page/{folder}/{path.name}" in wheel
    for name in ("man/man1/gup.1", "man/man1/gup-cache-purge.1", "bash-completion/completions/gup",
                 "zsh/site-functions/_gup", "fish/vendor_completions.d/gup.fish"):  # fmt: skip
        assert any(found.endswith(f".data/data/share/{name}") for found in wheel), name


def test_the_wheel_names_its_licences_and_what_it_needs(wheel):
    metadata = message_from_bytes(wheel["METADATA"])
    assert metadata["License-Expression"] == "Apache-2.0 AND MIT"
    licences = metadata.get_all("License-File")
    assert set(licences) == {"LICENSE", "gup/control/page/uPlot.LICENSE"}
    ours, uplot = (wheel[f"licenses/{name}"].decode() for name in sorted(licences))
    assert "Apache License\n                           Version 2.0" in ours
    assert "The MIT License" in uplot
    assert "Leon Sorokin" in uplot
    needed = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    assert any(text.startswith("aiohttp") for text in needed)
    assert not any(text.startswith(hook().CARRIER) for text in needed)


def mistake(bill):
    """What is wrong with the text of a bill of materials, or None."""
    # imported here: it builds the grammar of web addresses, half of what it takes to collect all tests
    from cyclonedx.schema import SchemaVersion  # noqa: PLC0415
    from cyclonedx.validation.json import JsonStrictValidator  # noqa: PLC0415

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill)


def test_the_wheel_has_a_valid_bill_of_materials_that_names_the_chart_library(wheel):
    text = wheel["sboms/gup.cdx.json"].decode()
    assert mistake(text) is None
    bill = json.loads(text)
    assert bill["metadata"]["component"]["version"] == message_from_bytes(wheel["METADATA"])["Version"]
    (uplot,) = bill["components"]
    assert (uplot["purl"], uplot["licenses"]) == ("pkg:npm/uplot@1.6.31", [{"license": {"id": "MIT"}}])
    vendored = {name for name in wheel if "/vendor/" in name}
    assert {part["name"] for part in uplot["components"]} == vendored, "all that was brought in is named"
    for part in uplot["components"]:
        (digest,) = part["hashes"]
        assert digest == {"alg": "SHA-256", "content": hashlib.sha256(wheel[part["name"]]).hexdigest()}
    assert f"/uPlot (v{uplot['version']})".encode() in wheel["gup/control/page/vendor/uPlot.iife.min.js"]


def test_the_validator_finds_a_mistake():
    text = json.dumps(hook().bill_of_materials("1") | {"components": [{"type": "librarry", "name": "uplot"}]})
    assert "librarry" in repr(mistake(text))


CONSUMER = """
from gup.units import format_size, parse_size

reveal_type(parse_size("1MB"))
format_size(None)
"""


def test_a_consumers_strict_type_check_sees_the_wheels_types(wheel, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    for name, content in wheel.items():
        if name.startswith("gup/"):
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_bytes(content)
    (tmp_path / "consumer.py").write_text(CONSUMER)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--cache-dir", os.devnull]
    command += ["--python-executable", str(tmp_path / "venv/bin/python"), "consumer.py"]
    done = subprocess.run(command, cwd=tmp_path, timeout=90, capture_output=True, text=True, check=False)
    assert 'Revealed type is "int"' in done.stdout.replace("builtins.", ""), done.stdout
    assert 'incompatible type "None"' in done.stdout
    assert "Found 1 error" in done.stdout


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
