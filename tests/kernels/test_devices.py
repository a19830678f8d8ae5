"""Which implementation a device gets, on devices that are not there."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from linfusion.kernels import common, library, linear_attention
from linfusion.kernels.common import implementation, takes_triton
from linfusion.kernels.probe import probe_runs

GPU = torch.device("cuda", 0)


def fits() -> None:
    """What the kernels do not take of the inputs: nothing."""


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """No device was asked yet; kernels compile and run on those that are."""
    devices: list[torch.device] = []
    monkeypatch.setattr(common, "_TAKES", {})
    monkeypatch.setattr(library, "HAS_TRITON", True)
    monkeypatch.setattr(
        "linfusion.kernels.probe.probe_runs", lambda device: (devices.append(device), True)[1]
    )
    return devices


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def pretend_amd(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = SimpleNamespace(gcnArchName=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def chosen(device: torch.device = GPU, dtype: torch.dtype = torch.float32) -> str:
    return implementation(None, SimpleNamespace(device=device), dtype, fits)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_nvidia_since_ampere_runs_triton(capability, monkeypatch, asked):
    pretend(monkeypatch, capability)
    assert chosen() == "triton" and chosen() == "triton"
    assert asked == [GPU]  # once


def test_a_t4_runs_the_blocked_form_and_says_so_once(monkeypatch, asked):
    pretend(monkeypatch, (7, 5))
    with pytest.warns(RuntimeWarning, match=r"cuda:0: .* need compute capability 8.0.*\(7, 5\)"):
        assert chosen() == "blocked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "blocked"
    assert not asked


@pytest.mark.parametrize("name", ["gfx942:sramecc+:xnack-", "gfx90a", "gfx950"])
def test_amd_instinct_runs_triton(name, monkeypatch):
    pretend_amd(monkeypatch, name)
    assert chosen() == "triton"


@pytest.mark.parametrize("name", ["gfx1100", "gfx1201", "gfx1030"])
def test_other_amd_gpus_run_the_blocked_form(name, monkeypatch, asked):
    pretend_amd(monkeypatch, name)
    with pytest.warns(RuntimeWarning, match=f"kernels spill on {name}"):
        assert chosen() == "blocked"
    assert not asked


def test_without_a_compiler_the_blocked_form_runs(monkeypatch):
    pretend(monkeypatch, (9, 0))

    def fails(device: torch.device) -> bool:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr("linfusion.kernels.probe.probe_runs", fails)
    with pytest.warns(RuntimeWarning, match=r"no Triton kernel runs .*Failed to find C compiler"):
        assert chosen() == "blocked"


def test_a_wrong_result_is_no_result(monkeypatch):
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr("linfusion.kernels.probe.probe_runs", lambda device: False)
    with pytest.warns(RuntimeWarning, match="wrong result"):
        assert chosen() == "blocked"


def test_without_triton_the_blocked_form_runs(monkeypatch):
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(library, "HAS_TRITON", False)
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        assert chosen() == "blocked"


def test_windows_runs_the_blocked_form(monkeypatch):
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.warns(RuntimeWarning, match="Windows"):
        assert chosen() == "blocked"


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu", "meta"])
def test_other_devices_run_the_blocked_form_without_a_word(kind, asked):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(torch.device(kind)) == "blocked"
    assert not asked


def test_float64_runs_the_blocked_form_and_asks_nothing(asked):
    assert chosen(dtype=torch.float64) == "blocked" and not asked


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_a_named_implementation_is_used_or_refused(kind, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("reference", "blocked"):
        assert implementation(name, SimpleNamespace(device=GPU), torch.float32, fits) == name
    x = SimpleNamespace(device=torch.device(kind))
    with pytest.raises(ValueError, match=f"impl: 'triton' needs tensors on a CUDA .* got {kind}"):
        implementation("triton", x, torch.float32, fits)


def test_the_probe_runs_where_triton_does():
    assert probe_runs(torch.device("cpu"))  # interpreted


def test_a_compiled_model_asks_once(monkeypatch):
    torch._dynamo.reset()
    q = torch.randn(1, 5, 2, 8)
    monkeypatch.setattr(common, "_TAKES", {q.device: False})

    def f(q):
        return linear_attention(q, q, q, impl=(common.takes_triton(q.device) and "triton") or None)

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q), f(q))
    assert takes_triton(q.device) is False
