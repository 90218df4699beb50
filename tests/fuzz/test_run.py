"""The runner of the fuzz targets, with a target that fails for some inputs, and a stand-in for atheris."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz

SITE = """
import pathlib, fuzz
folder = pathlib.Path(__file__).parent
fuzz.NAMES, fuzz.CORPUS, fuzz.BUILD = ("planted",), folder / "corpus", folder / "build"
fuzz.__path__.append(str(folder))
"""
PLANTED = """
'''No input has the word.'''
import contextlib

@contextlib.contextmanager
def target():
    def check(text):
        assert b"crash" not in text, "the word"
    yield check
"""
ATHERIS = """
'''What libFuzzer does with a corpus, a failure and its options.'''
import contextlib, pathlib, sys, traceback

def instrument_imports(include):
    return contextlib.nullcontext()

def Setup(arguments, check):
    global files, prefix, run
    files = [file for name in arguments[1:] if name[0] != "-" for file in pathlib.Path(name).iterdir()]
    (prefix,) = (name.removeprefix("-artifact_prefix=") for name in arguments if "-artifact" in name)
    run = check

def Fuzz():
    for file in files:
        try:
            run(file.read_bytes())
        except Exception:
            traceback.print_exc()
            pathlib.Path(prefix + "crash-" + file.name).write_bytes(file.read_bytes())
            sys.exit(77)
    print(f"stat::number_of_executed_units: {len(files)}")
"""


@pytest.fixture
def fuzzed(tmp_path):
    """Runs the runner with options, after inputs have been put into the corpus; status and output."""
    modules = {
        "sitecustomize": SITE,
        "planted": PLANTED,
        "atheris": ATHERIS,
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    corpus = tmp_path / "corpus" / "planted"
    corpus.mkdir(parents=True)
    path = os.pathsep.join([str(tmp_path), str(Path(fuzz.__file__).parents[1])])

    def fuzzed(*options, **inputs):
        for name, text in inputs.items():
            (corpus / name).write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "fuzz.run", *options],
            env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return fuzzed


def test_a_run_without_a_failure_ends_with_0(fuzzed):
    status, said = fuzzed("--minutes", "0.05", one="a", two="b")
    assert (status, re.findall(r"planted: (\d+) executions,.*: (\w+)\n", said)) == (0, [("2", "ok")])


def test_a_planted_crash_ends_with_1_and_names_the_file_that_is_run_again(fuzzed):
    status, said = fuzzed("--minutes", "0.05", one="a", two="a crash")
    assert (status, "planted: 0 executions" in said, "FAILED" in said) == (1, True, True)
    assert "AssertionError: the word" in said
    (file,) = re.findall(r"make fuzz REPLAY=(\S+)", said)
    assert Path(file).read_text() == "a crash"
    again = fuzzed("--replay", file)
    assert again[0] == 1
    assert "AssertionError: the word" in again[1]
    Path(file).write_text("mended")
    assert fuzzed("--replay", file) == (0, f"{file}: the property of planted holds\n")
