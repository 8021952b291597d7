"""Create or refresh `.venv` for `make`, once per state of its inputs; print nothing when there is nothing to do.

Standard library only, and syntax that an old interpreter still parses, so that it can say why it refuses.

`.venv/.stamp` carries the state: it is removed before and written after an installation, and holds the hash of
everything that this depended on. Another hash means install again; no stamp means that the environment was never
finished, and it is rebuilt from nothing.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, ".stamp")
OLDEST = (3, 11)
INPUTS = ("pyproject.toml", "constraints.txt", os.path.join(".ci", "environment.py"))


def require_python():
    """Stop with a usable message if this interpreter is too old."""
    if sys.version_info >= OLDEST:
        return
    newer = [name for name in (f"python3.{minor}" for minor in range(20, 10, -1)) if shutil.which(name)]
    python = newer[0] if newer else "/path/to/a/newer/python3"
    found = f"{sys.executable} is Python {version(2)}"
    sys.exit(f"moefx needs Python {OLDEST[0]}.{OLDEST[1]} or newer; {found}.\nTry: make PYTHON={python}")


def version(length=3):
    """Return this interpreter's version, such as 3.11.7."""
    return ".".join(str(part) for part in sys.version_info[:length])


def key():
    """Hash what the installation depends on: its inputs, the interpreter and the place."""
    digest = hashlib.sha256()
    for part in (sys.version, os.path.realpath(sys.executable), sysconfig.get_platform(), ROOT):
        digest.update(part.encode() + b"\0")
    for name in INPUTS:
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read() + b"\0")
    return digest.hexdigest()


def read(path):
    """Return the text of a file, or "" where there is none."""
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return file.read()


def reusable():
    """Say whether `.venv` was finished once, by this Python version and in this place."""
    config = dict(line.split(" = ", 1) for line in read(os.path.join(VENV, "pyvenv.cfg")).splitlines() if " = " in line)
    made_here = config.get("command", "").endswith(VENV)
    same_python = config.get("version") == version()
    return os.path.exists(PYTHON) and os.path.exists(STAMP) and made_here and same_python


def create():
    """Make an empty `.venv` unless there is a good one; return the command prefix that runs pip for it.

    Some distributions ship pip without `ensurepip`; their pip then installs into the environment from outside.
    """
    if not reusable():
        print(f"Creating .venv with Python {version()}", flush=True)
        options = [] if has_ensurepip() else ["--without-pip"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", *options, VENV], check=True)
    inside = subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True)
    return [PYTHON, "-m", "pip"] if inside.returncode == 0 else [sys.executable, "-m", "pip", "--python", PYTHON]


def has_ensurepip():
    """Say whether `python -m venv` can install pip."""
    return subprocess.run([sys.executable, "-c", "import ensurepip"], capture_output=True).returncode == 0


def install(pip, flags):
    """Install the build requirements first, then moefx and its tools without an isolated (unpinned) build.

    Nothing is compiled to bytecode: of 15,000 modules few are ever imported, and those compile then.
    """
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "PIP_USER")}
    env.update(PYTHONNOUSERSITE="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    command = [*pip, "install", "--no-input", "--no-compile", "--constraint", "constraints.txt", *flags]
    for what in (["setuptools"], ["--no-build-isolation", "--editable", ".[dev]"]):
        subprocess.run([*command, *what], check=True, cwd=ROOT, env=env)
    subprocess.run([*pip, "check", *flags], check=True, cwd=ROOT, env=env)
    # From elsewhere, so that the installation is found and not the folder. moefx is not imported: its own errors are
    # for the checks to show.
    code = "import importlib.util, torch; assert importlib.util.find_spec('moefx')"
    subprocess.run([PYTHON, "-c", code], check=True, cwd=VENV, env=env)


def main():
    require_python()
    os.chdir(ROOT)
    lock = os.open(ROOT, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # two `make` in one folder: the second waits, then finds the stamp
    try:
        wanted = key()
        if read(STAMP) == wanted and reusable():
            return
        pip = create()
        flags = []
        if os.path.exists(STAMP):
            print("Refreshing .venv", flush=True)
            flags = ["--quiet"]  # else every package is listed as satisfied already
            os.remove(STAMP)
        install(pip, flags)
        with open(STAMP + ".new", "w", encoding="utf-8") as file:
            file.write(wanted)
        os.replace(STAMP + ".new", STAMP)
    finally:
        os.close(lock)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"The environment could not be created: `{' '.join(error.cmd)}` failed (see above).")
    except KeyboardInterrupt:
        sys.exit("Interrupted; the next `make` starts the environment again.")
