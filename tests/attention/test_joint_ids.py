"""Position ids of FLUX are read back from the device once, not every forward."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from linfusion.attention.grids.joint import RotaryTable, grids_of
from tests.tiny_joint import flux_inputs


def test_ids_are_read_once_a_tensor_and_again_when_they_change():
    reads, ids = [], flux_inputs(4, 6)["img_ids"]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            reads.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        first = grids_of(ids)
        count = len(reads)
        assert count and grids_of(ids) is first and len(reads) == count
    assert first[0].sizes == ((4, 6),)
    ids[:, 1:] = torch.cartesian_prod(torch.arange(8.0), torch.arange(3.0))
    assert grids_of(ids)[0].sizes == ((8, 3),)
    assert grids_of(ids.clone())[0].sizes == ((8, 3),)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copied_rotary_table_knows_its_grids(copied):
    grids, ids = grids_of(flux_inputs(4, 6)["img_ids"])
    table = copied(RotaryTable((ids, 2 * ids), grids))
    assert isinstance(table, RotaryTable) and table.grids == grids
    assert torch.equal(table[0], ids) and torch.equal(table[1], 2 * ids)
