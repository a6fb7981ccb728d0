"""What freezing saves: runs with ``tol`` against the same runs without, as the table of docs/sampling.md.

    python benchmarks/settling.py --keep settling.safetensors
    python benchmarks/settling.py --model settling.safetensors --model digits=20000 --model mine.safetensors=2000

Without ``--model`` it trains the digits network on 500 images first (about two minutes on two cores): most of its
chains arrive within some dozen steps. Runs with and without ``tol`` take turns. Distances are the largest difference
between the two final states of a chain, over its values.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from kaleido_fast import ModelCard, SampleResult, fast_sample, load_checkpoint, save_checkpoint
from kaleido_fast.benchmarking.timing import quantile, time_alternating
from kaleido_fast.cli.parameters import overwrite_option
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.reading.datasets import load_dataset
from kaleido_fast.running.result import quantiles
from kaleido_fast.system.files import atomic_path
from kaleido_fast.system.outputs import check_outputs
from kaleido_fast.training.trainer import train

IMAGES = 500
RECIPE = TrainingRecipe(steps=8000, batch_size=150, learning_rate=2e-3, noise=0.4)
COLUMNS = (
    "network",
    "chains",
    "with tol",
    "without",
    "faster",
    "chain-steps fewer",
    "steps, 50 / 90 / 100 %",
    "settled",
    "distance, 50 / 90 / 99 / 100 %",
)


@dataclass(frozen=True)
class Comparison:
    """One network with and without ``tol``.

    Args:
        name: of the network.
        chains, steps, tol: of both runs; ``steps`` is the most that a chain is run.
        engine: which ran them.
        seconds, seconds_without: wall time of each round, without packing weights.
        chain_steps, chain_steps_without: steps that were run, summed over chains.
        steps_quantiles, outcome_shares: of the run with ``tol``.
        distance_quantiles: of max over D of the difference of final states, one number a chain.
    """

    name: str
    chains: int
    steps: int
    tol: float
    engine: str
    seconds: list[float]
    seconds_without: list[float]
    chain_steps: int
    chain_steps_without: int
    steps_quantiles: dict[str, float]
    outcome_shares: dict[str, float]
    distance_quantiles: dict[str, float]

    def row(self) -> str:
        """As a row of the table."""
        used, whole = quantile(self.seconds, 0.5), quantile(self.seconds_without, 0.5)
        settled = self.outcome_shares["fixed_point"] + self.outcome_shares["cycle"]
        cells = (
            self.name,
            f"{self.chains:,}",
            f"{used:.1f} s",
            f"{whole:.1f} s",
            f"{whole / used:.1f}x",
            f"{self.chain_steps_without / self.chain_steps:.1f}x",
            " / ".join(f"{self.steps_quantiles[p]:.0f}" for p in ("50%", "90%", "100%")),
            f"{settled:.2%}",
            " / ".join(f"{self.distance_quantiles[p]:.1g}" for p in ("50%", "90%", "99%", "100%")),
        )
        return f"| {' | '.join(cells)} |"


def settling_digits() -> KaleidoMLP:
    """The digits network (hidden 256, 6 layers) on few images."""
    return train(load_dataset("digits", limit=IMAGES), preset="digits", recipe=RECIPE).model


def compare_runs(
    name: str, model: KaleidoMLP, chains: int, steps: int, tol: float, rounds: int, engine: str
) -> Comparison:
    """Time both runs in turns, and compare what they return."""
    results: dict[str, SampleResult] = {}

    def run(key: str, used: float | None, n_chains: int = chains) -> float:
        results[key] = fast_sample(model, n_chains=n_chains, burn_in=steps - 1, jitter=0.0, tol=used, engine=engine)
        return results[key].stats.setup_seconds

    for used in (tol, None):
        run("warm-up", used, n_chains=16)
    seconds = time_alternating({"with": lambda: run("with", tol), "without": lambda: run("without", None)}, rounds)
    frozen, whole = results["with"], results["without"]
    return Comparison(
        name,
        chains,
        steps,
        tol,
        frozen.stats.engine,
        seconds["with"],
        seconds["without"],
        frozen.stats.chain_steps,
        whole.stats.chain_steps,
        frozen.stats.steps_quantiles,
        frozen.stats.outcome_shares,
        quantiles((frozen.final - whole.final).abs().amax(dim=1).float()),
    )


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, help="NAME or FILE, =CHAINS after it for another number of chains.")
@click.option("--keep", type=click.Path(path_type=Path), help="Where to write the network that is trained.")
@click.option("--chains", type=click.IntRange(min=1), default=100_000, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=300, show_default=True, help="Most steps of a chain.")
@click.option("--tol", type=float, default=1e-4, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--engine", default="auto", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write every figure here.")
@overwrite_option
def main(
    models: tuple[str, ...],
    keep: Path | None,
    chains: int,
    steps: int,
    tol: float,
    rounds: int,
    engine: str,
    out: Path | None,
    overwrite: bool,
) -> None:
    """See the top of the file."""
    inputs = {f"model {text}": text.partition("=")[0] for text in models}
    outputs = {"list of figures": out, "network": keep}
    try:
        check_outputs(outputs, inputs, overwrite=overwrite, remedy="give another name")
    except InputError as problem:
        raise click.UsageError(str(problem)) from problem
    networks = []
    for text in models:
        name, _, own = text.partition("=")
        networks.append((Path(name).stem, load_checkpoint(name).model, int(own or chains)))
    if not networks:
        networks.append((f"digits, {IMAGES} images", settling_digits(), chains))
        if keep is not None:
            save_checkpoint(keep, networks[0][1], ModelCard(name=f"digits-{IMAGES}"))
    click.echo(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    found = []
    for name, model, n_chains in networks:
        found.append(compare_runs(name, model, n_chains, steps, tol, rounds, engine))
        click.echo(found[-1].row())
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
