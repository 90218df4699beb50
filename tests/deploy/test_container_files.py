"""The container's files. No engine runs where the tests do: they are linted, not built."""

import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
from deploy.deployed import DEPLOY, ROOT, load, run
from harness.needs import program

DOCKERFILE = DEPLOY / "container" / "Dockerfile"
COMPOSE = DEPLOY / "container" / "compose.yml"
GIVEN = {"GUP_UPSTREAM": "http://manager:8014", "GRAFANA_PASSWORD": "secret"}


def ours(name):
    """A program of the environment that the tests run in."""
    return Path(sys.executable).with_name(name)


def environment(**more):
    return {name: value for name, value in os.environ.items() if not name.startswith("GUP_")} | more


def test_the_dockerfile_has_no_lint():
    assert run(ours("hadolint"), DOCKERFILE) == ""


def test_the_image_has_two_stages_and_no_root():
    text = DOCKERFILE.read_text()
    assert len(re.findall(r"^FROM ", text, re.MULTILINE)) == 2
    last = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK ", last, re.MULTILINE)
    assert re.search(r"^VOLUME /var/lib/gup$", last, re.MULTILINE)
    assert "COPY --from=build" in last


def test_the_image_has_the_python_that_the_suite_runs_with():
    images = set(re.findall(r"^FROM python:(\S+?)-slim", DOCKERFILE.read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"].startswith(">=" + "".join(images))
    if os.environ.get("CI") == "true":  # elsewhere any Python that gup allows may run the suite
        assert images == {"{}.{}".format(*sys.version_info)}


@pytest.mark.needs("docker-compose")
def test_the_compose_file_is_valid_and_complete():
    run(program("docker-compose"), "-f", COMPOSE, "config", "--quiet", env=environment(**GIVEN))
    services = load(COMPOSE)["services"]
    assert set(services) == {"gup", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
    assert "healthcheck" not in services["gup"], "the image's own holds"
    assert services["gup"]["user"] == "10001:10001"


def test_every_file_that_is_mounted_is_there():
    for service in load(COMPOSE)["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (COMPOSE.parent / source).exists(), volume


@pytest.mark.needs("docker-compose")
def test_what_must_be_given_is_asked_for():
    only = {name: value for name, value in GIVEN.items() if name != "GUP_UPSTREAM"}
    said = run(program("docker-compose"), "-f", COMPOSE, "config", status=1, env=environment(**only))
    assert "the management server's URL" in said


def test_the_yaml_files_have_no_lint():
    assert run(ours("yamllint"), "--strict", "-c", DEPLOY / ".yamllint.yml", DEPLOY) == ""
