"""The package as installed: names, metadata, README."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

import kaleido_fast
from kaleido_fast import names
from kaleido_fast.cli import COMMANDS, cli
from kaleido_fast.system import versions

ROOT = Path(__file__).parent.parent


def test_every_public_name_exists_and_is_documented():
    for name in kaleido_fast.__all__:
        value = getattr(kaleido_fast, name)
        if name != "__version__":
            assert inspect.getdoc(value), f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'fast_sampel'"):
        kaleido_fast.fast_sampel  # noqa: B018


def test_import_is_light():
    code = "import sys, kaleido_fast; sys.exit(any(name in sys.modules for name in ('torch', 'triton', 'numba')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


HIDDEN = """
import importlib.metadata as metadata, sys
found = metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name == "kaleido-fast":
        raise metadata.PackageNotFoundError(name)
    return found(cls, name)
metadata.Distribution.from_name = classmethod(from_name)
"""


def in_checkout(code: str) -> subprocess.CompletedProcess:
    """Run Python code as from a plain checkout, in which the package is not installed."""
    command = [sys.executable, "-c", HIDDEN + code]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "tests"))}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_a_plain_checkout_knows_its_version():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    code = "import kaleido_fast; print(kaleido_fast.__version__)\n"
    code += "from kaleido_fast.system.versions import library_versions\n"
    result = in_checkout(code + "print(library_versions('kaleido-slow'))\nassert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[0] == version
    assert f"'kaleido-fast': '{version}'" in result.stdout and "'kaleido-slow': 'not installed'" in result.stdout
    result = in_checkout("sys.argv = ['kaleido-fast', '--version']\nfrom kaleido_fast.cli import main; main()")
    assert (result.returncode, result.stdout) == (0, f"kaleido-fast, version {version}\n"), result.stderr[-2000:]


ALONE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import importlib.util
assert importlib.util.find_spec("kaleido_kernels") is None
import kaleido_fast
kaleido_fast.InputError  # the first name that is asked for
import kaleido_kernels.shapes
print(kaleido_kernels.__file__)
"""


def test_a_checkout_on_the_path_finds_its_kernels(tmp_path):
    """As ``git clone``, ``cd`` and ``python -m kaleido_fast`` leave it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == ROOT / "kernels" / "kaleido_kernels" / "__init__.py"


def test_copies_of_no_known_version_are_told_apart(tmp_path, monkeypatch):
    """An unfinished run is not continued by sources of another version."""
    found = []
    monkeypatch.setattr(versions, "_version", lambda name: versions.NOT_INSTALLED)
    for name, text in (("a", "x = 1"), ("same", "x = 1"), ("b", "x = 2")):
        copy = tmp_path / name / "kaleido_fast" / "system"
        copy.mkdir(parents=True)
        (copy / "versions.py").write_text(text)
        monkeypatch.setattr(versions, "__file__", str(copy / "versions.py"))
        found.append(versions.package_version.__wrapped__())
    assert found[0] == found[1] != found[2]
    assert all(version.startswith("unknown (sources ") for version in found)


def test_a_plain_checkout_collects_the_tests_for_a_gpu():
    pytest.importorskip("triton")
    options = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    result = in_checkout(f"import pytest; sys.exit(pytest.main({options!r}))")
    assert result.returncode == 0, result.stdout[-3000:]
    assert "test_tuning_on_a_gpu_writes_a_table" in result.stdout and "error" not in result.stdout.splitlines()[-1]


def test_documented_defaults_are_the_defaults():
    text = inspect.getdoc(kaleido_fast.fast_sample)
    for option, value in {
        "burn_in": names.DEFAULT_BURN_IN,
        "thin": names.DEFAULT_THIN,
        "jitter": names.DEFAULT_JITTER,
        "settle": names.DEFAULT_SETTLE,
        "tol": names.DEFAULT_TOL,
    }.items():
        documented = re.search(rf"^    {option}: .*?\((\S+)\)", text, re.MULTILINE | re.DOTALL)
        assert documented, f"{option} is not documented"
        assert float(documented[1]) == value


def _code(text: str) -> list[str]:
    """Shell blocks and inline code of a Markdown text."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return blocks + re.findall(r"`([^`\n]+)`", prose)


@pytest.mark.parametrize("page", ["README.md", "docs/sampling.md"])
def test_pages_name_only_options_that_exist(page):
    text = (ROOT / page).read_text()
    commands = "\n".join(_code(text))
    for line in re.findall(r"kaleido-fast ([a-z]+)((?: +\S+)*)", commands):
        command, rest = line
        assert command in COMMANDS, f"{page} names kaleido-fast {command}"
        known = CliRunner().invoke(cli, [command, "--help"]).output
        for option in re.findall(r"--[a-z][a-z-]+", rest):
            assert option in known, f"{page} names kaleido-fast {command} {option}"


@pytest.mark.parametrize("page", ["README.md", "docs/sampling.md", "docs/embedding.md"])
def test_python_examples_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {"__name__": "example"})


def test_nothing_speaks_of_the_machine_it_was_made_on():
    for path in ROOT.rglob("*"):
        relative = path.relative_to(ROOT)
        if relative.parts[0].startswith((".", "build")) and relative.parts[0] != ".ci":
            continue
        if path.suffix in (".py", ".md", ".toml", ".txt") and path.name != Path(__file__).name:
            found = re.search(r"/work/|/root/|/tmp/|/opt/", path.read_text())
            assert found is None, f"{relative} holds {found[0] if found else ''}"


@pytest.mark.slow
def test_wheel_holds_both_packages_and_the_model(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    contents = zipfile.ZipFile(wheel).namelist()
    for wanted in ("kaleido_fast/cli/sample.py", "kaleido_fast/data/digits.safetensors", "kaleido_kernels/steps.py"):
        assert wanted in contents
    assert not [name for name in contents if name.startswith(("tests/", "benchmarks/"))]
