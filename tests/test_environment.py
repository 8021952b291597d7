"""`.ci/environment.py`: what it does when, with pip replaced by a recorder (the real thing takes minutes)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "environment.py"


class Commands:
    """Stand in for `subprocess.run`: `venv` makes the files that matter, everything else succeeds and is recorded."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: list[str] = []
        self.interrupt_on: str | None = None

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        line = " ".join(command[1:])
        self.lines.append(line)
        if self.interrupt_on is not None and self.interrupt_on in line:
            raise KeyboardInterrupt
        if "venv --clear" in line:
            self.make_venv()
        return subprocess.CompletedProcess(command, 0)

    def make_venv(self) -> None:
        venv = self.root / ".venv"
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin" / "python").touch()
        (venv / ".stamp").unlink(missing_ok=True)
        version = ".".join(map(str, sys.version_info[:3]))
        (venv / "pyvenv.cfg").write_text(f"version = {version}\ncommand = python -m venv {venv}\n")

    def count(self, text: str) -> int:
        return sum(text in line for line in self.lines)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    root = tmp_path / "a folder with spaces"
    (root / ".ci").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt"):
        (root / name).write_text(name)
    (root / ".ci" / "environment.py").write_bytes(SCRIPT.read_bytes())
    return root


@pytest.fixture
def script(place: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(place)
    spec = importlib.util.spec_from_file_location("environment", place / ".ci" / "environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def commands(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    recorder = Commands(place)
    monkeypatch.setattr(script.subprocess, "run", recorder)
    return recorder


def test_first_run_installs_and_second_runs_nothing(script: ModuleType, place: Path, commands: Commands) -> None:
    script.main()
    assert commands.count("venv --clear") == 1
    assert commands.count("--constraint constraints.txt --no-build-isolation --editable .[dev]") == 1
    assert (place / ".venv" / ".stamp").exists()
    commands.lines.clear()
    script.main()
    assert commands.lines == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", ".ci/environment.py"])
def test_a_changed_input_installs_into_the_same_environment(
    script: ModuleType, place: Path, commands: Commands, name: str
) -> None:
    script.main()
    commands.lines.clear()
    (place / name).write_text("changed")
    script.main()
    assert commands.count("venv --clear") == 0
    assert commands.count("--editable") == 1


@pytest.mark.parametrize("moment", ["venv", "install", "check", "torch"])
def test_an_interrupted_run_leaves_no_stamp_and_starts_over(
    script: ModuleType, place: Path, commands: Commands, moment: str
) -> None:
    commands.interrupt_on = moment
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert not (place / ".venv" / ".stamp").exists()
    commands.interrupt_on = None
    commands.lines.clear()
    script.main()
    assert commands.count("venv --clear") == 1
    assert (place / ".venv" / ".stamp").exists()


def test_an_interrupted_refresh_invalidates_the_old_stamp(script: ModuleType, place: Path, commands: Commands) -> None:
    script.main()
    old = (place / "pyproject.toml").read_text()
    (place / "pyproject.toml").write_text("changed")
    commands.interrupt_on = "--editable"
    with pytest.raises(KeyboardInterrupt):
        script.main()
    (place / "pyproject.toml").write_text(old)
    commands.interrupt_on = None
    commands.lines.clear()
    script.main()
    assert commands.count("venv --clear") == 1


def test_a_moved_folder_is_noticed(script: ModuleType, place: Path, commands: Commands) -> None:
    script.main()
    config = place / ".venv" / "pyvenv.cfg"
    config.write_text(config.read_text().replace("a folder with spaces", "elsewhere"))
    commands.lines.clear()
    script.main()
    assert commands.count("venv --clear") == 1


def test_another_python_is_noticed(script: ModuleType, place: Path, commands: Commands) -> None:
    script.main()
    config = place / ".venv" / "pyvenv.cfg"
    config.write_text("version = 3.99.0\n" + config.read_text().split("\n", 1)[1])
    commands.lines.clear()
    script.main()
    assert commands.count("venv --clear") == 1


def test_an_old_python_is_refused_with_a_way_out(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.sys, "version_info", (3, 10, 4))
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/bin/{name}" if name == "python3.12" else None)
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer(.|\n)*3\.10(.|\n)*make PYTHON=python3\.12"):
        script.main()


def test_the_script_parses_under_an_old_grammar() -> None:
    import ast

    ast.parse(SCRIPT.read_text(), feature_version=(3, 7))
    assert os.access(SCRIPT.parent / "run", os.X_OK)
