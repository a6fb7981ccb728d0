"""Peak memory and speed of runs that stream their draws to a store, against short runs and runs that discard them.

    python benchmarks/streaming.py --out streaming.json

Memory is about chains, not steps: chains run few steps, so that millions of them take minutes. Networks have random
weights in the shapes of the reference networks, spread so that chains stay apart: draws that hardly compress are the
dearest to write.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kaleido_fast import KaleidoMLP, sample_to
from kaleido_fast.benchmarking.cases import random_network
from kaleido_fast.errors import InputError
from kaleido_fast.progress import Meter
from kaleido_fast.running.blocks import run_blocks, split
from kaleido_fast.running.engine import build_phases
from kaleido_fast.sampling import prepare_run
from kaleido_fast.system.files import atomic_path
from kaleido_fast.system.outputs import check_outputs

CASES = {"points2d": (10_000_000, 3), "digits": (2_000_000, 0)}  # chains, burn_in
TIMED = {"points2d": (500_000, 49), "digits": (60_000, 19)}  # speed is of runs with as many steps as people use
BASE = 100_000


def spread_network(network: str) -> KaleidoMLP:
    """A reference network whose chains neither meet nor rest at the bounds: outputs of mean 0 and deviation 1.5."""
    model = random_network(network)
    spec, last = model.spec, model.linears[-1]
    generator = torch.Generator().manual_seed(0)
    states = spec.low + (spec.high - spec.low) * torch.rand((4096, spec.dim), generator=generator)
    with torch.no_grad():
        for layer in model.linears[:-1]:
            states = layer(states).relu()
        outputs = states @ last.weight.T
        scale = 1.5 / outputs.std(0)
        last.weight.mul_(scale[:, None])
        last.bias.copy_(-scale * outputs.mean(0))
    return model


def run_once(network: str, n_chains: int, burn_in: int, folder: Path, *, discard: bool) -> dict[str, Any]:
    """One run in this process."""
    torch.set_num_threads(1)
    model = spread_network(network)
    options: dict[str, Any] = {"n_chains": n_chains, "burn_in": burn_in, "tol": None, "device": "cpu"}
    began = time.perf_counter()
    if discard:
        run = prepare_run(model, stored=True, **options)
        phases = build_phases(run.subject, run.request, run.plan, run.device)
        began = time.perf_counter()
        for block in run_blocks(
            run, phases, split(n_chains, run.plan.block_chains), Meter(n_chains, burn_in + 1, None)
        ):
            del block
    else:
        result = sample_to(folder / "a.zarr", model, **options)
        assert result is not None
        assert result.stats is not None
        began = time.perf_counter() - result.stats.seconds
    seconds = time.perf_counter() - began
    n_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    n_files = sum(file.is_file() for file in folder.rglob("*"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"chains": n_chains, "seconds": seconds, "peak_MiB": peak, "bytes": n_bytes, "files": n_files}


def in_new_process(network: str, n_chains: int, burn_in: int, folder: str | None, *, discard: bool) -> dict[str, Any]:
    """One run in a process of its own, in a fresh folder."""
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        args = [network, str(n_chains), str(burn_in), str(place), str(int(discard))]
        done = subprocess.run([sys.executable, __file__, "--child", *args], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)
    finally:
        shutil.rmtree(place)


def measure(network: str, n_chains: int, burn_in: int, rounds: int, folder: str | None) -> dict[str, Any]:
    """Memory of a long run against a short one; speed of writing against discarding, in turns."""
    short = in_new_process(network, BASE, burn_in, folder, discard=False)
    long = in_new_process(network, n_chains, burn_in, folder, discard=False)
    kept, discarded = [], []
    timed, steps = TIMED[network]
    for _ in range(rounds):
        kept.append(in_new_process(network, timed, steps, folder, discard=False)["seconds"])
        discarded.append(in_new_process(network, timed, steps, folder, discard=True)["seconds"])
    return {
        "steps": burn_in + 1,
        "short": short,
        "long": long,
        "memory_ratio": long["peak_MiB"] / short["peak_MiB"],
        "timed_chains": timed,
        "timed_steps": steps + 1,
        "seconds_written": sorted(kept)[rounds // 2],
        "seconds_discarded": sorted(discarded)[rounds // 2],
    }


def as_text(facts: dict[str, Any]) -> str:
    """The figures of one network in a line."""
    long, cost = facts["long"], facts["seconds_written"] / facts["seconds_discarded"] - 1
    return (
        f"{long['chains']:,} chains x {facts['steps']} steps peak at {long['peak_MiB']:,.0f} MiB, "
        f"{facts['memory_ratio'] - 1:+.1%} against {BASE:,} chains, and store {long['bytes'] / 1e6:,.0f} MB; "
        f"writing {facts['timed_chains']:,} chains x {facts['timed_steps']} steps takes {cost:+.1%} against discarding"
    )


def main() -> None:
    """Measure all cases."""
    if sys.argv[1:2] == ["--child"]:
        network, chains, steps, folder, discard = sys.argv[2:]
        facts = run_once(network, int(chains), int(steps), Path(folder), discard=discard == "1")
        print(json.dumps(facts))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there under that name")
    parser.add_argument("--network", choices=CASES, action="append", help="measure this one alone [default: all]")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full numbers of chains")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each kind")
    parser.add_argument("--folder", help="where stores are written [default: the system's temporary folder]")
    args = parser.parse_args()
    try:
        check_outputs({"list of figures": args.out}, overwrite=args.overwrite)
    except InputError as problem:
        parser.error(str(problem))
    found = {}
    for name in args.network or CASES:
        n_chains, burn_in = CASES[name]
        facts = measure(name, int(n_chains * args.scale), burn_in, args.rounds, args.folder)
        found[name] = facts
        print(f"{name}: {as_text(facts)}", flush=True)
    if args.out is not None:
        with atomic_path(args.out) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
