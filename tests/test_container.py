"""The image of deploy/Dockerfile, as far as it can be seen without Docker: one stage runs here, one is read."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from manifests import VALUES
from render import render

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, without comments; the first list has those before any stage."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    found: list[list[tuple[str, str]]] = [[]]
    for line in filter(None, "\n".join(lines).replace("\\\n", "").splitlines()):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            found.append([])
        found[-1].append((name, rest.strip()))
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of the first stage after it ran, on what it copies and nothing else."""
    folder = tmp_path_factory.mktemp("src")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for name, rest in stages()[1]:
        if name == "COPY":
            source, target = rest.split()
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, folder / target)
        elif name == "RUN":  # without a network: the setuptools that is here builds
            rest = rest.replace("pip wheel", "pip wheel --no-build-isolation")
            offline = {**os.environ, "PATH": path, "PIP_NO_INDEX": "1"}
            subprocess.run(rest, shell=True, cwd=folder, env=offline, check=True, capture_output=True)
    return folder


def test_the_image_installs_what_the_project_pins_and_no_version_of_its_own(built: Path) -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = {*PROJECT["dependencies"]}.union(*(extras[name] for name in extras.keys() - {"test", "lint"}))
    assert {*(built / "requirements.txt").read_text().splitlines()} == wanted
    assert "boto3" in " ".join(wanted), "for the autoscaler of `ray up`"
    installs = [rest for name, rest in stages()[2] if name == "RUN" and "pip install" in rest]
    assert [re.findall(r"(?<=/src/)\S+", install) for install in installs] == [["requirements.txt"], ["wheels/*.whl"]]
    assert not any(re.search(r"\d\.\d|==", install) for install in installs)


def test_the_wheel_in_the_image_has_every_file_of_the_package(built: Path) -> None:
    (wheel,) = (built / "wheels").glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mmray/")}
    here = (file for file in (ROOT / "mmray").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    assert packed == {str(file.relative_to(ROOT)) for file in here}


def test_the_image_runs_as_a_user_whom_kubernetes_sees_not_to_be_root() -> None:
    (user,) = (rest for name, rest in stages()[2] if name == "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert any(f"useradd --uid {user.partition(':')[0]} " in rest for name, rest in stages()[2] if name == "RUN")
    last_run = max(k for k, (name, _) in enumerate(stages()[2]) if name == "RUN")
    assert last_run < stages()[2].index(("USER", user)), "installed by root: whoever runs there cannot change it"


def test_the_home_of_the_image_is_where_ray_up_puts_the_token() -> None:
    home = dict(rest.split("=") for name, rest in stages()[2] if name == "ENV")["HOME"]
    (config,) = render("cluster")
    assert list(config["file_mounts"]) == [f"{home}/.ray"]


def test_the_image_has_the_python_and_the_libraries_that_the_tests_have() -> None:
    (python,) = (rest.partition("=")[2] for name, rest in stages()[0] if name == "ARG")
    assert PROJECT["requires-python"] == f">={'.'.join(python.partition('-')[0].split('.')[:2])}"
    assert {rest for stage in stages() for name, rest in stage if name == "FROM"} == {
        "python:${PYTHON} AS build",
        "python:${PYTHON}",
    }
    packages = re.compile(r"apt-get install -y -\S+((?: [a-z0-9][-+.a-z0-9]+)+)")
    (image,) = (found[1].split() for _, rest in stages()[2] if (found := packages.search(rest)))
    (tests, _) = (found.split() for found in packages.findall((ROOT / ".ci" / "run").read_text()))
    assert {*tests} <= {*image}


def test_nothing_is_fetched_or_kept_that_should_not_be() -> None:
    names = {name for stage in stages() for name, _ in stage}
    assert "ADD" not in names
    assert "://" not in DOCKERFILE.read_text()
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"
    copied = {rest.split()[0] for name, rest in stages()[1] if name == "COPY"}
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert ":" not in VALUES["image"].rpartition("/")[2], "the tag is mmray's version"
