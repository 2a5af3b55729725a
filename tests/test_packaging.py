"""pyproject.toml, constraints.txt, the Makefile and README.md agree with each other and with the package."""

import ast
import fnmatch
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSIONS = ("3.11", "3.12", "3.13")
# Import names that are not the package's name.
CALLED = {
    "absl": "absl-py",
    "PIL": "pillow",
    "google": "protobuf",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
}
# Not asked for by name: jaxlib comes with jax, at its version.
IMPLIED = {"jaxlib"}


def needed(*extras: str) -> list[Requirement]:
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def pins(python: str) -> dict[str, list[str]]:
    """{package: its pinned versions} of constraints.txt on Linux under one Python."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if text := line.split("#")[0].strip():
            pin = Requirement(text)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                (only,) = pin.specifier
                assert only.operator == "==", f"{line}: a pin is =="
                found.setdefault(canonicalize_name(pin.name), []).append(only.version)
    return found


@pytest.mark.parametrize("python", VERSIONS)
def test_everything_we_ask_for_is_pinned_once_and_within_its_bounds(python):
    pinned = pins(python)
    assert [name for name, versions in pinned.items() if len(versions) > 1] == []
    for requirement in needed(*PROJECT["project"]["optional-dependencies"]):
        (version,) = pinned.get(canonicalize_name(requirement.name), [None])
        assert version is not None, f"{requirement.name} has no line in constraints.txt for Python {python}"
        assert requirement.specifier.contains(version), f"{requirement} refuses its own pin {version}"


def test_jax_and_jaxlib_move_together_and_python_311_keeps_the_last_that_it_can_have():
    for python in VERSIONS:
        assert pins(python)["jax"] == pins(python)["jaxlib"]
    assert pins("3.11")["jax"][0].startswith("0.10.")
    assert pins("3.12")["jax"] == pins("3.13")["jax"] != pins("3.11")["jax"]


def test_every_import_is_a_declared_dependency():
    """A package that only happens to come with another one vanishes with that one's next release."""
    declared = {canonicalize_name(requirement.name) for requirement in needed("parity", "onnx", "gcs")} | IMPLIED
    undeclared = {}
    for path in sorted((ROOT / "regvit_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"regvit_jax"}:
                if canonicalize_name(CALLED.get(top, top)) not in declared:
                    undeclared[top] = path.name
    assert undeclared == {}


def test_every_data_file_of_the_package_is_shipped():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    files = [path for path in (ROOT / "regvit_jax").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    shipped = ["*.py", *patterns]
    assert [path.name for path in files if not any(fnmatch.fnmatch(path.name, pattern) for pattern in shipped)] == []
    assert all((path.parent / "__init__.py").is_file() for path in files), "a folder without __init__.py stays at home"


def test_the_commands_that_pip_installs_exist():
    for name, target in PROJECT["project"]["scripts"].items():
        module, function = target.split(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.is_file(), f"{name} = {target}: there is no {path.name}"
        defined = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert function in defined


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(_code(ROOT / "README.md") + _code(ROOT / "CONTRIBUTING.md"))))
    assert {"quickstart", "test"} <= named <= targets


def _code(path: Path) -> list[str]:
    """Code blocks and inline code of a Markdown file."""
    text = path.read_text()
    blocks = re.findall(r"^```.*?^```|^    .+?$", text, flags=re.MULTILINE | re.DOTALL)
    return blocks + re.findall(r"`[^`\n]+`", text)


def test_the_command_of_quickstart_names_files_that_exist():
    command = re.search(r"-m (\S+) --config=(\S+)", (ROOT / "Makefile").read_text())
    assert (ROOT / (command[1].replace(".", "/") + ".py")).is_file()
    assert (ROOT / command[2]).is_file()


def test_the_readme_has_a_line_for_every_file_of_the_package():
    tree = (ROOT / "README.md").read_text().split("```\nregvit_jax/\n")[1].split("```")[0]
    tree = re.match(r"( .*\n)*", tree)[0]  # to the next folder beside the package
    named = set(re.findall(r"[\w]+\.py", tree))
    files = {path.name for path in (ROOT / "regvit_jax").rglob("*.py")}
    assert files == named
