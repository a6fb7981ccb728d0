"""The Triton engine: packs a network for a fused kernel and launches it. It alone imports device code."""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import replace

import torch
from torch import Tensor

from kaleido_fast.engines.base import Advanced, Checked, CheckedRun, Halts, ReportSteps
from kaleido_fast.engines.reference import first_states
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.planning.plan import KernelPlan
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.system.devices import on_device
from kaleido_kernels import kernels
from kaleido_kernels.arguments import LaunchKind
from kaleido_kernels.launch import LaunchRequest, Outputs, kind_of
from kaleido_kernels.schedule import Checks


class TritonEngine:
    """Fused kernels on a CUDA device; on CPU tensors under Triton's interpreter, for tests.

    Args:
        model: the network; its weights are packed for the kernel.
        request: what to compute.
        plan: kernel, tile and device precision.
        device: where.

    Raises:
        InputError: weights that the plan was not made for.
    """

    def __init__(self, model: KaleidoMLP, request: SampleRequest, plan: KernelPlan, device: torch.device) -> None:
        self.request, self.device, self.spec, self.plan = request, device, model.spec, plan
        try:
            self.launch = kernels.make_launcher(
                plan.choice.tile,
                plain_layers(model),
                model.spec,
                plan.precision,
                device,
                n_programs=plan.n_programs,
                capture=device.type == "cuda" and torch.version.hip is None,
            )
        except ValueError as problem:
            raise InputError(f"engine 'triton': {problem}") from problem
        self.compile_seconds = 0.0
        self._launched: set[LaunchKind] = set()
        self._launching = threading.Lock()

    def with_request(self, request: SampleRequest) -> TritonEngine:
        """See `kaleido_fast.engines.base.Engine.with_request`.

        It must run on the same stream, because both share the kernel's scratch.
        """
        other = copy.copy(self)
        other.request, other.compile_seconds = request, 0.0
        return other

    def start(self, chain_ids: Tensor) -> Tensor:
        """Start noise of the chains, (n, D)."""
        spec, request = self.spec, self.request
        return first_states(chain_ids, spec.dim, request, (spec.low, spec.high))

    def advance(
        self,
        chain_ids: Tensor,
        state: Tensor | None,
        first_step: int,
        last_step: int,
        draws: Tensor | None,
        report: ReportSteps,
    ) -> Advanced:
        """See `kaleido_fast.engines.base.Engine.advance`; one launch, whatever the number of steps."""
        n = len(chain_ids)
        outputs = Outputs(self._empty(n, self.spec.dim), self._empty(n), draws)
        self._timed_launch(self._request(chain_ids, state, first_step, last_step), outputs)
        report(n * (last_step - first_step))
        return Advanced(outputs.final, outputs.residual)

    @property
    def checked(self) -> CheckedRun | None:
        """See `kaleido_fast.engines.base.Engine.checked`; the graph path's launches hold one step each."""
        return self._advance_checked if kernels.plan(self.plan.choice.kernel).TAKES_CHECKS else None

    def _advance_checked(
        self,
        chain_ids: Tensor,
        state: Tensor | None,
        first_step: int,
        last_step: int,
        checks: Checks,
        report: ReportSteps,
    ) -> Checked:
        n, dim = len(chain_ids), self.spec.dim
        saved = self._empty(n, dim).fill_(torch.inf) if checks.saved is None else checks.saved.contiguous()
        inside = replace(checks, checks_passed=checks.checks_passed.contiguous(), saved=saved)
        passed, halt = (self._empty(n, dtype=torch.int32) for _ in range(2))
        outputs = Outputs(self._empty(n, dim), self._empty(n), None, passed, halt)
        self._timed_launch(replace(self._request(chain_ids, state, first_step, last_step), checks=inside), outputs)
        report(n * (last_step - first_step))
        return Checked(outputs.final, outputs.residual, passed, Halts.from_signed(halt))

    def _request(self, chain_ids: Tensor, state: Tensor | None, first_step: int, last_step: int) -> LaunchRequest:
        return LaunchRequest(
            n_chains=len(chain_ids),
            schedule=self.request.schedule,
            seed=self.request.seed,
            chain_ids=chain_ids.contiguous(),
            init=self.request.init,
            first_step=first_step,
            run_steps=last_step - first_step,
            start=None if state is None else state.to(torch.float32).contiguous(),
        )

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _timed_launch(self, request: LaunchRequest, outputs: Outputs) -> None:
        """Launch; on a GPU the first call of a kind returns when it is compiled, which is the time that is kept."""
        kind = kind_of(request, outputs)
        began = time.perf_counter()
        with self._launching, torch.inference_mode(), on_device(self.device):
            self.launch(request, outputs)
        if kind not in self._launched:
            self._launched.add(kind)
            self.compile_seconds += time.perf_counter() - began if _compiles(self.device) else 0.0


def _compiles(device: torch.device) -> bool:
    """Whether kernels are compiled, and not interpreted, there."""
    return device.type == "cuda"


def plain_layers(model: KaleidoMLP) -> list[tuple[Tensor, Tensor | None]]:
    """(weight, bias) of every layer, fp32 on the host, as kernels are packed from."""
    return [_plain_layer(layer) for layer in model.linears]


def _plain_layer(layer: torch.nn.Linear) -> tuple[Tensor, Tensor | None]:
    bias = None if layer.bias is None else layer.bias.detach().to("cpu", torch.float32)
    return layer.weight.detach().to("cpu", torch.float32), bias
