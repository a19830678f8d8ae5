"""What cannot be shared is refused before anything changes."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload

import linfusion
from linfusion.bands.bounded import bounded
from tests.parallel.pool import run
from tests.parallel.sharing import mesh_over
from tests.tiny import denoise, tiny_sd_pipeline, tiny_unet, tiny_vae
from tests.tiny_dit import tiny_pixart
from tests.tiny_joint import flux_inputs, tiny_flux
from tests.tiny_video import tiny_transformer
from tests.tiny_video_hosts import tiny_wan


def linear_unet():
    return linfusion.linearize(tiny_unet(), "linfusion")


def test_without_a_process_group_there_is_nothing_to_share_with(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    unet = linear_unet()
    with pytest.raises(ValueError, match=r"no process group; start with torchrun"):
        linfusion.parallelize(unet)
    assert not hasattr(unet, "_diffusers_hook") and "forward" not in unet.__dict__


def test_before_linearize_the_order_is_told():
    for model in (tiny_unet(), tiny_flux(), tiny_sd_pipeline()):
        with pytest.raises(ValueError, match=r"not linearized; call linfusion.linearize first"):
            linfusion.parallelize(model)


def test_models_that_cannot_be_split_are_named():
    cases = [
        (tiny_vae(), "AutoencoderKL cannot be shared; accepted are UNets"),
        (torch.nn.Linear(2, 2), "Linear cannot be shared"),
        (object(), "got object, expected a torch module or a pipeline"),
        (
            linfusion.linearize(tiny_flux(), "clear", layers=r"single_transformer_blocks.*"),
            r"transformer_blocks.0.attn of FluxTransformer2DModel is left softmax",
        ),
        (
            linfusion.linearize(tiny_wan(), "mate", layers="blocks.0"),
            "blocks.1.attn1 of WanTransformer3DModel is left softmax",
        ),
        (
            linfusion.linearize(tiny_pixart(), "linfusion"),
            "linearized with 'linfusion'; it can be shared with 'lit'",
        ),
        (
            tiny_transformer(bidirectional="hydra", causal=False, d_conv=3),
            "bidirectional 'hydra' cannot",
        ),
        (tiny_transformer(self_attention="softmax", causal=False), "self_attention 'softmax'"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            linfusion.parallelize(model)


def test_an_offloaded_model_is_refused():
    unet = linear_unet()
    cpu_offload(unet, execution_device="cpu")
    with pytest.raises(ValueError, match=r"has a hook of offloading"):
        linfusion.parallelize(unet)


def test_sizes_that_make_no_mesh_are_refused():
    for options, message in (
        ({"cfg": 3}, "cfg: got 3, expected 1, or 2"),
        ({"sp": 0}, "sp: got 0, expected a positive whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            linfusion.parallelize(linear_unet(), **options)


def test_diffusers_own_parallelism_is_told_what_to_call():
    model = linfusion.linearize(tiny_flux(), "clear", radius=3)
    for attn in model.modules():
        if hasattr(attn, "processor"):
            attn.processor._parallel_config = object()  # as enable_parallelism sets it
    with pytest.raises(ValueError, match=r"call linfusion.parallelize\(pipe\) instead"):
        model(**flux_inputs())


def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)


def job(ranks):
    unet, mesh = linear_unet(), mesh_over(ranks)
    messages = {}
    linfusion.parallelize(unet, mesh=mesh)
    messages["twice"] = refused(lambda: linfusion.parallelize(unet, mesh=mesh))
    small = torch.zeros(1, 4, 4, 4)
    messages["rows"] = refused(lambda: denoise(unet, sample=small))
    messages["called"] = refused(
        lambda: denoise(unet, sample=torch.full((1, 4, 8, 8), float(ranks.rank)))
    )
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    messages["freeu"] = refused(lambda: denoise(unet))
    unet.disable_freeu()
    messages["grad"] = refused(lambda: unet(torch.zeros(1, 4, 8, 8), 3, torch.zeros(1, 5, 32)))
    linfusion.unparallelize(unet)
    messages["off"] = refused(lambda: linfusion.unparallelize(unet))
    messages["mesh"] = refused(lambda: linfusion.parallelize(unet, sp=2, mesh=mesh))
    messages["world"] = refused(lambda: linfusion.parallelize(unet, sp=3))

    flux = linfusion.linearize(tiny_flux(), "clear", radius=3)
    linfusion.parallelize(flux, mesh=mesh)
    flux.set_attn_processor(tiny_flux().attn_processors.popitem()[1])
    messages["replaced"] = refused(lambda: flux(**flux_inputs()))
    linfusion.linearize(flux)
    ids = flux_inputs()["img_ids"]
    two = flux_inputs(16, 8, img_ids=torch.cat([ids, ids + torch.tensor([1.0, 0, 0])]))
    messages["pictures"] = refused(lambda: flux(**two))
    flux(**flux_inputs())  # and nothing of those calls is left
    messages["bounded"] = refused(lambda: bounded(flux).__enter__())
    linfusion.restore(flux)
    messages["restored"] = refused(lambda: flux(**flux_inputs()))

    pipe = linfusion.linearize(tiny_sd_pipeline(), "linfusion")
    linfusion.parallelize(pipe, mesh=mesh)
    messages["again"] = refused(lambda: linfusion.parallelize(pipe.unet, mesh=mesh))
    messages["part"] = refused(lambda: linfusion.unparallelize(pipe.unet))
    linfusion.unparallelize(pipe)
    denoise(pipe.unet)
    return messages


def test_calls_that_ranks_cannot_share_are_refused():
    for messages in run(3, job):
        expected = {
            "twice": "this UNet2DConditionModel is parallelized already",
            "rows": "sp: got 3 ranks for 4 rows of tokens, of which 2 stay together; accepted are"
            " at most 2 ranks",
            "called": "sample: ranks 0 and 1 have different ones",
            "grad": "gradients are enabled",
            "freeu": "FreeU is on, which needs whole feature maps",
            "bounded": "is shared among ranks by its tokens, which bands do not know",
            "restored": "FluxTransformer2DModel: it was restored while it is parallelized",
            "off": "unparallelize: this UNet2DConditionModel was not given to",
            "mesh": "sp: got 2, but the mesh has 3",
            "world": "sp, cfg: got 3 and 1, 3 in all, for 4 processes",
            "replaced": "runs FluxAttnProcessor, which would see its own rank's tokens alone",
            "pictures": "img_ids: got 2 pictures",
            "again": "this UNet2DConditionModel is parallelized already",
            "part": "was not given to linfusion.parallelize",
        }
        assert messages.keys() == expected.keys()
        for name, message in expected.items():
            assert message in messages[name], name
