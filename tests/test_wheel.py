"""What is installed is whole: the wheel holds everything that the package reads, and runs by itself."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from warm import Program, python

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, in a folder of their own."""
    pytest.importorskip("hatchling", reason="the wheel's builder is not installed: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_every_file_of_the_package_is_in_the_wheel(site: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {str(path) for path in found if "__pycache__" not in path.parts}

    assert files(site / "rgap") == files(ROOT / "src" / "rgap")
    assert (site / "rgap" / "py.typed").exists()


def test_an_audit_runs_from_the_wheel(site: Path, tmp_path: Path) -> None:
    """Whatever rgap has been imported before."""
    code = (
        "import sys; names = [name for name in sys.modules if name.partition('.')[0] == 'rgap']\n"
        "for name in names: del sys.modules[name]\n"
        f"sys.path.insert(0, {str(site)!r})\n"
        "from rgap.cli import main; import rgap; print(rgap.__file__); main()"
    )
    size = ("--model", "fcn3", "--input-shape", "1,12,12", "--count", "1", "--attack", "recursive")
    program = Program(python, "-c", code, "audit", *size, "--out", str(tmp_path), folder=tmp_path)
    out, err = program.communicate()
    assert program.returncode == 0, err
    assert str(site) in out
    assert (tmp_path / "audit.html").exists()


def test_mypy_sees_the_types_in_a_project_that_uses_it(tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    [packages] = environment.glob("lib/python*/site-packages")
    (packages / "rgap").symlink_to(ROOT / "src" / "rgap")
    (tmp_path / "project.py").write_text(
        "import rgap\n"
        "def first(path: str) -> str:\n"
        "    return rgap.Update.load(path).header.loss or 'none'\n"
        "def second() -> int:\n"
        "    return rgap.Update.load(3).norm\n"
    )
    # Of what it needs itself nothing is there, which takes no time to read.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nignore_missing_imports = True\n[mypy-rgap.*]\nfollow_imports = silent\n"
    )
    command = [sys.executable, "-m", "mypy", "--python-executable", str(environment / "bin" / "python"), "project.py"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    told = [line.split(": error: ") for line in found.stdout.splitlines() if ": error: " in line]
    assert [(place, message.rpartition("[")[2]) for place, message in told] == [
        ("project.py:5", "return-value]"),
        ("project.py:5", "arg-type]"),
    ], found.stdout + found.stderr
