"""What is shipped, and what is written in two places: the wheel, the version, the pins."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import convspectra

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "convspectra"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

MAX_BODY_LINES = 60
REGISTRY_HOST = re.compile(
    r"\b(?:pypi|pythonhosted|anaconda|download\.pytorch)\.(?:org|com)\b", re.IGNORECASE
)


def run_python(*args: str, cwd: Path, path: Path | None = None) -> str:
    """Run this interpreter, `path` before what is installed, and return what it prints."""
    env = {**os.environ, "PYTHONPATH": str(path)} if path else None
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with an installed wheel of the working tree; the tree itself is only read."""
    tmp = tmp_path_factory.mktemp("wheel")
    sources = tmp / "sources"
    shutil.copytree(
        ROOT / "src", sources / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "hatch_build.py"):
        shutil.copy(ROOT / name, sources)
    run_python(
        "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp), str(sources), cwd=tmp
    )
    (wheel,) = tmp.glob("*.whl")
    target = tmp / "site"
    pip = ("-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--target")
    run_python(*pip, str(target), str(wheel), cwd=tmp)
    return target


def test_the_wheel_carries_every_file_of_the_package(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (path for path in folder.rglob("*") if path.is_file())
        return {
            path.relative_to(folder).as_posix() for path in found if "__pycache__" not in path.parts
        }

    shipped = files(installed / "convspectra")
    assert "py.typed" in shipped
    assert shipped == files(PACKAGE)


def test_the_wheel_carries_its_license(installed: Path) -> None:
    (license,) = installed.glob("convspectra-*.dist-info/licenses/LICENSE")
    assert license.read_text() == (ROOT / "LICENSE").read_text()


def test_the_installed_wheel_imports_from_elsewhere(installed: Path, tmp_path: Path) -> None:
    code = """
import json
from importlib.metadata import distribution
import convspectra
scripts = {e.name: e.value for e in distribution("convspectra").entry_points}
print(json.dumps([convspectra.__file__, convspectra.__version__, scripts]))
"""
    answer = json.loads(run_python("-c", code, cwd=tmp_path, path=installed))
    assert answer == [
        str(installed / "convspectra" / "__init__.py"),
        PROJECT["version"],
        PROJECT["scripts"],
    ]


@pytest.mark.parametrize("module", ["convspectra", "convspectra.cli"])
def test_the_package_imports_without_its_extras(module: str, tmp_path: Path) -> None:
    extras = [Requirement(line).name for line in PROJECT["optional-dependencies"]["demo"]]
    names = [{"scikit-learn": "sklearn"}.get(name, name) for name in extras]
    assert "matplotlib" in names
    code = f"import sys; sys.modules.update(dict.fromkeys({names})); import {module}"
    run_python("-c", code, cwd=tmp_path)


def test_the_console_script_leads_to_a_function() -> None:
    module, _, function = PROJECT["scripts"]["convspectra"].partition(":")
    code = f"import {module} as module; assert callable(module.{function})"
    run_python("-c", code, cwd=ROOT)


def test_the_version_is_kept_once() -> None:
    version = PROJECT["version"]
    assert convspectra.__version__ == version
    copies = [path for path in PACKAGE.rglob("*.py") if f'"{version}"' in path.read_text()]
    assert copies == []


def test_every_requirement_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    loose = [str(pin) for pin in pins if not re.fullmatch(r"==[\w.]+", str(pin.specifier))]
    assert loose == []

    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]
    names = {canonicalize_name(Requirement(line).name) for line in wanted} - {PROJECT["name"]}
    assert "torch" in names
    assert names <= {canonicalize_name(pin.name) for pin in pins}


def test_dev_has_every_extra_that_installs_without_a_compiler() -> None:
    extras = PROJECT["optional-dependencies"]
    (own,) = (Requirement(line) for line in extras["dev"] if line.startswith(PROJECT["name"]))
    assert own.extras == set(extras) - {"dev", "bench"}  # bench: primme is built from source


def release_metadata(monkeypatch: pytest.MonkeyPatch, repository: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv(module.VARIABLE, repository)
    metadata: dict[str, Any] = {}
    module.ReleaseMetadata(str(ROOT), {}).update(metadata)
    return metadata


def test_a_release_has_addresses_and_a_readme_that_needs_no_checkout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metadata = release_metadata(monkeypatch, "https://host.example/owner/convspectra/")
    root = "https://host.example/owner/convspectra"
    readme = metadata["readme"]["text"]
    assert metadata["urls"]["Source"] == root
    assert f"({root}/raw/HEAD/docs/figures/stable_gradients.png)" in readme
    assert f"({root}/blob/HEAD/CHANGELOG.md)" in readme
    targets = re.findall(r"\]\(([^)\s]+)\)", readme)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    paths = [target.split("/HEAD/")[1] for target in targets if "/HEAD/" in target]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_without_an_address_none_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = release_metadata(monkeypatch, "")
    assert set(metadata["urls"]) == {"Paper"}
    assert metadata["readme"]["text"] == (ROOT / "README.md").read_text()


def test_no_file_names_a_package_registry() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    # The checkout may belong to someone else (a container, a read-only copy): it is only listed.
    git = ("git", "-c", f"safe.directory={ROOT}", "ls-files", "-z")
    listed = subprocess.run(
        [*git, "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert ROOT / "pyproject.toml" in files
    naming = [
        str(path.relative_to(ROOT))
        for path in files
        if path.is_file() and REGISTRY_HOST.search(path.read_text(errors="replace"))
    ]
    assert naming == []


def test_the_registry_pattern_finds_hosts() -> None:
    hosts = [("pypi", "org"), ("files", "pythonhosted", "org"), ("download", "pytorch", "org")]
    text = [f"see https://{'.'.join(host)}/simple" for host in hosts]
    assert all(REGISTRY_HOST.search(line) for line in text)
    assert not REGISTRY_HOST.search("pip install convspectra, from PyPI; see https://pytorch.org")


def test_no_function_is_too_long() -> None:
    bodies = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                bodies[f"{path.relative_to(PACKAGE)}: {node.name}"] = length
    assert "spectra/_singular_values.py: svds" in bodies
    assert {name: n for name, n in bodies.items() if n > MAX_BODY_LINES} == {}
