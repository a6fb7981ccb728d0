"""One safetensors file per model: weights, specification, how it was made, how to sample it. No pickle anywhere.

Layout: the tensors of ``KaleidoMLP.state_dict()`` in fp32 or fp16, and one metadata entry ``kaleido_fast``: JSON with
``version`` ("1"), ``spec`` and ``card`` (JSON texts) and ``checksum`` (SHA-256 over spec, card and tensors), see
`kaleido_fast.system.sealed`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.model import KaleidoMLP, ModelSpec, check_finite, model_hash, named_weights, plain_mlp, weights_hash
from kaleido_fast.names import ATTRACTORS_MODEL, BUILT_IN_PREFIX, DEFAULT_MODEL
from kaleido_fast.planning.jitter import fit_to_noise
from kaleido_fast.planning.merging import choose_sampler
from kaleido_fast.planning.spacing import JITTERED_STEPS, default_thin, recommended_options
from kaleido_fast.presets import PRESETS
from kaleido_fast.scalars import json_number, plain_fields, refuse_truth_values
from kaleido_fast.system.neutral import neutral
from kaleido_fast.system.sealed import UNREADABLE, checksum_of, read_sealed, write_sealed

ENTRY, VERSION = "kaleido_fast", "1"
WEIGHTS = {"fp32": torch.float32, "fp16": torch.float16}  # types of stored weights, by a recipe's name for them


@dataclass(frozen=True)
class Scaling:
    """How raw data values became model values: ``model = raw * scale + offset``."""

    scale: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        plain_fields(self)
        refuse_truth_values(scale=self.scale, offset=self.offset)
        if not (self.scale > 0 and abs(self.scale) < float("inf") and abs(self.offset) < float("inf")):
            raise InputError(f"scaling with scale {self.scale} and offset {self.offset}: both finite, scale above 0")

    def apply(self, raw: Tensor) -> Tensor:
        """Raw values to model values."""
        return raw * self.scale + self.offset

    def undo(self, values: Tensor) -> Tensor:
        """Model values back to raw values."""
        return (values - self.offset) / self.scale


@dataclass(frozen=True)
class ModelCard:
    """What a checkpoint says about its model besides its weights.

    Args:
        name: short name.
        recipe: training recipe, as the trainer took it.
        dataset: name, sha256, number of examples.
        scaling: raw data to model values.
        final_loss: of the kept weights by the held-out measure; None if unknown.
        diagnostics: of attractors: spectral radius at training examples, share of stable ones, and the like; of a flow:
            errors by the share of noise, and how new its samples are.
        sampling: recommended options: burn_in, thin, jitter, settle, tol, or sampler ("flow"), steps, noise_from,
            noise_to. `fast_sample` starts from them. Beside a measure of mixing in ``diagnostics``, thin is the
            distance of several draws of a chain.
        created_with: versions of the libraries that wrote the file.
    """

    name: str = "unnamed"
    recipe: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    scaling: Scaling = field(default_factory=Scaling)
    final_loss: float | None = None
    diagnostics: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    created_with: dict[str, str] = field(default_factory=dict)

    def settings(self, **explicit: Any) -> dict[str, Any]:
        """Options for `fast_sample` of the bare model: those recommended, over which ``explicit`` ones win.

        ``thin`` goes with ``n_draws``: see `kaleido_fast.planning.spacing.default_thin`. What is recommended for one
        sampler does not hold for another.
        """
        sampler, recommended = choose_sampler(explicit, recommended_options(self.sampling, self.diagnostics))
        options = {**recommended, **explicit}
        if sampler == "flow":
            return options
        noise = explicit.get("noise", "normal")
        options = fit_to_noise(options, explicit, noise)
        if "thin" not in explicit:
            options["thin"] = default_thin(options, explicit.get("n_draws", 1), noise)
        return {name: value for name, value in options.items() if name != JITTERED_STEPS}

    def to_json(self) -> str:
        """The card as canonical JSON text."""
        return json.dumps(asdict(self), sort_keys=True, default=json_number)

    @classmethod
    def from_json(cls, text: str) -> ModelCard:
        """Read back `to_json`; unknown fields raise `InputError`."""
        fields = json.loads(text)
        try:
            fields["scaling"] = Scaling(**fields.get("scaling", {}))
            return cls(**fields)
        except (TypeError, AttributeError) as problem:
            raise InputError(f"model card does not fit this version: {problem}") from problem


@dataclass(frozen=True)
class Checkpoint:
    """A model as read from a file: in eval mode, on the CPU, fp32. It is sampled without reading the file again.

    Args:
        model: its weights may be changed; runs take them as they are then.
        card: how it was made, and how to sample it.
        model_hash: of the weights in the file.
        path: the file.
    """

    model: KaleidoMLP
    card: ModelCard
    model_hash: str
    path: Path


def bundled_path(name: str) -> Path:
    """Where the bundled checkpoint called ``name`` would lie."""
    return Path(__file__).parent / "data" / f"{name}.safetensors"


@neutral()
def save_checkpoint(path: str | Path, model: nn.Module, card: ModelCard) -> str:
    """Write a checkpoint in place of what is there; it appears only when whole. Returns the hash of what is stored.

    Args:
        path: the file.
        model: a `KaleidoMLP`, or a Sequential that is one (see `kaleido_fast.model.plain_mlp`). Parametrised, pruned
            and normed layers are stored with the weights in force.
        card: what else to say of it. Where its recipe has ``weights`` "fp16", they are rounded to that and stored so.

    Raises:
        UnknownModuleError: a model that weights alone do not describe: hooks, a forward of its own, other layers.
        InputError: weights that are not finite, also as fp16, or a path that cannot be written.
    """
    model = plain_mlp(model)
    check_finite(model)
    dtype = _stored_type(card)
    # Copies: layers may be shared, and safetensors takes no shared memory.
    tensors = {name: t.to("cpu", dtype, copy=True).contiguous() for name, t in named_weights(model)}
    large = next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
    if large is not None:
        raise InputError(
            f"model weight {large} has values above {torch.finfo(dtype).max:g}, the largest in fp16: store weights as "
            "fp32"
        )
    spec, card_text = model.spec.to_json(), card.to_json()
    texts = {"spec": spec, "card": card_text}
    write_sealed(Path(path), ENTRY, VERSION, texts, tensors, checksum_of(spec + card_text, tensors))
    return weights_hash(model.spec, tensors.items())


def _stored_type(card: ModelCard) -> torch.dtype:
    name = card.recipe.get("weights", "fp32")
    if name not in WEIGHTS:
        raise unknown_name("weights", str(name), WEIGHTS)
    return WEIGHTS[name]


@neutral()
def load_checkpoint(source: str | Path = DEFAULT_MODEL) -> Checkpoint:
    """Read a checkpoint from a path or the name of a bundled model.

    Where a file has the name of a bundled model, ``builtin:digits`` is the model and ``./digits`` the file.

    Raises:
        InputError: missing, truncated, changed, of another format or of an unknown version; shapes that do not fit the
            specification; weights that are not finite.
    """
    path = _find(source)
    metadata, tensors = _read(path)
    header = _parse_header(path, metadata)
    if header["checksum"] != checksum_of(header["spec"] + header["card"], tensors):
        raise InputError(f"checkpoint {path} is damaged: its checksum does not match; get or train it anew")
    try:
        spec, card = ModelSpec.from_json(header["spec"]), ModelCard.from_json(header["card"])
    except ValueError as problem:
        raise InputError(f"checkpoint {path}: {problem}") from problem
    model = _build(path, spec, tensors)
    check_finite(model)
    return Checkpoint(model.eval(), card, model_hash(model), path)


def _find(source: str | Path) -> Path:
    name = str(source)
    by_name = name.startswith(BUILT_IN_PREFIX)
    name = name.removeprefix(BUILT_IN_PREFIX)
    path, bundled = Path(name), bundled_path(name)
    known = (*PRESETS, ATTRACTORS_MODEL)
    if by_name and name not in known:
        raise unknown_name("bundled model", name, known)
    if path.is_file() and not by_name:
        if isinstance(source, str) and name in known and bundled.is_file():
            raise InputError(
                f"{name!r} is a bundled model, and a file of that name lies here: write {BUILT_IN_PREFIX}{name} for "
                f"the model, ./{name} for the file"
            )
        return path
    if name in known:
        if bundled.is_file():
            return bundled
        raise InputError(f"no trained model {name!r} is bundled: make one with kaleido-fast train --preset {name}")
    if path.is_dir():
        raise InputError(f"checkpoint {path} is a folder: give the .safetensors file itself")
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"checkpoint {path} does not exist: give a .safetensors file, or the name of a bundled model")
    raise InputError(f"{unknown_name('model', str(source), known)}; nor is there a file of that name")


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        return read_sealed(path)
    except UNREADABLE as problem:
        text = " ".join(str(problem).split())
        raise InputError(
            f"checkpoint {path} cannot be read as safetensors: {text}; it may be cut short or of another format"
        ) from problem


def _parse_header(path: Path, metadata: dict[str, str]) -> dict[str, str]:
    if ENTRY not in metadata:
        raise InputError(
            f"checkpoint {path} was not written by kaleido-fast: build a KaleidoMLP and save_checkpoint() it first"
        )
    try:
        header = json.loads(metadata[ENTRY])
        version = header["version"]
        texts = {name: header[name] for name in ("spec", "card", "checksum")}
    except (ValueError, TypeError, KeyError) as problem:
        raise InputError(f"checkpoint {path} is damaged: its header contradicts itself") from problem
    if version != VERSION:
        raise InputError(
            f"checkpoint {path} has version {version!r}: this release reads {VERSION!r}; upgrade kaleido-fast"
        )
    if not all(isinstance(text, str) for text in texts.values()):
        raise InputError(f"checkpoint {path} is damaged: its header contradicts itself")
    return texts


def _build(path: Path, spec: ModelSpec, tensors: dict[str, Tensor]) -> KaleidoMLP:
    expected = _expected_shapes(spec)
    for name in sorted(expected.keys() | tensors.keys()):
        want, have = expected.get(name), tuple(tensors[name].shape) if name in tensors else None
        if want != have:
            raise InputError(f"checkpoint {path}: tensor {name} has shape {have}, the specification says {want}")
        if tensors[name].dtype not in WEIGHTS.values():
            raise InputError(
                f"checkpoint {path}: tensor {name} is {tensors[name].dtype}: float32 or float16 is expected"
            )
    with torch.device("meta"):  # no random initialisation: the caller's random state does not advance
        model = KaleidoMLP(spec)
    model.to_empty(device="cpu").load_state_dict(tensors)
    return model


def _expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (n_in, n_out) in enumerate(zip(spec.widths, spec.widths[1:], strict=False)):
        shapes[f"layers.{i}.weight"] = (n_out, n_in)
        if spec.bias[i]:
            shapes[f"layers.{i}.bias"] = (n_out,)
    return shapes
