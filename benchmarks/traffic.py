"""`python -m benchmarks.traffic`: what each rank sends in one forward, computed from configs.

Nothing runs but the shapes of a UNet. Bytes are those that leave a rank that has neighbours on both
sides: a gather of b bytes among n ranks is (n - 1) b. The tests count the same on tiny models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

SIZES = (1024, 2048, 4096, 8192, 16384)
WORLDS = (2, 4, 8)
HALF, SINGLE = 2, 4  # bytes
PEAK, LINK, LATENCY = 989e12, 450e9, 20e-6  # H100 SXM: dense bf16, NVLink one way; one collective

# The published configs, as far as sizes go.
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass
class Sent:
    """Of one rank in one forward.

    Attributes:
        ours: bytes by linfusion.
        ulysses, ring, distrifusion: by softmax attention split in these ways; None where the method
            is not for such a model.
        collectives: of ours.
        flops: of the rank's share of the linear model's forward.
    """

    ours: float
    ulysses: float | None
    ring: float | None
    distrifusion: float | None
    collectives: int
    flops: float

    @property
    def efficiency(self) -> float:
        """T / (T + sent / LINK + collectives · LATENCY), T = flops / PEAK: nothing overlaps."""
        compute = self.flops / PEAK
        return compute / (compute + self.ours / LINK + self.collectives * LATENCY)


def gathered(nbytes: float, world: int) -> float:
    """What leaves a rank in a gather of its own `nbytes`."""
    return nbytes * (world - 1)


def ulysses(tokens: float, width: int, world: int, element: int = HALF) -> float:
    """Q, K, V to the owners of heads, and O back."""
    return 4 * tokens / world * width * (world - 1) / world * element


def ring(tokens: float, width: int, world: int, element: int = HALF) -> float:
    """K and V once around, or gathered by all."""
    return 2 * tokens / world * width * (world - 1) * element


# ---- a UNet


@dataclass
class Layers:
    """Shapes of a UNet's layers in one forward.

    Attributes:
        rows: numbers in a row that a convolution reads beyond its own, and how many sides it reads;
            below 0 for what is here already.
        norms: groups of the group norms.
        attention: tokens, heads and channels of a head of the self-attention layers.
        flops: of the linear model.
    """

    rows: list[tuple[int, int]]
    norms: list[int]
    attention: list[tuple[int, int, int]]
    flops: float


def layers_of(unet: Any, height: int, width: int, **inputs: Any) -> Layers:
    """Run a UNet on the meta device for latents of that size."""
    found = Layers([], [], [], 0.0)

    def conv(name: str) -> Callable[..., None]:
        def seen(module: Any, args: Any, output: Any) -> None:
            work = math.prod(output.shape) * math.prod(module.weight.shape[1:])
            found.flops += 2 * work
            if module.kernel_size == (3, 3) and name != "conv_in":
                columns = args[0].shape[3] // (2 if "upsamplers" in name else 1)
                sides = 1 if module.stride == (2, 2) else 2
                found.rows.append((args[0].shape[1] * columns, sides))

        return seen

    def norm(module: Any, args: Any, output: Any) -> None:
        found.norms.append(module.num_groups)

    def linear(module: Any, args: Any, output: Any) -> None:
        found.flops += 2 * math.prod(output.shape) * module.in_features

    def attend(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        tokens, width = args[0].shape[1:]
        found.attention.append((tokens, module.heads, width // module.heads))
        # State and read, and the learned maps of queries and keys.
        found.flops += 4 * tokens * width * (width // module.heads) + 8 * tokens * width**2

    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(conv(name))
        elif isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(norm)
        elif isinstance(module, torch.nn.Linear):
            module.register_forward_hook(linear)
        elif name.endswith("attn1"):
            module.register_forward_hook(attend, with_kwargs=True)
    with torch.no_grad():
        unet(torch.empty(1, 4, height, width, device="meta"), **inputs)
    found.rows += [(-numbers, 2) for numbers in _held_skips(unet.config, width)]
    return found


def _held_skips(config: Any, columns: int) -> Iterator[int]:
    """Rows of skip tensors whose neighbours are here since the way down.

    A convolution read them there, but for the inputs of downsamplers, of which it read one side.
    """
    channels = config.block_out_channels
    yield channels[0] * columns
    for level, width in enumerate(channels):
        lowest = level + 1 == len(channels)
        yield from [width * columns] * (config.layers_per_block - (not lowest))
        if not lowest:
            columns //= 2
            yield width * columns


def sdxl(size: int) -> Layers:
    """One picture of one half of guidance."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
        inputs = {
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, 77, 2048),
            "added_cond_kwargs": {
                "text_embeds": torch.empty(1, 1280),
                "time_ids": torch.empty(1, 6),
            },
        }
    return layers_of(unet, size // 8, size // 8, **inputs)


def unet_sent(layers: Layers, pixels: int, world: int, element: int = HALF) -> Sent:
    """Of a UNet with linear self-attention whose output has `pixels` numbers."""
    halo = sum(numbers * sides for numbers, sides in layers.rows) * element
    edges = sum(numbers * 2 for numbers, _ in layers.rows if numbers > 0) * element
    moments = sum(3 * groups * SINGLE for groups in layers.norms)
    states = sum((heads * dim * (dim + 1) + 1) * SINGLE for _, heads, dim in layers.attention)
    output = gathered(pixels / world * element, world)
    rest = halo + gathered(moments, world) + output
    softmax = [(tokens, heads * dim) for tokens, heads, dim in layers.attention]
    kv = sum(ring(*layer, world, element) for layer in softmax)
    return Sent(
        ours=rest + gathered(states, world),
        ulysses=rest + sum(ulysses(*layer, world, element) for layer in softmax),
        ring=rest + kv,
        # All ranks gather all boundaries, and two half-precision moments a group.
        distrifusion=kv
        + gathered(edges + sum(2 * groups * element for groups in layers.norms), world)
        + output,
        # An input of a downsampler is fetched apart from what it is concatenated with.
        collectives=sum((n > 0) + (n > 0) * (sides < 2) for n, sides in layers.rows)
        + len(layers.norms)
        + len(layers.attention)
        + 1,
        flops=layers.flops / world,
    )


# ---- transformers


def flux_sent(
    size: int,
    world: int,
    *,
    radius: int = 8,
    layers: int = 57,
    heads: int = 24,
    dim: int = 128,
    text: int = 512,
    parameters: float = 11.9e9,
    pixels_of_token: int = 16,
    channels: int = 64,
    element: int = HALF,
    last: int = 0,
) -> Sent:
    """Of FLUX.1 with CLEAR's windows, square pictures.

    Args:
        last: layers whose text nobody reads, as the last of Stable Diffusion 3.
    """
    side, width = size // pixels_of_token, heads * dim
    rows = math.ceil(radius) - 1
    window = 2 * rows * side * 2 * width * element
    # A rank merges its share of the text's queries and hands it to all.
    merge = text * heads * (dim + 1) * SINGLE * (world - 1) / world
    merge += gathered(math.ceil(text / world) * width * element, world)
    tokens = side**2
    output = tokens / world * channels * element
    disc = math.pi * radius**2
    core = 4 * (tokens * (disc + text) + text * (tokens + text)) * width
    return Sent(
        ours=layers * window + (layers - last) * merge + gathered(output, world),
        ulysses=layers * ulysses(tokens + text, width, world) + gathered(output, world),
        ring=layers * ring(tokens + text, width, world) + gathered(output, world),
        distrifusion=None,
        collectives=3 * layers - 2 * last + 1,
        flops=(2 * parameters * tokens + layers * core) / world + 2 * parameters * text,
    )


def wan_sent(
    size: int,
    world: int,
    *,
    frames: int = 21,
    layers: int = 30,
    heads: int = 12,
    dim: int = 128,
    parameters: float = 1.42e9,
    window: int = 4,
    taps: int = 4,
    channels: int = 64,
    element: int = HALF,
) -> Sent:
    """Of Wan 2.1 1.3B with MATE (windows of 8 by 4 by 4, review tokens of 2 by 2 by 2).

    Three orders of four have rows elsewhere than slowest: tokens go to the order's ranks and back.
    Rows are multiples of the window, so that only layers whose windows are moved read others' rows.
    """
    side, width = size // 16, heads * dim
    tokens = frames * side**2
    review = math.ceil(frames / 2) * math.ceil(side / 2) ** 2
    states = 2 * 2 * heads * (dim * dim + 1) * SINGLE
    tails = 2 * 2 * (taps - 1) * 3 * width * element
    halo = window * frames * side * 2 * width * element  # half a window to either side
    moved = (2 * tokens + review) / world * width * (world - 1) / world * element
    scanned = gathered(states + tails, world)
    output = gathered(tokens / world * channels * element, world)
    scan = (1 + review / tokens) * (10 * width**2 + 8 * width * dim + 8 * width * 64)
    core = tokens * (4 * 128 * width + scan)
    return Sent(
        ours=layers * (scanned + halo / 2 + 0.75 * moved) + output,
        ulysses=layers * ulysses(tokens, width, world) + output,
        ring=layers * ring(tokens, width, world) + output,
        distrifusion=None,
        collectives=math.ceil(layers * (2 + 0.5 + 1.5)) + 1,
        flops=(2 * parameters * tokens + layers * core) / world,
    )


# ---- tables


def table() -> Iterator[list[str]]:
    """Rows of the docs' table, the heading first: megabytes a rank sends in one forward."""
    yield ["model", "size", "ranks", "linfusion", "Ulysses", "ring", "DistriFusion"]
    for name, size, world, sent in everything():
        rivals = (sent.ours, sent.ulysses, sent.ring, sent.distrifusion)
        yield [name, f"{size}²", str(world), *map(_megabytes, rivals)]


def scaling() -> Iterator[list[str]]:
    """Rows of the docs' table of weak scaling: eight ranks, each with 1/8 of the picture."""
    yield ["model", "size", "compute", "sent", "collectives", "efficiency at 8"]
    for name, size, world, sent in everything():
        if world == max(WORLDS):
            compute = f"{sent.flops / PEAK * 1e3:.1f} ms"
            wire = f"{sent.ours / LINK * 1e3:.2f} ms"
            yield [name, f"{size}²", compute, wire, str(sent.collectives), f"{sent.efficiency:.0%}"]


def everything() -> Iterator[tuple[str, int, int, Sent]]:
    for size in SIZES:
        layers = sdxl(size)
        for world in WORLDS:
            yield "SDXL", size, world, unet_sent(layers, 4 * (size // 8) ** 2, world)
    for size in SIZES:
        for world in WORLDS:
            yield "FLUX.1, r = 8", size, world, flux_sent(size, world)
    for size in SIZES:
        for world in WORLDS:
            yield "Wan 1.3B, 81 frames", size, world, wan_sent(size, world)


def _megabytes(nbytes: float | None) -> str:
    return "–" if nbytes is None else f"{nbytes / 1e6:,.0f}"


def markdown(rows: Iterator[list[str]]) -> str:
    """A table in Markdown, whose columns after the first flush right."""
    heading, *rest = rows
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, rule, *rest))


if __name__ == "__main__":
    print(markdown(table()), markdown(scaling()), sep="\n\n")
