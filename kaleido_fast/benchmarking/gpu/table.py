"""The report as Markdown: a table for people, one for a README, every figure from the record."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kaleido_fast.benchmarking.cases import SIZES
from kaleido_fast.benchmarking.report import ratio_text
from kaleido_fast.benchmarking.timing import Ratio, compare, spread
from kaleido_kernels.shapes import KERNELS

OURS = ("kernel", "public")
TORCH_PEERS = ("eager", "chunked", "cudagraph", "compile")
SIXTEEN_BIT = ("fp16", "bf16")
STEPS = 300


def markdown(record: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [f"# {record['gpu']['name']}", *_warnings(record), _made_with(record)]
    if record["ceilings"]:
        parts += ["## Ceilings", _ceilings(record["ceilings"])]
    if any(network["contestants"] for network in record["networks"].values()):
        parts += ["## Networks", _intro(record), speed_table(record), "Milliseconds of the peers:", _peer_table(record)]
    if record["checks"]:
        parts += ["## Checks against the reference", _checks(record["checks"])]
    networks = _by_size(record["networks"]).values()
    tuned = [entry["explained"] for network in networks for entry in network["tuning"].values()]
    if tuned:
        parts += ["## Tiles", "\n".join(f"- {line}" for line in tuned)]
    failed = failures(record)
    if failed:
        parts += ["## Failed, or not measured", "\n".join(f"- {line}" for line in failed)]
    return "\n\n".join(parts) + "\n"


def _by_size(networks: Mapping[str, Any]) -> dict[str, Any]:
    """Networks from small to large, in whatever order they were measured."""
    return {name: networks[name] for name in SIZES if name in networks}


def readme_part(record: Mapping[str, Any], source: str) -> str:
    """What a README shows: the table of speeds, how to read it, where the rest is."""
    return "\n\n".join([_intro(record), speed_table(record), f"{_made_with(record)} Everything: [{source}]({source})."])


def _warnings(record: Mapping[str, Any]) -> list[str]:
    lines = []
    if record["interpreter"]:
        how = "The emulator of compiled kernels" if record.get("emulated") else "Triton's interpreter"
        lines.append(f"**{how} on a CPU with tiny networks: this tries the path, no speed means anything.**")
    if record["status"] != "done":
        lines.append(f"**Not whole: {record['status']}.**")
    if record["quick"]:
        lines.append("Quick: fewer timings of less work.")
    return lines


def _made_with(record: Mapping[str, Any]) -> str:
    about, gpu = record["about"], record["gpu"]
    machine, versions = about["machine"], about["versions"]
    commit = (about["commit"] or "no commit known")[:12] + (" with local changes" if about["dirty"] else "")
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "jax") if versions.get(name))
    driver = f"driver {machine['driver']}, CUDA {machine['cuda']}, " if machine.get("driver") else ""
    states = [gpu["state"], *(state for found in record["networks"].values() for state in found["states"])]
    clocks = [float(state["clocks.sm"]) for state in states if _is_number(state.get("clocks.sm"))]
    seen = f", SM clock {min(clocks):.0f} to {max(clocks):.0f} MHz where it was read" if clocks else ""
    command = re.sub(r"(?<= )/\S*/", "", about["command"])  # where a machine keeps its files is of no use elsewhere
    return f"{about['date'][:10]}, {commit}; {driver}{libraries}{seen}. Made by `{command}`."


def _is_number(text: object) -> bool:
    return isinstance(text, str) and text.replace(".", "", 1).isdigit()


def _ceilings(found: Mapping[str, Any]) -> str:
    rows = [
        [f"matrix product {name}, side {found['side']:,}", f"{entry['flops_per_second'] / 1e12:,.1f} TFLOP/s"]
        for name, entry in found.get("matrix", {}).items()
    ]
    rows += [
        [f"copy of {entry['bytes'] / 2**20:,.0f} MiB ({place})", f"{entry['bytes_per_second'] / 1e12:,.2f} TB/s"]
        for place, entry in found.get("copy", {}).items()
    ]
    return table(["what", "rate"], rows)


def _intro(record: Mapping[str, Any]) -> str:
    chains = next(iter(record["networks"].values()))["n_chains"]
    return (
        f"Milliseconds for {chains:,} chains x {STEPS} steps, start noise and draws included: median of "
        "CUDA-event timings taken in turns, with the 20 % and 80 % quantiles. Timings of fewer steps or chains are "
        "scaled to that (marked ~). `of peak`: of the measured large matrix product in the same operands. `x best "
        "torch`: how many times faster than the fastest of eager, L2-chunked, CUDA-graphed and compiled torch with "
        "operands of as many bits; `x published`: than the published loop. `fast_sample` is never scaled: what a call "
        "takes beside its kernel does not grow with the steps, and stands in the last column."
    )


def speed_table(record: Mapping[str, Any]) -> str:
    """One line a network and precision of ours."""
    heads = ["network", "runs as", "ms", "p20 to p80", "TFLOP/s", "of peak", "x best torch", "x published", "x jax"]
    heads.append("host a launch, us")
    rows = [
        [f"`{name}`", f"{label}: {entry['about']}", *_speeds(record, network, entry), _host_cost(network, entry)]
        for name, network in _by_size(record["networks"]).items()
        for label, entry in network["contestants"].items()
        if entry["kind"] in OURS
    ]
    return table(heads, rows)


def _speeds(record: Mapping[str, Any], network: Mapping[str, Any], timed: Mapping[str, Any]) -> list[str]:
    """Milliseconds, their spread, rates and ratios; a dash each where no whole run of a call was timed."""
    entry, others = as_whole(network, timed), network["contestants"]
    if entry is None:
        return ["-"] * 7
    scale = entry["milliseconds"] / entry["median"]
    best = best_torch(others, entry["precision"])
    return [
        _milliseconds(network, entry),
        f"{short(entry['p20'] * scale)} to {short(entry['p80'] * scale)}",
        f"{entry['flops_per_second'] / 1e12:,.1f}",
        peak_share(record, entry),
        _times(entry, others.get(best or "")) + (f" ({best})" if best else ""),
        _times(entry, others.get("published")),
        _times(entry, others.get("jax")) if entry["precision"] == "fp32" else "-",
    ]


def as_whole(network: Mapping[str, Any], entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """An entry with the figures of whole runs: of a call of `fast_sample`, those that were timed whole, or None.

    A call costs the same whatever its steps: scaled from a few steps to all it would be counted many times over.
    """
    if entry["kind"] != "public":
        return entry
    seconds = entry["seconds"] if entry["n_steps"] == STEPS else entry.get("whole_run_seconds")
    if not seconds:
        return None
    times, flops = spread(seconds), network["n_chains"] * STEPS * network["flops_per_step"]
    found = {"seconds": seconds, "n_steps": STEPS, "median": times.median, "p20": times.p20, "p80": times.p80}
    found |= {"milliseconds": 1e3 * times.median, "flops_per_second": flops / times.median}
    return {name: value for name, value in {**entry, **found}.items() if name != "whole_run_seconds"}


def call_seconds(network: Mapping[str, Any], entry: Mapping[str, Any]) -> float | None:
    """What a call of `fast_sample` takes beside the steps of its kernel, both as they were timed in turns."""
    kernel = network["contestants"].get(f"triton-{entry['precision']}")
    if kernel is None:
        return None
    each = kernel["median"] / (kernel["n_chains"] * kernel["n_steps"])
    return entry["median"] - each * entry["n_chains"] * entry["n_steps"]


def _host_cost(network: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """Python's microseconds of a launch; of a call of `fast_sample`, all that it takes beside its kernel's steps."""
    if entry["kind"] == "public":
        seconds = call_seconds(network, entry)
        return "-" if seconds is None else f"a call beside the kernel: {1e6 * seconds:,.0f}"
    return f"{entry['launch_microseconds']:.0f}" if "launch_microseconds" in entry else "-"


def best_torch(timed: Mapping[str, Any], precision: str) -> str | None:
    """The fastest torch peer with operands of as many bits."""
    alike = SIXTEEN_BIT if precision in SIXTEEN_BIT else (precision,)
    peers = [
        name
        for name, entry in timed.items()
        if entry["kind"] == "peer" and entry["precision"] in alike and name.split("-")[0] in TORCH_PEERS
    ]
    return min(peers, key=lambda name: timed[name]["milliseconds"], default=None)


def peak_share(record: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """Share of the matrix product's rate in the same operands; fp32 of plain fp32's."""
    peak = record["ceilings"].get("matrix", {}).get(entry["precision"])
    return f"{entry['flops_per_second'] / peak['flops_per_second']:.0%}" if peak else "-"


def _times(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> str:
    return "-" if theirs is None else ratio_text(ratio(ours, theirs))


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Ratio:
    """Speed over another's, per chain and step."""
    return compare(*([x / (e["n_chains"] * e["n_steps"]) for x in e["seconds"]] for e in (ours, theirs)))


def _milliseconds(network: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    scaled = entry["n_steps"] != STEPS or entry["n_chains"] != network["n_chains"]
    whole = entry.get("whole_run_seconds")
    text = ("~" if scaled else "") + short(entry["milliseconds"])
    return text + (f" (whole: {short(1e3 * sorted(whole)[len(whole) // 2])})" if whole else "")


def _peer_table(record: Mapping[str, Any]) -> str:
    networks = _by_size(record["networks"])
    names = dict.fromkeys(
        name for found in networks.values() for name, entry in found["contestants"].items() if entry["kind"] == "peer"
    )
    rows = [
        [f"`{network}`"]
        + [_milliseconds(found, found["contestants"][name]) if name in found["contestants"] else "-" for name in names]
        for network, found in networks.items()
    ]
    return table(["network", *names], rows)


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    """One line a kernel and precision: how many networks were right, largest errors, wrong ones too, what failed."""
    rows = []
    kinds = {(entry["kernel"], entry["precision"]) for entry in checks}
    for kernel, precision in sorted(kinds, key=lambda kind: (KERNELS.index(kind[0]), kind[1])):
        alike = [entry for entry in checks if (entry["kernel"], entry["precision"]) == (kernel, precision)]
        right, wrong = ([entry for entry in alike if bool(entry["problem"]) == bad] for bad in (False, True))
        rows.append(
            [
                kernel,
                precision,
                f"{len(right)} of {len(alike)}",
                *(_largest(alike, key) for key in ("error", "jittered_error")),
                str(min((entry["same_bits_times"] for entry in right), default="-")),
                "; ".join(f"{entry['network']}: {entry['problem']}" for entry in wrong).replace("|", "/"),
            ]
        )
    heads = ["kernel", "precision", "networks right", "largest error", "with jitter", "runs with the same bits"]
    return table([*heads, "what failed"], rows)


def _largest(checks: Sequence[Mapping[str, Any]], key: str) -> str:
    errors = [entry[key] for entry in checks if key in entry]
    return f"{max(errors, key=lambda error: (error != error, error)):.1e}" if errors else "-"  # NaN is the largest


def failures(record: Mapping[str, Any]) -> list[str]:
    """Everything that failed or was left out, a line each."""
    lines = [f"{name}: {text}" for name, text in record["failed"].items()]
    for entry in [*record["checks"], *record["proofs"]]:
        if entry["problem"]:
            what = entry.get("kernel") or entry["tile"]
            lines.append(f"{entry['network']} {entry['precision']} {what}: {entry['problem']}")
    for name, network in record["networks"].items():
        lines += [f"{name}, {what}: {text}" for what, text in network["failed"].items()]
    return [*lines, *(f"{name}: {text}" for name, text in record.get("skipped", {}).items())]


def short(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers to the right."""
    words = (heads[0], "runs as", "precision", "what failed")
    marks = ["---" if head in words else "---:" for head in heads]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, marks, *rows))
