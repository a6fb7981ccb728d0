"""The best tile of each precision of a network."""

from __future__ import annotations

from dataclasses import replace

from kaleido_fast.benchmarking.faults import DeviceLostError
from kaleido_fast.benchmarking.gpu.subjects import precisions_on
from kaleido_fast.benchmarking.gpu.work import NO_TIME, Work
from kaleido_fast.benchmarking.tuning import Measure, engine_measure, tune_model, write_table
from kaleido_fast.errors import InputError
from kaleido_fast.system.folders import user_data
from kaleido_fast.system.tuned import table_name
from kaleido_fast.system.versions import library_versions
from kaleido_kernels.tile import AnyTile
from kaleido_kernels.tuned import tile_from_json

TUNING_SHARE = 0.4  # of a network's time, where timing follows


def tune(work: Work) -> None:
    """The best tile of each precision into the record, the facts, and the table that later processes read."""
    record = work.record
    for precision in precisions_on(work.device):
        if precision not in record["tuning"] and f"tuning {precision}" not in record["failed"]:
            _tune_precision(work, precision)
        if precision in record["tuning"]:
            entry = record["tuning"][precision]
            work.facts = replace(work.facts, tuned={**work.facts.tuned, entry["key"]: entry["best"]})
    record["trials"] = {}  # they are in the entries
    work.begin("")


def _tune_precision(work: Work, precision: str) -> None:
    job, record = work.job, work.record
    tiles = [tile_from_json(values) for values in job["tiles"].get(precision, ())]
    if precision == "bf16" and "fp16" in record["tuning"]:  # the same instructions at the same speed
        tiles = [tile_from_json(record["tuning"]["fp16"]["best"])]
    rounds = max(3, job["rounds"] // 2)
    measure = engine_measure(work.model, precision, work.device, work.facts, work.n_chains, rounds)
    try:
        entry = tune_model(
            job["network"],
            work.model,
            precision,
            work.device,
            work.facts,
            work.n_chains,
            measure=_until(work, _once(work, precision, measure)),
            tiles=tiles,
        )
    except DeviceLostError:
        raise
    except Exception as problem:
        work.fail(f"tuning {precision}", problem)
        return
    record["tuning"][precision] = {**entry.record(), "explained": entry.explain()}
    if job["keep"]:
        path = user_data() / "tuned" / table_name(work.facts.name)
        write_table(path, work.facts.name, library_versions("triton")["triton"], [entry])


def _once(work: Work, precision: str, measure: Measure) -> Measure:
    """``measure`` that keeps its findings in the record, where a process that goes on after this one has them."""

    def measured(tile: AnyTile) -> list[float]:
        what, trials, failed = f"{precision} {tile}", work.record["trials"], work.record["failed"]
        if what in failed:
            raise InputError(failed[what])
        if what not in trials:
            work.begin(what)
            try:
                trials[what] = measure(tile)
            except Exception as problem:
                work.fail(what, problem)
                raise
        return list(trials[what])

    return measured


def _until(work: Work, measure: Measure) -> Measure:
    def limited(tile: AnyTile) -> list[float]:
        if work.left(TUNING_SHARE if work.job["time"] else 1.0) < 0:
            raise InputError(NO_TIME)
        return measure(tile)

    return limited
