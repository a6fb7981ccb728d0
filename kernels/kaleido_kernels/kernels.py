"""From a tile and weights to a function that launches: the one place that knows all kernels' packing and launching."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kaleido_kernels.choice import AnyTile
from kaleido_kernels.graph.plan import GraphTile
from kaleido_kernels.launch import LaunchRequest, Outputs
from kaleido_kernels.narrow.pack import pack_narrow
from kaleido_kernels.packing import Layers
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.stream.pack import pack_stream
from kaleido_kernels.wide.plan import WideTile

Launcher = Callable[[LaunchRequest, Outputs], None]


def make_launcher(
    tile: AnyTile,
    layers: Layers,
    shape: NetShape,
    precision: str,
    device: torch.device,
    *,
    n_programs: int,
    capture: bool = False,
) -> Launcher:
    """Pack a network for the tile's kernel. Two launches at a time need two launchers: they may share scratch memory.

    Args:
        tile: decides the kernel.
        layers, shape, precision: the network, and one of `PRECISIONS`.
        device: where the weights go and launches run.
        n_programs: programs of the wide kernel.
        capture: whether the graph path captures its step in a CUDA graph.

    Raises:
        ValueError: weights that do not fit the shape, the precision or the kernel.
    """
    if isinstance(tile, GraphTile):
        from kaleido_kernels.graph.kernel import GraphRunner
        from kaleido_kernels.graph.pack import pack_graph

        return GraphRunner(pack_graph(layers, shape, precision, device), tile, capture=capture).launch
    if isinstance(tile, WideTile):
        from kaleido_kernels.wide.kernel import launch_wide
        from kaleido_kernels.wide.pack import allocate_scratch, pack_wide

        wide = pack_wide(layers, shape, tile, precision, device)
        scratch = allocate_scratch(wide, n_programs)
        return lambda request, outputs: launch_wide(wide, request, outputs, scratch)
    if tile.kernel == "stream":
        from kaleido_kernels.stream.kernel import launch_stream

        stream = pack_stream(layers, shape, precision, device)
        return lambda request, outputs: launch_stream(stream, request, tile, outputs)
    from kaleido_kernels.narrow.kernel import launch_narrow

    narrow = pack_narrow(layers, shape, precision, device)
    return lambda request, outputs: launch_narrow(narrow, request, tile, outputs)
