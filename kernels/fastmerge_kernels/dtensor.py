"""DTensors (FSDP2): the ops of `elementwise.py` work on the shards of each rank, without communication.

Vectors may be replicated or sharded, `Shard(0)`, all alike. `pam_coefficient` gives a `Partial` sum, whose `full_tensor()`
adds up the ranks. `nonfinite` counts the entries of the rank's own shard. Ops with random numbers or segments take local
tensors: their `offset=` says where a shard begins.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

WRITING = (
    "lerp",
    "axpy",
    "fisher_merge_",
    "pam_accumulate_",
    "magmax_update_",
    "magmax_delta_",
    "fisher_accumulate_",
    "ewc_gradient_",
)
NUMBERS = ("alpha_tensor", "c_tensor", "lam_tensor", "scale_tensor", "nonfinite")  # one element, the same on all ranks


def _shardings(op, output, *arguments):
    """Acceptable (placements of the outputs, placements of the arguments) for one dimension of the mesh."""
    from torch.distributed.tensor import Replicate, Shard

    named = list(zip(op._schema.arguments, arguments, strict=True))

    def alike(vector):
        return [
            None
            if value is None or "Tensor" not in str(argument.type)
            else Replicate()
            if argument.name in NUMBERS
            else vector
            for argument, value in named
        ]

    whole, sharded = ([], []) if output is None else ([Replicate()], [output])
    return [(whole, alike(Replicate())), (sharded, alike(Shard(0)))]


@functools.cache
def register() -> None:
    """Register the strategies, once, when the first DTensor comes: the import takes a second."""
    from torch.distributed.tensor import Partial
    from torch.distributed.tensor.experimental import register_sharding

    for name in (*WRITING, "pam_coefficient"):
        op = getattr(torch.ops.fastmerge, name).default
        register_sharding(op)(functools.partial(_shardings, op, Partial() if name == "pam_coefficient" else None))


def check_placements(first: str, vectors: dict[str, Tensor]) -> None:
    """Raise ValueError unless all are DTensors of one mesh, alike in being replicated or sharded.

    torch would move what is placed otherwise to other tensors, and writes there would be lost.
    """
    register()
    lead = vectors[first]
    for name, x in vectors.items():
        placements = getattr(x, "placements", None)
        if placements is None or any(p.is_partial() for p in placements):
            raise ValueError(
                f"{name}: expected a DTensor that is replicated or sharded, as the others are, got "
                f"{type(x).__name__ if placements is None else placements}; see torch.distributed.tensor"
            )
        if (placements, getattr(x, "device_mesh", None)) != (
            getattr(lead, "placements", None),
            getattr(lead, "device_mesh", None),
        ):
            raise ValueError(
                f"{name}: expected the placements of {first}, {getattr(lead, 'placements', None)}, got {placements}"
            )
