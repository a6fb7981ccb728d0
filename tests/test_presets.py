"""The six networks."""

from __future__ import annotations

from kaleido_fast import presets
from kaleido_kernels.shapes import NETWORKS


def test_reference_networks_are_those_of_the_presets():
    for name, network in presets.NETWORKS.items():
        assert NETWORKS[name].widths == network.widths and NETWORKS[name].bound == network.bound
    assert set(NETWORKS) == set(presets.NETWORKS)
