"""A real Ray cluster on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head with one CPU; tests add nodes and remove them. Every task would see an allocation of Slurm.

    Its processes take time as long as it stands, so it goes with the tests that use it.
    """
    if find_spec("ray") is None:
        pytest.skip("the extra residency[ray] is not installed")
    here = str(Path(__file__).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_NTASKS", "4")
        patch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]))
        from ray.cluster_utils import Cluster

        # As where a script starts a node in the background: it ignores SIGINT, by which Ray cancels.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        signal.signal(signal.SIGINT, before)
        patch.delenv("SLURM_NTASKS")
        yield found
        found.shutdown()
