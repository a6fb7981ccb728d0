"""The reference engine for any module that maps (n, D) to (n, D): run as in evaluation, its answers checked.

A library's kernels round differently for another number of rows, and perhaps at another place among them. So a module
always gets the same number of rows, and chain k stands in row k mod that number, unless the module is found to give
the same bits at other places: then chains that are still running move together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kaleido_fast.engines.base import Advanced, ReportSteps
from kaleido_fast.engines.reference import ReferenceEngine, add_noise, run
from kaleido_fast.errors import InputError
from kaleido_fast.modules.general import Evaluated, damaged_weight, weight_type
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.system.memory import is_lack_of_memory
from kaleido_kernels.exact import exact_products

_ROUNDING = 1024  # units in the last place by which sums of the same numbers may differ, measured at most about 100
_FAR = 2**62  # ids that no run has
_OVERSHOOT = 8  # units in the last place by which a bounded output may pass its bound


class ModuleEngine(ReferenceEngine):
    """Any module on the device that holds it.

    Args:
        module: maps (n, D) to (n, D), each row for itself. It is left as it is: see
            `kaleido_fast.modules.general.Evaluated`.
        request: what to compute, in fp32 or fp64.
        dim: D.
        data_range: (low, high), which the module's outputs keep.
        tile_rows: rows that the module gets at once, always; bits may depend on it.
        device: where the module is.

    Raises:
        InputError: fp64 of a module that cannot be copied; while running, answers of another shape, type or device,
            outside of the range, all NaN, or that depend on other rows or on the moment.
    """

    def __init__(
        self,
        module: nn.Module,
        request: SampleRequest,
        *,
        dim: int,
        data_range: tuple[float, float],
        tile_rows: int,
        device: torch.device,
    ) -> None:
        self.request, self.dim, self.data_range, self.device = request, dim, data_range, device
        self.tile_rows = tile_rows
        self.dtype = torch.float64 if request.precision == "fp64" else torch.float32
        self.answers = Answers(Evaluated.of(module), dim, data_range, self.dtype, device)
        self.step_map = self.answers

    @property
    def read_modules(self) -> tuple[nn.Module, ...]:
        """The modules whose weights a run reads as it goes on: the copy, and the caller's modules that it calls."""
        return (self.answers.form.module, *self.answers.form.borrowed)

    def advance(
        self,
        chain_ids: Tensor,
        state: Tensor | None,
        first_step: int,
        last_step: int,
        draws: Tensor | None,
        report: ReportSteps,
    ) -> Advanced:
        """See `kaleido_fast.engines.base.Engine.advance`."""
        n = len(chain_ids)
        # Not in inference mode: what a module makes there could not be used for gradients in its own forward.
        with torch.inference_mode(False), torch.no_grad(), exact_products(self.device), self.answers.running():
            final = torch.empty(n, self.dim, dtype=self.dtype, device=self.device)
            residual = torch.empty(n, dtype=torch.float32, device=self.device)
            if self.answers.movable is None:
                self._meet(chain_ids, state, first_step)
            for rows, places in self._tiles(chain_ids):
                # Rows that no chain stands in repeat one that is there: a module may not take every value.
                filled = rows[:1].repeat(self.tile_rows)
                filled[places] = rows
                tile_ids = chain_ids[filled]
                x, tile_residual = run(
                    self.step_map,
                    self.start(tile_ids) if state is None else state[filled].to(self.dtype),
                    tile_ids,
                    range(first_step, last_step),
                    self.request,
                    self.data_range,
                    partial(_keep, draws, rows, places),
                    partial(report, len(rows)),
                )
                final[rows], residual[rows] = x[places], tile_residual[places]
                self.answers.refuse_outside()
        return Advanced(final, residual)

    def _meet(self, chain_ids: Tensor, state: Tensor | None, step: int) -> None:
        """Look at the module's first answers: those of the first chains, amid others."""
        some = chain_ids[torch.arange(self.tile_rows, device=self.device) % len(chain_ids)]
        x = self.start(some) if state is None else state[: self.tile_rows].to(self.dtype)
        if len(x) < self.tile_rows:
            x = x[torch.arange(self.tile_rows, device=self.device) % len(x)]
        if self.request.schedule.is_jittered(step):
            x = add_noise(x, some, step, self.request, self.data_range)
        far = torch.arange(self.tile_rows, device=self.device) + _FAR
        self.answers.meet(x, self.start(far))

    def _tiles(self, chain_ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, places): which of the chains make up a tile, and where in it they stand."""
        every = torch.arange(len(chain_ids), device=self.device)
        if self.answers.movable:
            for rows in every.split(self.tile_rows):
                yield rows, every[: len(rows)]
            return
        tile, places = chain_ids // self.tile_rows, chain_ids % self.tile_rows
        order = tile.argsort(stable=True)
        _, sizes = tile[order].unique_consecutive(return_counts=True)
        for rows in order.split(sizes.tolist()):
            yield rows, places[rows]


def _keep(draws: Tensor | None, rows: Tensor, places: Tensor, draw: int, states: Tensor) -> None:
    if draws is not None:
        with torch.inference_mode():  # where they may have been made
            draws[rows, draw] = states[places]


class Answers:
    """A module's map on states (n, D) of the engine's type; checks what comes back.

    ``movable`` says whether a row's bits are the same at any place among the others; None before `meet`.
    """

    def __init__(
        self,
        form: Evaluated,
        dim: int,
        data_range: tuple[float, float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.name = type(form.module).__name__
        own = weight_type(form.module) or dtype
        if dtype == torch.float64 and own != dtype:
            if form.borrowed:
                raise InputError(
                    f"precision 'fp64' of a {self.name} with {_named(own)} weights that cannot be copied: "
                    "convert it before, with .double()"
                )
            form.module.double()
            own = dtype
        self.form, self.dim, self.dtype, self.device, self.own = form, dim, dtype, device, own
        self.low, self.high = data_range
        self.slack = _OVERSHOOT * max(torch.finfo(kind).eps for kind in (own, dtype)) * max(map(abs, data_range))
        self.movable: bool | None = None
        self.guarded = False
        self.excess = torch.zeros((), dtype=dtype, device=device)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Surrounds calls; see `kaleido_fast.modules.general.Evaluated.running`."""
        with self.form.running():
            yield

    def __call__(self, x: Tensor) -> Tensor:
        """One step. Values beyond the range by no more than rounding are put onto its end; more is remembered."""
        return self._inside(self._answer(x))

    def _inside(self, y: Tensor) -> Tensor:
        inside = y.clamp(self.low, self.high)
        if self.device.type == "cpu" and torch.equal(inside, y):  # on other devices a look at the values waits for them
            return inside
        excess = (y - inside).abs()
        finite = excess.isfinite()
        self.excess = torch.maximum(self.excess, torch.where(finite, excess, 0).amax())
        return torch.where(finite, inside, y)

    def meet(self, x: Tensor, others: Tensor) -> None:
        """Look at the first answers, for ``x`` (n, D), and again with each row elsewhere, amid ``others`` (n, D).

        Raises:
            InputError: what the module does cannot be sampled.
        """
        before, drew = _generator_states(self.device), False
        try:
            y = self._first_answer(x).clone()  # a module may return the same memory at each call
            drew = self._draws(x, before)
            mixed = x.flip(0)
            mixed[1::2] = others[1::2]
            apart, together = self._answer(mixed)[::2], y.flip(0)[::2]
            self.movable = bool(_same(apart, together, 0).all())
            if not self.movable:
                self._refuse_chance(x, y, drew)
                if not self._are_near(apart, together):
                    raise InputError(
                        f"a {self.name} gives a chain another answer beside other chains (statistics over the batch?): "
                        "each row must be mapped for itself, in evaluation mode too"
                    )
        finally:
            self.guarded = drew
            if drew:
                _set_generator_states(self.device, before)
        if not bool(y.isfinite().any(dim=1).any()):
            weight = damaged_weight(self.form.module)
            raise InputError(
                f"a {self.name} returned NaN or infinite values alone"
                + (f" (its weight {weight} holds such values)" if weight else "")
                + f" for finite states: finite values inside of [{self.low:g}, {self.high:g}] are needed"
            )
        self._inside(y)
        self.refuse_outside()

    def refuse_outside(self) -> None:
        """Refuse what left the data range by more than rounding since the last call: `InputError`."""
        excess = float(self.excess)
        if excess > self.slack:
            low, high = f"{self.low:g}", f"{self.high:g}"
            raise InputError(
                f"a {self.name} returned values up to {excess:.3g} outside of data_range ({low}, {high}): pass the "
                f"range that it keeps, or clamp in it: torch.nn.Sequential(module, torch.nn.Hardtanh({low}, {high}))"
            )

    def _draws(self, x: Tensor, before: list[Tensor]) -> bool:
        """Whether it was the module that took random numbers: other threads take theirs from the same generators."""
        if all(map(torch.equal, before, _generator_states(self.device))):
            return False
        with _Chance() as chance:
            self._answer(x)
        return chance.met

    def _answer(self, x: Tensor) -> Tensor:
        with self._generators():
            y = self.form.module(x.to(self.own, copy=True))  # a module may write into what it gets
        if not (isinstance(y, Tensor) and y.shape == x.shape and y.is_floating_point() and y.device == x.device):
            self._refuse_form(y, x)
        return y.detach().to(self.dtype)

    def _first_answer(self, x: Tensor) -> Tensor:
        try:
            return self._answer(x)
        except InputError:
            raise
        except Exception as problem:
            if is_lack_of_memory(problem):
                raise
            reason = (str(problem).strip() or "no reason given").splitlines()[0]
            raise InputError(
                f"a {self.name} raised {type(problem).__name__} ({reason}) for {self._given(x)}: it must map (n, D) to "
                "(n, D); pass its D as dim="
            ) from problem

    def _refuse_form(self, y: object, x: Tensor) -> None:
        if not isinstance(y, Tensor):
            came = f"a {type(y).__name__}" + (f" of {len(y)}" if isinstance(y, (tuple, list)) else "")
        else:
            came = f"{_named(y.dtype)} of shape {tuple(y.shape)} on {y.device}"
        flat = isinstance(y, Tensor) and y.ndim > 2 and len(y) == len(x) and y.numel() == x.numel()
        raise InputError(
            f"a {self.name} returned {came} for {self._given(x)}: floating values of the same shape, on the same "
            "device, are needed" + ("; append torch.nn.Flatten()" if flat else "")
        )

    def _given(self, x: Tensor) -> str:
        return f"{_named(self.own)} of shape {tuple(x.shape)} on {x.device}"

    def _refuse_chance(self, x: Tensor, y: Tensor, drew: bool) -> None:
        again = self._answer(x)
        if bool(_same(again, y, 0).all()) if drew else self._are_near(again, y):
            return
        why = "it draws random numbers in evaluation mode too" if drew else "it keeps a state, or draws numbers"
        raise InputError(
            f"a {self.name} gives another answer to the same states at each call ({why}): a map without chance is "
            "needed; noise between steps is the option jitter"
        )

    def _are_near(self, a: Tensor, b: Tensor) -> bool:
        """Whether two answers to the same states differ by no more than the order of sums explains."""
        rounding = min(0.1, _ROUNDING * max(torch.finfo(kind).eps for kind in (self.own, self.dtype)))
        scale = max(abs(self.low), abs(self.high), float(b.nan_to_num(0, 0, 0).abs().max()))
        return bool(_same(a, b, rounding * scale).all())

    def _generators(self) -> contextlib.AbstractContextManager[None]:
        """torch's random numbers stay where they are, for a module that draws some without effect."""
        if not self.guarded:
            return contextlib.nullcontext()
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])


class _Chance(TorchDispatchMode):
    """Notices operators that take random numbers, in this thread alone."""

    met = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.met = self.met or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _same(a: Tensor, b: Tensor, within: float) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= within)


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_generator_states(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
