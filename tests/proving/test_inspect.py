"""The command that inspects kernels: what it compiles in a process of its own, what it says and refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from compiling import ROOT, run_python
from proving.test_roofline import STUDY

if importlib.util.find_spec("triton") is None:  # importing it here would fix its mode for the interpreter's tests
    pytest.skip("needs triton", allow_module_level=True)

from kaleido_kernels.onchip.plan import OnchipTile
from kaleido_kernels.proving.inspect.command import make_parser
from kaleido_kernels.proving.inspect.estimating import estimate_job
from kaleido_kernels.proving.inspect.jobs import FORM_NAMES, Job
from kaleido_kernels.proving.inspect.report import Report
from kaleido_kernels.proving.inspect.table import table, three_figures
from kaleido_kernels.proving.roofline.onchip import onchip_estimate
from kaleido_kernels.shapes import NETWORKS
from kaleido_kernels.tile import Tile

MOST_INSTRUCTIONS = {"points1d": 150, "points2d": 220}  # of a step; points2d is bound by its products


def test_an_unknown_network_is_refused(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--net", "minst"])
    assert "mnist" in capsys.readouterr().err


def test_the_table_counts_memory_instructions_in_the_loop_and_outside_of_it():
    job = Job("points1d", NETWORKS["points1d"], Tile("narrow", 64, 4), "fp16", "none")
    total, loop = {"HGMMA": 10, "STG": 9, "MUFU": 16, "all": 600}, {"HGMMA": 10, "MUFU": 15, "all": 132}
    (_, line, *_) = table([Report(job, "sm_90", 64, 0, 9216, 1.0, total, loop, (), None)]).splitlines()
    assert line.endswith("  HGMMA:10 MUFU:15 | MUFU:1 STG:9") and " 132 " in line


def test_an_estimate_of_activations_on_the_chip_is_played_from_the_tiles_slots():
    tile = OnchipTile(2)
    job = Job("mnist", NETWORKS["mnist"], tile, "fp16", "none")
    guess = estimate_job(job, None, {})
    assert guess == onchip_estimate(NETWORKS["mnist"], tile, "fp16", 100_000, 300) and guess.limit == "chain"


def run_command(*arguments: str, interpret: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return run_python("-m", "kaleido_kernels.inspect", *arguments, interpret=interpret)


def test_the_interpreter_is_refused():
    result = run_command("--net", "points1d", interpret="1")
    assert result.returncode == 2 and "TRITON_INTERPRET" in result.stderr


def test_without_triton_it_says_what_to_install():
    script = "import sys; sys.modules['triton'] = None; sys.path_importer_cache.clear()\n"
    script += "import importlib.util; importlib.util.find_spec = lambda name: None\n"
    script += "from kaleido_kernels.proving.inspect import command; sys.exit(command.main(['--net', 'points1d']))"
    result = run_python("-c", script)
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr == "error: Triton is not installed, and it compiles the kernels: pip install triton (on Linux)\n"
    )


def check_estimate(record: dict) -> None:
    """The range holds the study's figure, its middle is within a tenth of it; narrow's step loop is short.

    bf16 is held to the figures of fp16: its loops have the same copies and products.
    """
    name, precision, guess = record["net"], record["precision"], record["estimate"]
    figures = STUDY.get((name, "fp16" if precision == "bf16" else precision, record["kernel"]))
    if figures is not None:
        middle = sum(figures) / 2
        what = f"{name} {precision}: {guess['low']['milliseconds']:.4g} to {guess['high']['milliseconds']:.4g} ms"
        assert guess["milliseconds"] == pytest.approx(middle, rel=0.1), what
        assert guess["low"]["milliseconds"] <= middle <= guess["high"]["milliseconds"], what
    assert record["loop_instructions"]["all"] <= MOST_INSTRUCTIONS.get(name, 10**6) or precision == "fp16x3", name


@pytest.mark.parametrize("net", ["points1d", "mnist"])
def test_a_quick_subset_compiles_and_passes(net):
    result = run_command("--net", net, "--precision", "fp16", "--variant", "none", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    (record, *_) = json.loads(result.stdout)
    check_estimate(record)
    assert record["loop_instructions"]["HGMMA"] > 0 and record["shared"] <= 232_448
    assert all(verdict["passed"] for verdict in record["verdicts"]) and len(record["verdicts"]) >= 8
    guess = record["estimate"]
    assert guess["note"] == "model, not a measurement"
    assert 0 < guess["low"]["milliseconds"] < guess["milliseconds"] < guess["high"]["milliseconds"]
    if net == "points1d":
        assert guess["overlap"] is None, "narrow loads nothing in its loop"
    else:
        assert (guess["overlap"]["ahead"], guess["overlap"]["products"]) == (2, 1.0), "two tiles ahead, behind products"


ORDERS = """
from kaleido_kernels.proving.inspect.compiling import compile_job, disassemble
from kaleido_kernels.proving.inspect.estimating import read_overlap
from kaleido_kernels.proving.inspect.jobs import Job
from kaleido_kernels.proving.roofline.loops import Overlap
from kaleido_kernels.proving.roofline.work import stream_overlap, wide_overlap
from kaleido_kernels.shapes import NETWORKS
from kaleido_kernels.tile import Tile
from kaleido_kernels.wide.plan import WideTile

def read(net, tile, precision, planned):
    job = Job(net, NETWORKS[net], tile, precision, "none")
    return read_overlap(disassemble(compile_job(job, "sm_90").binary), planned)

for net, stages in (("digits", 2), ("digits", 3), ("deep128", 3)):
    found = read(net, Tile("stream", 128, 8, stages), "fp16", Overlap(99, 1.0, 1.0))
    assert (found.ahead, found.products) == (stages - 1, 0.0), (net, stages, found)
    assert found.ahead == stream_overlap(stages).ahead and stream_overlap(stages).products == 0, (net, found)
    assert found.other < 0.5, (net, stages, found)
for tile in (WideTile(stages=2), WideTile(inner=32, stages=4)):
    planned = wide_overlap("fp16x3", tile.stages)
    found = read("mnist", tile, "fp16x3", Overlap(planned.ahead, 9.0))
    assert abs(found.products - planned.products) < 1e-9 and found.ahead == tile.stages - 1, (tile, found)
"""


def test_stages_mean_to_the_model_what_the_compiled_loops_do():
    """Two stages of stream wait for all copies; wide in split fp32 issues them behind two of three products."""
    result = run_python("-c", ORDERS)
    assert result.returncode == 0, result.stderr


def page_of_predictions() -> dict[tuple[str, str], str]:
    """(network, precision) -> the range that docs/kernels.md shows."""
    text = (ROOT / "docs/kernels.md").read_text()
    measured = r"[\d.,]+"  # beside each range
    row = rf"^\| (\w+) \| [^|]* \| ([\d.,-]+) \| {measured} \| ([\d.,-]+) \| {measured} \| [\d-]+ % \|$"
    rows = re.findall(row, text, re.M)
    return {
        (net, form): ms.replace(",", "")
        for net, *cells in rows
        for form, ms in zip(("fp16", "fp16x3"), cells, strict=True)
    }


@pytest.mark.slow
def test_the_page_shows_what_the_command_predicts():
    result = run_command("--variant", "none", "--precision", "fp16", "--precision", "fp32", "--json")
    assert result.returncode == 0, result.stderr[-2000:]
    found = {}
    for record in json.loads(result.stdout):
        ends = [record["estimate"][end]["milliseconds"] for end in ("low", "high")]
        found[record["net"], record["precision"]] = "-".join(map(three_figures, ends))
    assert page_of_predictions() == found


SPILLING = """
from kaleido_kernels.proving.inspect import command, jobs
from kaleido_kernels.tile import Tile
jobs.planned_tiles = lambda shape, precision, arch: [Tile("narrow", 256, 4, 1)]
raise SystemExit(command.main(["--net", "points2d", "--precision", "fp16", "--variant", "none"]))
"""


def test_a_spilling_tile_ends_with_status_1():
    """256 chains on 4 warps need more than 255 registers a thread."""
    result = run_python("-c", SPILLING)
    assert result.returncode == 1 and "FAILED spills" in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("net", NETWORKS)
def test_every_configuration_passes(net):
    result = run_command("--net", net, "--json", *(word for name in FORM_NAMES for word in ("--precision", name)))
    records = json.loads(result.stdout)
    wrong = [(record["precision"], verdict) for record in records for verdict in record["verdicts"]]
    assert result.returncode == 0, [entry for entry in wrong if not entry[1]["passed"]]
    assert {record["precision"] for record in records} == {"fp16x3", "ieee", "tf32", "fp16", "bf16"}
    for record in records:
        if record["precision"] in ("fp16", "bf16", "fp16x3") and record["variant"] == "none":
            check_estimate(record)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100", "sm_120", "gfx942"])
def test_other_devices_compile(arch):
    result = run_command("--arch", arch, "--precision", "fp16")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "3.8.0"])
def test_every_configuration_compiles_under_other_releases_of_triton(version, tmp_path):
    """Registers may differ there, so that some may spill; every kernel must compile to products and be sound."""
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(tmp_path),
        f"triton=={version}",
    ]
    subprocess.run(install, check=True)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), "kernels"])
    command = [sys.executable, "-m", "kaleido_kernels.inspect", "--arch", "sm_90", "--json"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr[-2000:]
    reports = json.loads(result.stdout)
    assert len(reports) == 54
    for report in reports:
        what = f"{report['net']} {report['precision']} {report['variant']}"
        assert report["loop_instructions"].get("HGMMA", 0) > 0, what
        failed = {verdict["name"]: verdict["detail"] for verdict in report["verdicts"] if not verdict["passed"]}
        assert set(failed) <= {"spills"}, f"{what}: {failed}"
