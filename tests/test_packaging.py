"""What the project says about itself and what it does are the same."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flexbatch.composition import bundled

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# The name on the package index where it is not the name that is imported.
DISTRIBUTIONS = {"hydra": "hydra-core", "omegaconf": "hydra-core", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!\[; ]", text)[0].lower().replace("_", "-") for text in requirements}


def distribution(name: str) -> str:
    return DISTRIBUTIONS.get(name, name).lower().replace("_", "-")


def is_optional(file: Path) -> bool:
    """Integrations with other tools and the peers of the benchmark are for those who install an extra."""
    return bool({"integrations", "bench"} & set(file.parts))


def imported_packages(*, core: bool = False) -> dict[str, Path]:
    """Every third-party package that the source imports, at the top of a file or inside a function."""
    found = {}
    for file in sorted((REPOSITORY / "flexbatch").rglob("*.py")):
        if core and is_optional(file):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            found.update({name.split(".")[0]: file for name in names})
    return {name: file for name, file in found.items() if name not in sys.stdlib_module_names and name != "flexbatch"}


def test_every_import_is_a_declared_dependency() -> None:
    extras = [text for group in PROJECT["optional-dependencies"].values() for text in group]
    declared = requirement_names([*PROJECT["dependencies"], *extras])
    for name, file in imported_packages().items():
        if name == "helm":
            continue  # its pins do not fit beside ours: integrations/helm.py runs in HELM's own environment
        assert distribution(name) in declared, f"{file} imports {name}"
    for name, file in imported_packages(core=True).items():
        assert distribution(name) in requirement_names(PROJECT["dependencies"]), f"{file} imports {name}"


def test_every_core_dependency_is_used() -> None:
    used = {distribution(name) for name in imported_packages()}
    assert requirement_names(PROJECT["dependencies"]) <= used


def test_every_core_dependency_has_a_lower_bound() -> None:
    assert all(">=" in text for text in PROJECT["dependencies"])


def test_config_and_jobs_are_found() -> None:
    assert (bundled("conf") / "config.yaml").is_file()
    assert bundled("jobs").is_dir()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["nonsense"]])
def test_bootstrap_without_a_command_says_what_there_is(arguments: list[str]) -> None:
    finished = subprocess.run(
        [sys.executable, str(REPOSITORY / "bootstrap.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "bootstrap.py test" in finished.stdout
    assert finished.returncode == (0 if arguments == ["--help"] else 2)


def test_the_licence_is_apache() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text()
