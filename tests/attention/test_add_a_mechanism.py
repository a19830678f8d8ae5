"""The mechanism that the docs add, as it stands there: every verb takes it from the registry."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import linfusion
from linfusion import attention
from linfusion.cli import app
from linfusion.students.saving import save
from tests.tiny import tiny_unet

PAGE = Path(__file__).parents[2] / "docs" / "add-a-mechanism.md"


@pytest.fixture(scope="module")
def hedgehog(tmp_path_factory):
    """The file of the page, imported and registered."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    file = tmp_path_factory.mktemp("mechanism") / "hedgehog.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("hedgehog", file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "hedgehog", module)
        spec.loader.exec_module(module)
        patch.setattr(attention, "_REGISTERED", {})
        attention.register(module.METHOD)
        yield module


def call(unet):
    torch.manual_seed(1)
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, unet.config.cross_attention_dim)
    with torch.no_grad():
        return unet(sample, 3, text).sample


def test_it_uses_no_private_name():
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    assert not re.search(r"(?<![\w_])_[a-z]\w*|\._[a-z]", code)


def test_the_layer_is_its_formula(hedgehog):
    maps = hedgehog.HedgehogMaps(2, 4).double()
    torch.manual_seed(0)
    torch.nn.init.normal_(maps.q.weight)
    q, k, v = (torch.randn(1, 5, 2, 4, dtype=torch.float64) for _ in range(3))
    w = maps.q.weight.view(2, 4, 4)
    turned = torch.einsum("hed,bnhd->bnhe", w, q)
    expected = torch.cat([turned, -turned], -1).softmax(-1)
    assert torch.allclose(maps.q(q).double(), expected, atol=1e-6)
    scores = torch.einsum("bnhd,bmhd->bnmh", maps.q(q), maps.k(k)).double()
    dense = torch.einsum("bnmh,bmhd->bnhd", scores / scores.sum(2, keepdim=True), v)
    ours = linfusion.linear_attention(
        maps.q(q).double(), maps.k(k).double(), v, feature_map="identity", eps=0.0
    )
    assert torch.allclose(ours, dense, atol=1e-6)


def test_linearize_restore_save_and_load(hedgehog, tmp_path):
    unet = tiny_unet()
    before = call(unet)
    linfusion.linearize(unet, "hedgehog")
    for module in unet.modules():
        if isinstance(module, hedgehog.HeadMap):
            torch.nn.init.normal_(module.weight)
    linear = call(unet)
    save(unet, tmp_path / "student")
    assert not torch.equal(linear, before)
    assert torch.equal(call(linfusion.restore(unet)), before)
    again = linfusion.linearize(tiny_unet(), weights=tmp_path / "student")
    assert torch.equal(call(again), linear)


def test_summary_and_bench_can_be_asked_about_it(hedgehog):
    found = linfusion.summary(tiny_unet(), method="hedgehog")
    assert found.layers and not any(layer.linear for layer in found.layers)
    argv = ["bench", "--method", "hedgehog", "--size", "64", "--channels", "16", "--heads", "2",
            "--runs", "1", "--json"]  # fmt: skip
    done = CliRunner().invoke(app, argv)
    assert done.exit_code == 0, done.output
    assert '"method": "hedgehog"' in done.output


def test_what_it_does_not_have_is_refused(hedgehog):
    with pytest.raises(ValueError, match="radius: method 'hedgehog' has no such option"):
        linfusion.linearize(tiny_unet(), "hedgehog", radius=8)


def test_a_name_is_taken_once(hedgehog):
    attention.register(hedgehog.METHOD)  # the same again is no error
    with pytest.raises(ValueError, match="there is a mechanism 'clear' already"):
        attention.register(attention.get_method("clear"))
