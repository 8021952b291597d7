"""What the package ships, what it needs, and what importing it costs."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moefx

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OPTIONAL = ("diffusers", "transformers", "accelerate", "peft", "triton", "sklearn", "matplotlib")
FOLDERS = {"moefx": ROOT / "moefx", "moefx.passes": ROOT / "passes", "moefx.codegen": ROOT / "codegen"}


def python(code: str, cwd: Path, **env: str) -> str:
    """Run a snippet in a fresh interpreter without the repository on its path."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COVERAGE_PROCESS_START")}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed() -> importlib.metadata.Distribution:
    """Return the installed moefx, and not the `moefx.egg-info` that a build left in the repository."""
    found = importlib.metadata.distributions(name="moefx")
    return next(distribution for distribution in found if distribution.read_text("RECORD"))


def tree() -> Iterator[str]:
    """Yield the dotted name of every package in the three source folders."""
    for name, folder in FOLDERS.items():
        for init in folder.rglob("__init__.py"):
            if name == "moefx" and init.relative_to(folder).parts[0] in ("passes", "codegen"):
                continue
            yield ".".join((name, *init.parent.relative_to(folder).parts))


# -------------------------------------------------------------------------------------------------- pyproject and tree


def test_listed_packages_equal_the_tree() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(tree())


def test_every_folder_with_python_files_is_a_package() -> None:
    for folder in FOLDERS.values():
        loose = {file.parent for file in folder.rglob("*.py") if not (file.parent / "__init__.py").exists()}
        assert not loose, "Python files outside a package are left out of the wheel"


def test_version_is_stated_once_in_effect() -> None:
    assert PROJECT["project"]["version"] == moefx.__version__ == installed().version


@pytest.mark.parametrize(("link", "target"), [("moefx/passes", "../passes"), ("moefx/codegen", "../codegen")])
def test_links_are_committed_as_links(link: str, target: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    entry = subprocess.run(
        ["git", "ls-files", "--stage", link], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert entry.startswith("120000 ")
    assert os.readlink(ROOT / link) == target


# ---------------------------------------------------------------------------------------------------- pinned versions


def pins() -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)}


def closure() -> dict[str, str]:
    """Return name and installed version of all that `moefx[dev]` and its build bring in on this machine."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [("moefx", "dev"), *((Requirement(text).name, "") for text in PROJECT["build-system"]["requires"])]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        distribution = installed() if name == "moefx" else importlib.metadata.distribution(name)
        found[canonicalize_name(name)] = distribution.version
        for requirement in map(Requirement, distribution.requires or ()):
            marker = requirement.marker
            if marker is None or marker.evaluate({"extra": extra}):
                todo += [(requirement.name, "")] + [(requirement.name, wanted) for wanted in requirement.extras]
    found.pop("moefx")
    # What a GPU build of torch adds is torch's to pin: it does so exactly.
    return {name: version for name, version in found.items() if not name.startswith(("nvidia-", "cuda-"))}


def test_constraints_pin_everything_that_is_installed() -> None:
    pinned = pins()
    assert sorted(set(closure()) - set(pinned)) == []
    different = {
        name: (version, pinned[name]) for name, version in closure().items() if version.split("+")[0] != pinned[name]
    }
    assert different == {}, "installed (left) differs from constraints.txt (right)"


def test_constraints_pin_nothing_that_is_not_needed() -> None:
    elsewhere = {"triton"}  # Linux only
    assert sorted(set(pins()) - set(closure()) - elsewhere) == []


def test_no_file_of_the_environment_names_a_registry() -> None:
    for name in ("constraints.txt", "pyproject.toml", "Makefile", ".ci/environment.py", ".ci/run"):
        assert not re.search(r"index-url|find-links|file://|https?://\S*simple", (ROOT / name).read_text()), name


# --------------------------------------------------------------------------------------------------------------- wheel


@pytest.fixture(scope="module", params=[["--wheel"], []], ids=["from the tree", "from the sdist"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that no `build/` left in the repository can leak into it."""
    copy = tmp_path_factory.mktemp("source of the wheel") / "copy"
    keep = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
    copy.mkdir()
    for name in keep:
        shutil.copy(ROOT / name, copy)
    for name in ("moefx", "passes", "codegen"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", *request.param]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (copy / "dist").glob("moefx-*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {name for name in names if ".dist-info/" not in name}
    expected = {"moefx/py.typed", "moefx/codegen/schedules.json"}
    for package, folder in FOLDERS.items():
        expected |= {
            f"{package.replace('.', '/')}/{file.relative_to(folder).as_posix()}"
            for file in folder.rglob("*.py")
            if not (package == "moefx" and file.relative_to(folder).parts[0] in ("passes", "codegen"))
        }
    assert shipped == expected
    assert {"moefx/passes/__init__.py", "moefx/codegen/__init__.py"} <= shipped
    assert {name.split("/")[0] for name in shipped} == {"moefx"}


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"moefx-{moefx.__version__}.dist-info"
    metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == moefx.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert f"{info}/licenses/LICENSE" in archive.namelist()
    entries = archive.read(f"{info}/entry_points.txt").decode()
    assert "moefx = moefx.cli:main" in entries
    assert "moefx = moefx.backend:compile" in entries


def test_wheel_imports_from_elsewhere(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import pathlib, pkgutil, importlib, sys, moefx, moefx.passes, moefx.codegen\n"
        "names = [m.name for m in pkgutil.walk_packages(moefx.__path__, 'moefx.') if '__main__' not in m.name]\n"
        "[importlib.import_module(name) for name in names]\n"
        "print(*{pathlib.Path(sys.modules[name].__file__).is_relative_to(sys.argv[1]) for name in names})\n"
    )
    code = code.replace("sys.argv[1]", repr(str(unpacked)))
    # `-S` is no option: torch lives in site-packages. PYTHONPATH comes before it, hence before the editable install.
    assert python(code, cwd=tmp_path, PYTHONPATH=str(unpacked)).split() == ["True"]


def test_entry_points_resolve() -> None:
    for group, name in (("console_scripts", "moefx"), ("torch_dynamo_backends", "moefx")):
        (entry,) = installed().entry_points.select(group=group, name=name)
        assert callable(entry.load())


# ------------------------------------------------------------------------------------------------------------- imports


def test_importing_moefx_leaves_no_top_level_passes(tmp_path: Path) -> None:
    code = "import sys, moefx.passes, moefx.codegen; print([n for n in ('passes', 'codegen') if n in sys.modules])"
    assert python(code, cwd=tmp_path).strip() == "[]"


def test_core_imports_without_optional_packages(tmp_path: Path) -> None:
    code = f"""
import sys

class Hiding:
    # The optional packages look as if they were not installed.

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {OPTIONAL!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
import importlib, pkgutil, moefx
for module in pkgutil.walk_packages(moefx.__path__, "moefx."):
    if "__main__" not in module.name:
        importlib.import_module(module.name)
print("ok")
"""
    assert python(code, cwd=tmp_path).strip() == "ok"


def test_importing_moefx_loads_no_optional_package(tmp_path: Path) -> None:
    code = f"import sys, moefx; print([name for name in {OPTIONAL!r} if name in sys.modules])"
    assert python(code, cwd=tmp_path).strip() == "[]"
