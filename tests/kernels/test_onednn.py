"""Float32 products of oneDNN: all their bits, and a setting that is put back."""

from __future__ import annotations

import pytest
import torch

from linfusion.kernels import onednn


@pytest.fixture
def settings():
    found = torch.backends.mkldnn.matmul
    before = found.fp32_precision
    yield found
    found.fp32_precision = before


def test_a_setting_is_put_back(settings):
    with pytest.raises(KeyError), onednn.float32_products():
        assert settings.fp32_precision == "bf16"
        raise KeyError
    assert settings.fp32_precision == "none"


def test_a_choice_of_the_user_is_kept(settings):
    settings.fp32_precision = "ieee"
    with onednn.float32_products():
        assert settings.fp32_precision == "ieee"
    assert settings.fp32_precision == "ieee"


@pytest.mark.parametrize("size", [(1, 16, 64, 352), (3, 400, 64, 32), (2, 33, 320, 320)])
def test_products_have_all_their_bits_where_they_serve(size):
    n, m, k, e = size
    torch.manual_seed(0)
    x, y = torch.randn(n, m, k), torch.randn(n, k, e)
    truth = torch.bmm(x.double(), y.double())
    if onednn.serves():
        with onednn.float32_products():
            for found in (torch.bmm(x, y), torch.stack([a @ b for a, b in zip(x, y, strict=True)])):
                assert (found - truth).abs().max() < 1e-6 * k
    else:
        assert onednn.AMX or not onednn.AVX512_BF16 or not onednn._is_exact()


def test_it_does_not_serve_where_products_are_shorter(monkeypatch):
    monkeypatch.setattr(onednn, "AVX512_BF16", True)
    for amx, exact in ((False, True), (False, False), (True, True)):
        monkeypatch.setattr(onednn, "AMX", amx)
        monkeypatch.setattr(onednn, "_is_exact", lambda exact=exact: exact)
        assert onednn.serves() == (exact and not amx)
