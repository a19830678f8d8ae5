"""Bands of rows change nothing but the memory: every host, option and size against the whole."""

from __future__ import annotations

import re
import threading
import weakref

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPAGPipeline,
)
from diffusers.hooks import apply_layerwise_casting
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import linfusion
from linfusion.bands import budget as module
from linfusion.bands import vae as vae_module
from linfusion.bands.bounded import bounded
from linfusion.bands.budget import Ledger, parse_bytes, weight_bytes
from linfusion.bands.hollow import Hollow
from linfusion.bands.hosts import execution_device
from linfusion.bands.rows import Engine
from linfusion.bands.store import Store
from linfusion.bands.vae import decode_rows, encode_rows
from linfusion.pipelines.highres import guided
from tests.compat.test_adapters import IMAGE, with_ip_adapter
from tests.student_files import student_for
from tests.tiny import (
    denoise,
    run,
    tiny_controlnet,
    tiny_image,
    tiny_sd_pipeline,
    tiny_unet,
    tiny_vae,
    tiny_xl_pipeline,
    tiny_xl_unet,
    unet_inputs,
)

ODD = {"height": 72, "width": 104}


@pytest.fixture(autouse=True)
def narrow_bands(monkeypatch):
    """A few rows a band, on tensors as small as these."""
    monkeypatch.setattr(module, "BAND_BYTES", 1 << 13)
    monkeypatch.setattr(vae_module, "WHOLE", 0)


def same(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def linear(model):
    return linfusion.linearize(model, weights=student_for(tiny_unet()))


@pytest.mark.parametrize("make", [tiny_unet, tiny_xl_unet])
@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_a_unet_gives_the_same_in_bands(make, attention):
    unet = make()
    if attention == "linear":
        linfusion.linearize(unet, weights=student_for(make()))
    inputs = unet_inputs(unet, size=14, batch=2)
    inputs["sample"] = inputs["sample"][..., :9]
    whole = denoise(unet, **inputs)
    with bounded(unet) as ledger:
        same(denoise(unet, **inputs), whole)
    assert ledger.calls == 2
    assert not ledger.unbanded


def test_an_odd_size_gives_the_same():
    unet = linear(tiny_unet())
    inputs = unet_inputs(unet, size=13)
    inputs["sample"] = inputs["sample"][..., :11]
    whole = denoise(unet, **inputs)
    with bounded(unet):
        same(denoise(unet, **inputs), whole)


def test_half_precision_stays_as_near_as_the_whole_run():
    unet = linear(tiny_unet())
    inputs = unet_inputs(unet, size=12)
    exact = denoise(unet, **inputs)
    unet.to(torch.bfloat16)
    halves = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    whole = (denoise(unet, **halves) - exact).abs().mean()
    with bounded(unet):
        banded = (denoise(unet, **halves) - exact).abs().mean()
    assert banded <= 1.2 * whole


def test_dilated_convolutions_read_beyond_the_band():
    unet = linear(tiny_unet())
    for conv in (m for m in unet.modules() if isinstance(m, torch.nn.Conv2d)):
        if conv.kernel_size == (3, 3):
            conv.dilation, conv.padding = (3, 3), (3, 3)
    inputs = unet_inputs(unet, size=14)
    whole = denoise(unet, **inputs)
    with bounded(unet) as ledger:
        same(denoise(unet, **inputs), whole)
    assert not ledger.unbanded


@pytest.mark.parametrize(
    "pipeline",
    [
        lambda: linear(tiny_sd_pipeline()),
        lambda: linear(tiny_sd_pipeline(StableDiffusionPAGPipeline)),
        lambda: tiny_xl_pipeline(),
    ],
    ids=["sd", "pag", "xl"],
)
def test_a_pipeline_with_guidance_gives_the_same(pipeline):
    pipe = pipeline()
    whole = run(pipe, **ODD)
    with bounded(pipe):
        same(run(pipe, **ODD), whole)


def test_controlnet_gives_the_same():
    pipe = linear(tiny_sd_pipeline(StableDiffusionControlNetPipeline, controlnet=tiny_controlnet()))
    image = tiny_image(4).resize((104, 72))
    whole = run(pipe, image=image, **ODD)
    with bounded(pipe) as ledger:
        same(run(pipe, image=image, **ODD), whole)
    assert ledger.calls == 8  # two halves of two steps, both models


def test_an_ip_adapter_gives_the_same():
    pipe = linear(with_ip_adapter(tiny_sd_pipeline()))
    whole = run(pipe, **IMAGE, **ODD)
    with bounded(pipe):
        same(run(pipe, **IMAGE, **ODD), whole)


def test_a_fused_model_gives_the_same():
    pipe = linfusion.fuse(linear(tiny_sd_pipeline()))
    whole = run(pipe, **ODD)
    with bounded(pipe):
        same(run(pipe, **ODD), whole)


def test_another_sampler_gives_the_same():
    pipe = linear(tiny_sd_pipeline())
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    whole = run(pipe, **ODD)
    with bounded(pipe):
        same(run(pipe, **ODD), whole)


def test_a_budget_and_files_change_nothing(tmp_path):
    pipe = linear(tiny_sd_pipeline())
    size = {"height": 256, "width": 256}
    with bounded(pipe) as free:
        whole = run(pipe, **size)
    fixed = free.weights_bytes + 8 * (1 << 13)
    need = free.peak_bytes - fixed
    with bounded(pipe, fixed + need // 2, scratch=tmp_path) as tight:
        same(run(pipe, **size), whole, atol=0)
    assert tight.peak_bytes <= fixed + need // 2
    assert tight.peak_on_disk > 0
    assert not list(tmp_path.iterdir())


def test_everything_is_off_again_even_after_an_error():
    pipe = linear(tiny_sd_pipeline())
    before, attributes = run(pipe), dict(vars(pipe.unet))
    with pytest.raises(RuntimeError, match="on purpose"), bounded(pipe):
        assert vars(pipe.unet) != attributes
        raise RuntimeError("on purpose")
    assert vars(pipe.unet) == attributes
    assert torch.equal(run(pipe), before)


def test_a_dry_run_counts_what_a_run_takes():
    pipe = linear(tiny_sd_pipeline())
    with bounded(pipe, dry=True) as plan:
        latents = run(pipe, output_type="latent", **ODD)
    with bounded(pipe) as ledger:
        run(pipe, output_type="latent", **ODD)
    assert (plan.peak_bytes, plan.flops, plan.calls) == (
        ledger.peak_bytes,
        ledger.flops,
        ledger.calls,
    )
    assert latents.shape == (1, 4, 9, 13)


def test_what_is_whole_at_once_are_the_skips_and_a_few_tensors():
    unet = linear(tiny_unet())
    inputs = unet_inputs(unet, size=32)
    with bounded(unet, dry=True) as ledger:
        denoise(unet, **inputs)
    whole = ledger.peak_bytes - ledger.weights_bytes - 8 * (1 << 13)
    outermost = 4 * 32 * 32 * 32
    skips = outermost + outermost + outermost // 4 + outermost // 2
    assert whole <= skips + 5 * outermost


# ---- VAE


def vae_without_attention():
    return AutoencoderKL.from_config({**tiny_vae().config, "mid_block_add_attention": False}).eval()


@pytest.mark.parametrize("make", [tiny_vae, vae_without_attention])
@pytest.mark.parametrize("budget", [None, "tight"])
def test_decoding_by_bands_is_decoding(make, budget):
    vae = make()
    torch.manual_seed(3)
    latents = torch.randn(1, 4, 9, 7) * vae.config.scaling_factor
    with torch.no_grad():
        whole = vae.decode(latents / vae.config.scaling_factor).sample
    pixels = ((whole / 2 + 0.5).clamp(0, 1) * 255)[0].permute(1, 2, 0).numpy()
    ledger = Ledger()
    limit = None if budget is None else weight_bytes(vae) + 8 * (1 << 13) + 20_000
    bands = list(decode_rows(vae, latents, memory_budget=limit, ledger=ledger))
    assert len(bands) > 3
    # Where the exact value lies between two integers, either is right.
    assert np.abs(np.concatenate(bands) - pixels).max() <= 0.5 + 255 * 2e-5
    if limit is not None:
        assert ledger.peak_bytes <= limit + weight_bytes(vae)


@pytest.mark.parametrize("budget", [None, "tight"])
def test_encoding_by_bands_is_encoding(budget):
    vae = vae_without_attention()
    picture = np.array(tiny_image(2).resize((72, 56)))
    tensor = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        whole = vae.encode(tensor).latent_dist.mode() * vae.config.scaling_factor
    limit = None if budget is None else weight_bytes(vae) + 8 * (1 << 13) + 20_000
    same(encode_rows(vae, picture, memory_budget=limit), whole)


def test_encoding_draws_from_the_generator():
    vae, picture = tiny_vae(), np.array(tiny_image(2))
    draws = [
        encode_rows(vae, picture, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_tiling_that_was_on_stays_on():
    vae = tiny_vae()
    vae.enable_tiling()
    list(decode_rows(vae, torch.randn(1, 4, 8, 8)))
    assert vae.use_tiling


# ---- bad input


@pytest.mark.parametrize(
    ("text", "nbytes"), [("12GB", 12 * 10**9), ("1.5 GiB", 3 << 29), ("800mb", 8 * 10**8), (7, 7)]
)
def test_budgets_are_bytes_or_text(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("budget", ["", "lots", "-3GB", "12 apples", 0, -1, 1.5, True])
def test_what_is_no_budget_is_refused(budget):
    with pytest.raises(ValueError, match=r"memory_budget: got .*12GB"):
        parse_bytes(budget)


def test_a_budget_below_the_weights_is_refused():
    pipe = tiny_sd_pipeline()
    attributes = dict(vars(pipe.unet))
    with (
        pytest.raises(ValueError, match="memory_budget: got 1,000 bytes; the weights take"),
        bounded(pipe, 1000),
    ):
        pass
    assert vars(pipe.unet) == attributes


def test_a_budget_too_small_for_a_size_names_the_one_that_would_do():
    unet = linear(tiny_unet())
    inputs = unet_inputs(unet, size=64)
    tight = weight_bytes(unet) + 8 * (1 << 13) + 100_000
    with bounded(unet, tight), pytest.raises(ValueError, match="memory_budget: got") as refused:
        denoise(unet, **inputs)
    enough = int(re.search(r"needs ([\d,]+)", str(refused.value))[1].replace(",", ""))
    with bounded(unet, enough):
        denoise(unet, **inputs)


def test_a_target_without_a_unet_is_refused():
    with (
        pytest.raises(ValueError, match="target: got AutoencoderKL; accepted is"),
        bounded(tiny_vae()),
    ):
        pass


def test_a_scratch_folder_must_be_there(tmp_path):
    with (
        pytest.raises(ValueError, match="scratch: there is no folder"),
        bounded(tiny_unet(), scratch=tmp_path / "nowhere"),
    ):
        pass


def test_weights_that_come_and_go_are_refused():
    unet = tiny_unet()
    apply_layerwise_casting(unet, torch.float8_e4m3fn, torch.float32)
    with pytest.raises(ValueError, match=r"target: the layer .* has a hook of"), bounded(unet):
        pass


def test_gradients_are_refused():
    unet = tiny_unet()
    with bounded(unet), pytest.raises(ValueError, match="gradients are enabled"):
        unet(**unet_inputs(unet))


@pytest.mark.parametrize("picture", [np.zeros((8, 8)), np.zeros((8, 8, 4), np.uint8)])
def test_a_picture_of_another_kind_is_refused(picture):
    with pytest.raises(ValueError, match=r"picture: got .*accepted is uint8 \[H, W, 3\]"):
        encode_rows(tiny_vae(), picture)


# ---- threads, devices, what else is on the model


def in_threads(*works):
    """What each function gives, all of them run at once, thrice each."""
    found = [[] for _ in works]

    def run(i):
        found[i] = [works[i]() for _ in range(3)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_model_in_bands_is_as_it_was_in_other_threads():
    unet = linear(tiny_unet())
    jobs = [unet_inputs(unet, size=size) for size in (8, 12)]
    plain = [denoise(unet, **job) for job in jobs]

    def banded(job):
        with bounded(unet):
            return denoise(unet, **job)

    alone = [banded(job) for job in jobs]
    attributes = dict(vars(unet))
    found = in_threads(*(lambda j=job: banded(j) for job in jobs), lambda: denoise(unet, **jobs[0]))
    for want, got in zip([*alone, plain[0]], found, strict=True):
        assert len(got) == 3 and all(torch.equal(want, one) for one in got)
    assert vars(unet) == attributes


@pytest.mark.parametrize("how", ["torch.compile", "compile", "compile_repeated_blocks"])
def test_a_compiled_unet_gives_the_same_in_bands_and_stays_compiled(how):
    unet = linear(tiny_unet())
    inputs = unet_inputs(unet)
    whole = denoise(unet, **inputs)
    called, calls = unet, []

    def backend(graph, _):
        calls.append(graph)
        return graph.forward

    if how == "torch.compile":
        called = torch.compile(unet, backend=backend)
    else:
        getattr(unet, how)(backend=backend)
    before = [dict(vars(module)) for module in called.modules()]
    with bounded(called) as ledger:
        same(denoise(called, **inputs), whole)
    assert ledger.calls == 1 and not ledger.unbanded and not calls
    assert [dict(vars(module)) for module in called.modules()] == before


def test_no_tensor_of_a_model_in_bands_is_float64():
    class Forbid(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert not [t for t in tree_leaves(out) if getattr(t, "dtype", 0) == torch.float64], (
                func
            )
            return out

    unet, vae = linear(tiny_unet()), tiny_vae()
    inputs = unet_inputs(unet, size=14)
    with torch.no_grad(), bounded(unet), Forbid():
        unet(**inputs)
        guided.blur(inputs["sample"], 2, 0.8)
        list(decode_rows(vae, torch.randn(1, 4, 9, 7)))
        encode_rows(vae, np.array(tiny_image(2)))


def test_moments_of_a_large_mean_lose_nothing():
    norm = torch.nn.GroupNorm(4, 8)
    x = torch.randn(1, 8, 64, 16) + 1000
    x[:, :, 32:] += 50
    engine = Engine(Store(), band_bytes=1 << 10)
    banded = engine.whole(norm(engine.wrap(x)))
    exact = norm.double()(x.double())
    whole = (torch.nn.GroupNorm(4, 8)(x) - exact).abs().max()
    assert (banded - exact).abs().max() <= 2 * whole + 1e-6


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda u: u.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), "has FreeU on"),
        (lambda u: u.set_attention_slice("max"), "call disable_attention_slicing"),
    ],
    ids=["freeu", "slicing"],
)
def test_what_needs_whole_tensors_is_refused_by_name(change, message):
    unet = tiny_unet()
    change(unet)
    with pytest.raises(ValueError, match=message), bounded(unet):
        pass


def test_a_dry_run_of_a_fused_model_counts_and_computes_nothing():
    unet = linfusion.fuse(linear(tiny_unet()))
    with bounded(unet, dry=True) as plan:
        denoise(unet, **unet_inputs(unet, size=64))
    with bounded(unet) as ledger:
        denoise(unet, **unet_inputs(unet, size=64))
    assert (plan.peak_bytes, plan.flops) == (ledger.peak_bytes, ledger.flops)
    assert not ledger.unbanded


def test_the_device_is_where_hooks_execute_not_where_weights_lie():
    vae = tiny_vae()
    latents = torch.randn(1, 4, 9, 7)
    whole = np.concatenate(list(decode_rows(vae, latents)))
    start = encode_rows(vae, np.array(tiny_image(2)))
    cpu_offload(vae, torch.device("cpu"))
    assert vae.device.type == "meta" and execution_device(vae).type == "cpu"
    assert np.array_equal(np.concatenate(list(decode_rows(vae, latents))), whole)
    assert torch.equal(encode_rows(vae, np.array(tiny_image(2))), start)


def test_large_tensors_of_a_dry_run_take_no_memory():
    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor) and not t.is_meta:
                    self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
            return out

    side = 1 << 14
    with Largest() as seen, Hollow():
        x = torch.randn(1, 4, side, side, generator=torch.Generator())
        y = torch.cat([x, x]).to(torch.bfloat16).view(2, 4, -1) * 2
        y.add_(1)
        small = torch.arange(6.0).view(2, 3) + 1
    assert (y.shape, y.dtype, y.device.type) == ((2, 4, side * side), torch.bfloat16, "cpu")
    assert torch.equal(small, torch.arange(1.0, 7).view(2, 3))
    assert seen.nbytes < 1 << 20


class Held(TorchDispatchMode):
    """Bytes of all storages that were made within, at once and at most."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out

    def drop(self, key, nbytes):
        self.known.discard(key)
        self.live -= nbytes


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_a_dry_run_without_bands_counts_what_the_model_holds_as_it_is(attention):
    unet = linear(tiny_unet()) if attention == "linear" else tiny_unet()
    inputs = unet_inputs(unet, size=64)
    with Held() as held:
        denoise(unet, **inputs)
    with bounded(unet, dry=True, in_bands=False) as plan:
        denoise(unet, **inputs)
    estimate = plan.peak_bytes - plan.weights_bytes
    assert estimate == pytest.approx(held.peak, rel=0.25)
