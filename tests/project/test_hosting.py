"""The files that hosts and indexes read: they say what pyproject.toml and `.ci/run` say, and no address is made up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import ROOT, check_command

import tnpeft

tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
URL = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["custom"]["url"]
"""The project's own address; empty until there is one."""

WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").iterdir())
RECIPE = ROOT / "docs" / "packaging" / "recipe.yaml"
CITATION = ROOT / "CITATION.cff"
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", ".pre-commit-config.yaml")]
FILES = [CITATION, RECIPE, *WORKFLOWS, *FORMS, *TEXTS, ROOT / "pyproject.toml", ROOT / ".ci" / "run"]

# Whose addresses may stand in these files, beside the project's own.
KNOWN = {
    "https://download.pytorch.org/whl/cpu": "PyTorch's wheels without CUDA",
    "tnpeft.io": "a room of the package, in a comment",
    "https://HOST/OWNER/NAME": "the pattern of the project's own, in the comment above `url`",
}
ACTIONS = {"actions/checkout", "actions/setup-python", "actions/upload-artifact"}
ADDRESS = re.compile(
    r"\b[a-z][a-z+.-]*://[^\s\"'`)>\]]*"  # with a scheme
    r"|\bwww\.[\w.-]+"
    r"|\bgit@[\w.-]+"
    r"|[\w.+-]+@[\w-]+\.[a-z][\w.-]*"  # mail
    r"|\b(?:[\w-]+\.)+(?:com|org|net|io|dev|ai)\b[\w/.-]*"  # a bare host
    r"|\b10\.\d{4,9}/\S+",  # DOI
    re.IGNORECASE,
)
OWN_KEYS = {"email", "doi", "orcid", "repository", "repository-code", "homepage", "website", "url", "identifiers"}
CONDA_NAMES = {"torch": "pytorch"}


def read(path: Path) -> Any:
    """Every scalar is text: `on` is a word and `3.10` a version."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def made_up(text: str) -> set[str]:
    """Addresses that are neither the project's own nor of known third parties."""
    found = {address.rstrip(".,;:") for address in ADDRESS.findall(text)}
    return {address for address in found - set(KNOWN) if not (URL and f"{address}/".startswith(f"{URL}/"))}


def keys(node: Any) -> Iterator[str]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    yield from node if isinstance(node, dict) else ()
    for child in children:
        yield from keys(child)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_address_is_made_up(path: Path):
    assert not made_up(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "https://tnpeft.org",
        "see www.tnpeft.test",
        "git@host.test:owner/name",
        "maintainers@tnpeft.org",
        "github.com/tnpeft/tnpeft",
        "tnpeft.readthedocs.io",
        "doi: 10.5281/zenodo.1234567",
        "https://download.pytorch.org/whl/cpu/../nightly",
    ],
)
def test_a_made_up_address_is_noticed(text: str):
    assert made_up(text)


def test_an_action_and_a_file_are_no_addresses():
    assert not made_up("uses: actions/checkout@v6, SECURITY.md, recipe.yaml, torch==2.13.0, arXiv:2507.18112")


@pytest.mark.parametrize(("path", "where"), [(CITATION, ()), (RECIPE, ("about",))], ids=["citation", "recipe"])
def test_the_only_address_is_the_one_of_the_project(path: Path, where: tuple[str, ...]):
    content = read(path)
    expected = {"repository-code" if path == CITATION else "repository"} if URL else set()
    assert OWN_KEYS & set(keys(content)) == expected
    for key in where:
        content = content[key]
    assert all(content[key] == URL for key in expected)


def test_the_citation_is_of_this_version():
    content = read(CITATION)
    assert content["version"] == tnpeft.__version__
    assert content["title"] == PROJECT["name"]
    assert content["abstract"] == PROJECT["description"]
    assert content["keywords"] == PROJECT["keywords"]
    assert content["license"] == PROJECT["license"]
    assert content["authors"] == PROJECT["authors"] == [{"name": "The tnpeft authors"}]
    assert "](CITATION.cff)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_conda_recipe_asks_for_what_the_package_asks_for():
    content = read(RECIPE)
    assert content["context"] == {
        "version": tnpeft.__version__,
        "python_min": PROJECT["requires-python"].removeprefix(">="),
    }
    assert content["package"]["name"] == PROJECT["name"]
    needed = [re.fullmatch(r"([\w-]+)(>=[\d.]+)", line).groups() for line in PROJECT["dependencies"]]
    asked = [f"{CONDA_NAMES.get(name, name)} {bound}" for name, bound in needed]
    assert content["requirements"]["run"] == ["python >=${{ python_min }}", *asked]
    built_by = [line.replace(">=", " >=") for line in PYPROJECT["build-system"]["requires"]]
    assert content["requirements"]["host"] == ["python ${{ python_min }}.*", "pip", *built_by]
    scripts = [f"{name} = {target}" for name, target in PROJECT["scripts"].items()]
    assert content["build"]["python"]["entry_points"] == scripts
    assert (RECIPE.parent / content["source"]["path"]).resolve() == ROOT
    assert content["about"]["summary"] == PROJECT["description"]
    assert content["about"]["license"] == PROJECT["license"]
    assert [content["about"]["license_file"]] == PROJECT["license-files"]
    for line in content["tests"][1]["script"]:
        if line != "tnpeft --version":
            check_command(line)


def jobs() -> list[dict[str, Any]]:
    return [job for path in WORKFLOWS for job in read(path)["jobs"].values()]


def steps(key: str) -> list[str]:
    return [step[key] for job in jobs() for step in job["steps"] if key in step]


def test_the_workflows_run_what_ci_runs_and_build_the_site_and_the_wheel():
    (parts,) = re.findall(r"^test: (.*?) ##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    lines = re.findall(r'^(?:exec )?(make .*?) "\$@"', script, re.MULTILINE)
    assert "make test" in lines
    expected = {*lines, *(f"make {target}" for target in parts.split()), "make docs", "make wheel"} - {"make test"}
    assert sorted(steps("run")) == sorted(expected)
    for line in steps("run"):
        check_command(line)


def test_the_tests_run_on_every_python_that_is_promised():
    named = "Programming Language :: Python :: "
    promised = [line.removeprefix(named) for line in PROJECT["classifiers"] if line.startswith(named)]
    matrices = [job["strategy"]["matrix"]["python"] for job in jobs() if "strategy" in job]
    assert matrices == [promised]
    (unit,) = (job for job in jobs() if "strategy" in job)
    assert unit["steps"][-1]["run"] == "make unit"
    for job in jobs():
        (version,) = (step["with"]["python-version"] for step in job["steps"] if "python" in step.get("uses", ""))
        assert version == "${{ matrix.python }}" or set(version.split()) <= set(promised)


def test_the_wheel_is_tried_on_the_pythons_that_are_installed():
    (versions,) = re.findall(r"tests/pythons.py (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    (job,) = (job for job in jobs() if any(step.get("run") == "make pythons" for step in job["steps"]))
    installed = job["steps"][1]["with"]["python-version"].split()
    assert installed == [*versions.split(), "3.11"]  # the last is `python3`, whose tomllib the script reads with


def test_the_workflows_use_known_actions_and_may_only_read():
    assert {line.partition("@")[0] for line in steps("uses")} == ACTIONS
    assert all(re.fullmatch(r"[\w/-]+@v\d+", line) for line in steps("uses"))
    for path in WORKFLOWS:
        assert read(path)["permissions"] == {"contents": "read"}
        assert "secrets." not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*FORMS, ROOT / "SECURITY.md", CITATION], ids=lambda path: path.name)
def test_texts_name_files_and_commands_that_exist(path: Path):
    from typer.main import get_group

    from tnpeft.cli.app import app

    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link.removeprefix("../blob/main/")).is_file(), link
    commands = get_group(app).commands
    for name, rest in re.findall(r"`tnpeft ([a-z]\w*)([^`]*)`", text):
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options, name
    for name in re.findall(r"`(register_\w+)`", text):
        assert name in tnpeft.__all__
