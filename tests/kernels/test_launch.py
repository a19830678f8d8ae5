"""What a call does on the host before its kernels run: launches, and nothing it did before."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from linfusion.kernels.launch import Launch, Target, cdiv, power_of_2, stride_arguments
from linfusion.kernels.linear_attention import triton as linear
from linfusion.kernels.linear_attention.common import Choices
from linfusion.kernels.ssd import common as ssd_common
from linfusion.kernels.ssd import triton as ssd


class Operators(TorchDispatchMode):
    """Names of the operators that run, but for views and what allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty")):
            self.names.append(name)
        return func(*args, **kwargs or {})


def test_linear_attention_is_three_launches_and_no_operator():
    launched: list[Launch] = []
    target = Target("cuda", 108, launched.append)
    q = torch.randn(2, 100, 8, 40).bfloat16()
    with Operators() as ran:
        state = linear.state_forward(q, q, None, "elu1", target=target)
        linear.read_forward(q, state, Choices("elu1", "mean", 1e-4), q.dtype, target=target)
    assert not ran.names
    names = [x.kernel.__name__ for x in launched]
    assert names == ["linear_state_fwd", "linear_state_reduce", "linear_out_fwd"]


def test_a_scan_is_four_launches_and_no_operator():
    launched: list[Launch] = []
    target = Target("cuda", 108, launched.append)
    x, b = torch.randn(1, 100, 8, 64).bfloat16(), torch.randn(1, 100, 1, 64).bfloat16()
    dt, skip = torch.randn(1, 100, 8), torch.randn(1, 8, 64)
    choices = ssd_common.Choices(256, False)
    with Operators() as ran:
        ssd.scan(x, dt, dt, b, b, skip, None, choices, target=target)
    assert not ran.names
    names = [x.kernel.__name__ for x in launched]
    assert names == ["ssd_cumsum", "ssd_states", "ssd_pass", "ssd_read"]


def test_a_layout_is_looked_at_once():
    x, y = torch.empty(2, 6, 4, 8), torch.empty(2, 6, 4, 8)
    assert stride_arguments(q=x, o=x) is stride_arguments(q=y, o=y)
    other = stride_arguments(q=x, o=x[:, ::2])
    assert other == {
        "ALIGN": 8,
        "q_sb": 24,
        "q_sn": 4,
        "q_sh": 1,
        "o_sb": 24,
        "o_sn": 8,
        "o_sh": 1,
    }


def test_sizes_are_covered():
    assert [cdiv(n, 4) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert [power_of_2(n) for n in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]
