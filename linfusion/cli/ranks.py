"""`--parallel`: a command on several processes that torchrun has started."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from typer import Option

ParallelOption = Annotated[
    str | None,
    Option(
        "--parallel",
        metavar="sp=N",
        help="Under torchrun: share rows among N processes; cfg=2,sp=N has two such groups, one"
        " for each half of guidance.",
    ),
]
_AXES = ("sp", "cfg")


@dataclass(frozen=True)
class Place:
    """Of this process among those of a command.

    Attributes:
        options: of `linfusion.parallelize`; empty for one process.
        first: whether it is the one that writes and prints.
        device: of its own, where there are several; None is as without `--parallel`.
    """

    options: dict[str, int] = field(default_factory=dict)
    first: bool = True
    device: str | None = None

    def share(self, pipe: Any) -> None:
        """Parallelize a pipeline, if the command is; progress is shown once."""
        if self.options:
            from linfusion.parallel.parallelize import parallelize

            parallelize(pipe, **self.options)
            if not self.first:
                pipe.set_progress_bar_config(disable=True)

    def agreed(self, value: Any) -> Any:
        """What the first process has."""
        if not self.options:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def join_ranks(parallel: str | None) -> Place:
    """Join the processes that torchrun started, each on its own device.

    Raises:
        ValueError: `parallel` is not as "sp=4" or "cfg=2,sp=2", or nothing has started processes.
    """
    if parallel is None:
        return Place()
    found = re.findall(r"(\w+)=(\d+)", parallel)
    options = {name: int(value) for name, value in found}
    text = ",".join(f"{name}={value}" for name, value in found)
    wrong = text != parallel.replace(" ", "") or len(options) < len(found)
    if wrong or not options or not set(options) <= set(_AXES) or 0 in options.values():
        raise ValueError(f"parallel: {parallel!r}; accepted are sp=N and cfg=2,sp=N")
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "parallel: there is one process; start several, as in torchrun --nproc-per-node 4 -m"
            " linfusion ..."
        )
    import torch
    import torch.distributed as dist

    device = None
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group()
    return Place(options, dist.get_rank() == 0, device)
