"""Hosts as a user meets them: rows of one's own, pipelines of two models, errors before work."""

from __future__ import annotations

import diffusers
import pytest
import torch
from peft import LoraConfig
from torch import nn

import linfusion
from linfusion.attention.hosts import table
from linfusion.attention.hosts.host import samples_of
from linfusion.layers.record import record_of
from linfusion.linearize import as_softmax
from linfusion.students.saving import save
from tests.hosts.images import IMAGES
from tests.hosts.refused import REFUSED
from tests.hosts.tiny import Random, Tiny, build, outputs
from tests.hosts.unets import UNETS
from tests.hosts.videos import VIDEOS, WAN

ROWS = IMAGES | VIDEOS
GATED = {"attention_type": "gated"}  # GLIGEN
FLUX2, WAN3D = "Flux2Transformer2DModel", "WanTransformer3DModel"


class OfTomorrow(nn.Module):
    """A model that diffusers does not have: attention over rows of pixels, with a processor."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention_processor import Attention

        self.config = {"patch": 2}
        self.layers = nn.ModuleList([Attention(16, heads=2, dim_head=8)])
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.normal_(std=0.5)

    def forward(self, pixels):
        x = nn.functional.pixel_unshuffle(pixels, self.config["patch"])
        return self.layers[0](x.flatten(2).transpose(1, 2))


def test_a_row_from_outside_makes_a_model_a_host(monkeypatch):
    monkeypatch.setattr(table, "HOSTS", dict(table.HOSTS))
    torch.manual_seed(0)
    model, pixels = OfTomorrow().eval(), torch.randn(1, 4, 8, 12)
    with pytest.raises(ValueError, match=r"OfTomorrow is no host.*describe_host"):
        linfusion.linearize(model, "clear", radius=2)
    linfusion.describe_host(
        "OfTomorrow",
        layers=r"layers\.\d+",
        grid=lambda arguments, config: tuple(
            n // config["patch"] for n in arguments["pixels"].shape[2:]
        ),
    )
    softmax = model(pixels)
    linfusion.linearize(model, "clear", radius=100)
    torch.testing.assert_close(model(pixels), softmax)
    linfusion.restore(model)
    linfusion.linearize(model, "clear", radius=1)  # a token sees itself
    attn = model.layers[0]
    x = nn.functional.pixel_unshuffle(pixels, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model(pixels), attn.to_out[0](attn.to_v(x)))
    linfusion.describe_host("OfTomorrow", layers=r"layers\.\d+", grid=lambda *_: (5, 5))
    with pytest.raises(ValueError, match=r"24 keys, which are not the tokens of .*\(5, 5\)"):
        model(pixels)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"name": "not a name"}, "name: got 'not a name'"),
        ({"layers": "("}, r"layers: '\(' is no regular expression"),
        ({"grid": (2, 2)}, r"grid: got \(2, 2\), expected a function"),
    ],
    ids=["name", "layers", "grid"],
)
def test_a_bad_row_is_refused_by_name(given, message):
    row = {"name": "OfTomorrow", "layers": "x", "grid": lambda arguments, config: (1, 1)}
    with pytest.raises(ValueError, match=message):
        linfusion.describe_host(**{**row, **given})
    assert "OfTomorrow" not in table.HOSTS


def test_a_row_whose_grid_is_none_says_so():
    with pytest.raises(ValueError, match=r"grid: the host's row gave \(0, 4\)"):
        samples_of((0, 4))


def wan_pipeline(**config):
    models = []
    for seed in (0, 1):
        models.append(build(WAN3D, Tiny(WAN | config, VIDEOS[WAN3D].inputs), seed))
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(),
        transformer=models[0],
        transformer_2=models[1],
        boundary_ratio=0.9,
    )


@pytest.mark.parametrize("method", ["hybrid", "mate"])
def test_both_models_of_a_pipeline_are_taken_shown_saved_loaded_and_restored(method, tmp_path):
    pipe = wan_pipeline()
    models, call = (pipe.transformer, pipe.transformer_2), VIDEOS[WAN3D].inputs(Random(0))
    before = [outputs(model, call) for model in models]
    options = {"window": (2, 2, 2)}
    if method == "hybrid":
        options = {"window": 2, "cell": 0, "features": "elu1"}
    linfusion.linearize(pipe, method, **options)
    found = linfusion.summary(pipe)
    assert [x.path for x in found.layers if x.linear] == [
        f"{name}.blocks.{i}.attn1" for name in ("transformer", "transformer_2") for i in (0, 1)
    ]
    assert found.model == "WanTransformer3DModel, WanTransformer3DModel"
    after = [outputs(model, call) for model in models]
    with as_softmax(pipe):
        assert all(torch.equal(outputs(m, call), x) for m, x in zip(models, before, strict=True))
    assert all(torch.equal(outputs(m, call), x) for m, x in zip(models, after, strict=True))
    save(pipe, tmp_path)
    linfusion.restore(pipe)
    assert all(torch.equal(outputs(m, call), x) for m, x in zip(models, before, strict=True))
    with pytest.raises(ValueError, match=r"weights: got .*/transformer' for the models"):
        linfusion.linearize(pipe, weights=str(tmp_path / "transformer"))
    assert record_of(pipe.transformer) is None
    linfusion.linearize(pipe, method, weights=str(tmp_path))
    assert all(torch.equal(outputs(m, call), x) for m, x in zip(models, after, strict=True))


def test_a_pipeline_is_taken_whole_or_not_at_all():
    pipe = wan_pipeline()
    linfusion.linearize(pipe.transformer_2, "clear", radius=2)
    with pytest.raises(ValueError, match="WanTransformer3DModel is linearized already"):
        linfusion.linearize(pipe, "clear", radius=2)
    assert record_of(pipe.transformer) is None
    linfusion.restore(pipe)
    pipe.transformer_2 = diffusers.SanaTransformer2DModel(**REFUSED["SanaTransformer2DModel"][0])
    with pytest.raises(ValueError, match="linear already"):
        linfusion.linearize(pipe, "clear", radius=2)
    assert record_of(pipe.transformer) is None


def test_a_prior_over_embeddings_is_no_model_of_pictures():
    prior = diffusers.PriorTransformer(**REFUSED["PriorTransformer"][0])
    for method in ("linfusion", "clear", "hybrid"):
        with pytest.raises(ValueError, match=r"PriorTransformer.*embeddings of text"):
            linfusion.linearize(prior, method)


@pytest.mark.parametrize(
    "name", ["HunyuanVideoTransformer3DModel", "HunyuanImageTransformer2DModel"]
)
def test_a_text_refiner_is_not_taken_for_pixels(name):
    model = build(name, ROWS[name])
    with pytest.raises(ValueError, match="no self-attention of diffusers' class"):
        linfusion.linearize(model, "linfusion")
    taken = record_of(linfusion.linearize(model, "hybrid")).layers
    assert taken and not any("refiner" in path for path in taken)


def test_fusers_and_encoders_of_frames_are_not_taken_for_pixels():
    unet = diffusers.UNet2DConditionModel(**UNETS["UNet2DConditionModel"].config | GATED)
    video = diffusers.I2VGenXLUNet(**UNETS["I2VGenXLUNet"].config)
    for model in (unet, video):
        for method in ("linfusion", "clear"):
            taken = record_of(linfusion.linearize(model, method)).layers
            assert taken and all(path.endswith(".attn1") for path in taken)
            assert not any("temp" in path or "fuser" in path for path in taken)
            linfusion.restore(model)


def test_auto_does_not_guess_the_tokens_of_a_video():
    model = build("HunyuanVideoTransformer3DModel", VIDEOS["HunyuanVideoTransformer3DModel"])
    with pytest.raises(ValueError, match=r"auto.*does not know"):
        linfusion.linearize(model, "clear", layers="auto", size=512)


def test_a_model_whose_attention_is_another_class_is_refused_not_broken():
    model = build("HiDreamImageTransformer2DModel", IMAGES["HiDreamImageTransformer2DModel"])
    with pytest.raises(ValueError, match="HiDreamImageTransformer2DModel has no self-attention"):
        linfusion.linearize(model, "linfusion")


def test_a_lora_acts_before_and_after():
    model, call = build(FLUX2, IMAGES[FLUX2]), IMAGES[FLUX2].inputs(Random(0))

    def with_lora():
        torch.manual_seed(1)
        lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        model.add_adapter(lora, adapter_name="one")

    linfusion.linearize(model, "hybrid", window=2, cell=2)
    plain = outputs(model, call)
    with_lora()
    after = outputs(model, call)
    assert not torch.allclose(after, plain, atol=1e-3)
    linfusion.restore(model)
    linfusion.linearize(model, "hybrid", window=2, cell=2)
    assert torch.equal(outputs(model, call), after)


def test_what_has_learned_nothing_is_not_saved(tmp_path):
    model = linfusion.linearize(build(FLUX2, IMAGES[FLUX2]), "hybrid")
    with pytest.raises(ValueError, match="has learned nothing to save"):
        save(model, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_student_of_any_host_is_saved_and_loaded(tmp_path):
    model, call = build(FLUX2, IMAGES[FLUX2]), IMAGES[FLUX2].inputs(Random(0))
    linfusion.linearize(model, "hybrid", window=2, cell=2, features="hedgehog")
    with torch.no_grad():
        for layer in record_of(model).layers:
            model.get_submodule(f"{layer}.hybrid.log_weight").weight.fill_(1.0)
    expected = outputs(model, call)
    save(model, tmp_path)
    other = linfusion.linearize(build(FLUX2, IMAGES[FLUX2]), weights=str(tmp_path))
    assert torch.equal(outputs(other, call), expected)
    linfusion.restore(other)
    with pytest.raises(ValueError, match=r"features: got 'poly2'.*has 'hedgehog'"):
        linfusion.linearize(other, "hybrid", weights=str(tmp_path), features="poly2")
    with pytest.raises(ValueError, match=r"weights.*Unexpected"):
        linfusion.linearize(build(WAN3D, VIDEOS[WAN3D]), "hybrid", weights=str(tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c | {"img_ids": c["img_ids"].flip(0)}, "no picture in raster order"),
        (
            lambda c: {k: v for k, v in c.items() if k != "img_ids"},
            "cannot be read from the arguments",
        ),
    ],
    ids=["reversed", "missing"],
)
def test_tokens_that_do_not_make_the_grid_are_refused(change, message):
    model = linfusion.linearize(build(FLUX2, IMAGES[FLUX2]), "hybrid", window=2)
    with pytest.raises(ValueError, match=message):
        outputs(model, change(IMAGES[FLUX2].inputs(Random(0))))


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.full((1, 1, 29, 29), 0.5), "a bias that is no mask"),
        (torch.ones(29, 29, dtype=torch.bool).tril()[None, None], "tells queries or heads apart"),
        (torch.arange(29)[None] != 20, "hides tokens 5 to 28"),
    ],
    ids=["bias", "causal", "pixels"],
)
def test_a_mask_that_windows_cannot_honour_is_refused(mask, message):
    model = linfusion.linearize(build(FLUX2, IMAGES[FLUX2]), "clear", radius=2)
    attn = model.transformer_blocks[0].attn
    attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
    )
    with pytest.raises(ValueError, match=message):
        outputs(model, IMAGES[FLUX2].inputs(Random(0)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 0}, "window: got 0"),
        ({"cell": 1}, "cell: got 1"),
        ({"cell": 0}, "cell: got 0 without features"),
        ({"features": "relu"}, "features: got 'relu'"),
        ({"radius": 8}, "radius: method 'hybrid' has no such option"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_anything_changes(options, message):
    model = build(FLUX2, IMAGES[FLUX2])
    with pytest.raises(ValueError, match=message):
        linfusion.linearize(model, "hybrid", **options)
    assert record_of(model) is None


def test_a_block_alone_says_what_it_misses():
    model = linfusion.linearize(build(WAN3D, VIDEOS[WAN3D]), "hybrid")
    with pytest.raises(ValueError, match="call the whole model"):
        model.blocks[0].attn1(torch.randn(1, 72, 24), None, None, None)
