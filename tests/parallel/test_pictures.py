"""UNets, ControlNets and VAEs that ranks share give what they give alone."""

from __future__ import annotations

import pytest
import torch

from linfusion.bands.bounded import bounded
from linfusion.bands.budget import BAND_BYTES, BANDS_AT_ONCE
from linfusion.fuse import fuse
from linfusion.linearize import linearize
from linfusion.parallel.pictures import share_coder
from tests.parallel.pool import cases, run
from tests.parallel.sharing import difference, shared, watched
from tests.tiny import denoise, tiny_unet, tiny_vae, tiny_xl_unet, unet_inputs


def lively(unet):
    """Fresh feature maps that do something."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in unet.named_parameters():
        if ".linfusion." in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return unet


def rectangle(unet, height, width, batch=2):
    inputs = unet_inputs(unet, batch=batch)
    generator = torch.Generator().manual_seed(5)
    inputs["sample"] = torch.randn(batch, 4, height, width, generator=generator)
    return inputs


def double(tree):
    from torch.utils._pytree import tree_map

    return tree_map(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree
    )


def unet_job(ranks, make, height, dtype):
    unet = lively(linearize(make(), "linfusion")).to(dtype)
    inputs = rectangle(unet, height, 6)
    inputs = double(inputs) if dtype == torch.float64 else inputs
    alone = denoise(unet, **inputs)
    with shared(ranks, unet):
        together = denoise(unet, **inputs)
    again = denoise(unet, **inputs)
    return difference(together, alone), difference(again, alone), "forward" in unet.__dict__


@pytest.mark.parametrize(
    "make, world",
    cases(
        [(tiny_unet, 1), (tiny_unet, 3), (tiny_xl_unet, 4)],
        [(tiny_unet, 2), (tiny_unet, 4), *((tiny_xl_unet, n) for n in (1, 2, 3))],
    ),
)
def test_a_shared_unet_is_the_one_alone(world, make):
    # 10 rows are 5 at the lower level, and not the same for any two ranks or more.
    for error, undone, left in run(world, unet_job, make, 10, torch.float64):
        # Time embeddings and moments of float64 tensors are float64; the models' own casts are not.
        assert error < 1e-10 and undone == 0 and not left


def test_rows_that_levels_do_not_divide_are_shared_as_well():
    assert max(e for e, _, _ in run(3, unet_job, tiny_unet, 11, torch.float64)) < 1e-10


def bounded_job(ranks, scratch):
    unet = lively(linearize(tiny_unet(), "linfusion"))
    inputs = rectangle(unet, 16, 12, batch=2)
    alone = denoise(unet, **inputs)
    with shared(ranks, unet):
        with bounded(unet, dry=True) as forecast:
            denoise(unet, **inputs)
        # A band of the smallest size, and less for what is kept: some skip tensors go to files.
        budget = forecast.weights_bytes + BANDS_AT_ONCE * (1 << 20) + kept(forecast) - 20_000
        with bounded(unet, budget, scratch=scratch) as ledger:
            together = denoise(unet, **inputs)
    with bounded(unet, dry=True) as whole:
        denoise(unet, **inputs)
    return difference(together, alone), ledger.peak_on_disk, kept(forecast) / kept(whole)


def kept(ledger):
    """Bytes of whole tensors, at most."""
    return ledger.peak_bytes - ledger.weights_bytes - BANDS_AT_ONCE * BAND_BYTES


def test_a_shard_runs_in_bands_of_its_own(tmp_path):
    for error, on_disk, share in run(2, bounded_job, str(tmp_path)):
        assert error < 2e-5 and on_disk > 0
        assert share == 0.5  # of what all rows take


def coder_job(ranks):
    vae = tiny_vae().double()
    latents = torch.randn(1, 4, 7, 6, generator=torch.Generator().manual_seed(0)).double()
    pixels = torch.randn(1, 3, 56, 48, generator=torch.Generator().manual_seed(1)).double()
    calls = (lambda: vae.decode(latents).sample, lambda: vae.encode(pixels).latent_dist.mean)
    with torch.no_grad():
        alone = [call() for call in calls]
        undo = [share_coder(vae.decoder, ranks, 1), share_coder(vae.encoder, ranks, 8)]
        together = [call() for call in calls]
        for take_off in undo:
            take_off()
    assert "forward" not in vae.decoder.__dict__
    return [difference(a, b) for a, b in zip(together, alone, strict=True)]


@pytest.mark.parametrize("world", [2, 3])
def test_a_shared_vae_decodes_and_encodes_as_alone(world):
    for errors in run(world, coder_job):
        assert max(errors) < 1e-10


def sent_job(ranks, height):
    """Bytes that each collective of a call sends to others, in order."""
    unet = lively(linearize(tiny_unet(), "linfusion"))
    inputs = rectangle(unet, height, 8, batch=1)
    with shared(ranks, unet), watched() as sent:
        denoise(unet, **inputs)
    return sent


def test_what_a_unet_sends_grows_by_its_rows_alone():
    small, large = (run(2, sent_job, height)[0] for height in (8, 32))
    assert len(small) == len(large)
    # Gathers of states and moments are the same; rows are as wide as before; the noise that is
    # predicted is gathered, and with the taller picture four times as large.
    grown = [b - a for a, b in zip(small, large, strict=True)]
    assert [n for n in grown if n] == [4 * (16 - 4) * 8 * 4]


def processors_job(ranks):
    """Attention slicing and a method that is put back on a model that is shared."""
    unet = lively(linearize(tiny_unet(), "linfusion"))
    inputs = rectangle(unet, 8, 6)
    unet.set_attention_slice(1)  # diffusers' own softmax everywhere
    alone = denoise(unet, **inputs)
    with shared(ranks, unet):
        return difference(denoise(unet, **inputs), alone)


def test_layers_left_softmax_read_the_keys_of_all_ranks():
    assert max(run(2, processors_job)) < 2e-5


def changed_job(ranks, change):
    """A UNet that was fused or whose blocks were compiled."""
    unet = lively(linearize(tiny_unet(), "linfusion"))
    inputs = rectangle(unet, 8, 6)
    alone = denoise(unet, **inputs)
    if change == "fused":
        fuse(unet)
    with shared(ranks, unet):
        if change == "compiled":
            unet.compile_repeated_blocks(fullgraph=True, backend="eager")
        return difference(denoise(unet, **inputs), alone)


@pytest.mark.parametrize("change", ["fused", "compiled"])
def test_a_unet_that_is_fused_or_compiled_is_shared_as_well(change):
    assert max(run(2, changed_job, change)) < 2e-5
