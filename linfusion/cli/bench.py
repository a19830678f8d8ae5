"""`linfusion bench`: one attention layer, softmax and linear, side by side on this machine."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from linfusion.cli import check, load
from linfusion.cli.check import parse_size
from linfusion.cli.console import Json, emit_json, emit_table, say, working
from linfusion.cli.info import machine

if TYPE_CHECKING:
    import torch


def bench(
    sizes: Annotated[
        list[str] | None,
        Option("--size", metavar="WxH", help="Picture in pixels; repeat. [default: 512, 1024]"),
    ] = None,
    channels: Annotated[
        int, Option(min=8, help="Of the layer; 320 in Stable Diffusion 1.5.")
    ] = 320,
    heads: Annotated[int, Option(min=1, help="Of the layer.")] = 8,
    batch_size: Annotated[int, Option(min=1, help="Pictures at a time.")] = 1,
    dtype: load.DtypeOption = "auto",
    device: load.DeviceOption = None,
    method: Annotated[str, Option("--method", help="The linear attention to time.")] = "linfusion",
    runs: Annotated[int, Option(min=1, help="Timed runs of each; the median counts.")] = 5,
    as_json: Json = False,
) -> None:
    """Time softmax against linear on this machine.

    One self-attention layer with random weights, as in the first level of a UNet: a latent is 8
    pixels wide, so a picture of W x H pixels has W·H/64 tokens there.
    """
    tokens = {}
    for size in sizes or ["512", "1024"]:
        height, width = parse_size(size)
        tokens[size] = height * width // 64
    if channels % heads:
        raise ValueError(f"channels: {channels} is not a multiple of the {heads} heads")
    device = check.check_device(device, balanced=False)
    rows = []
    with working():
        softmax, linear = _layers(channels, heads, method, load.parse_dtype(dtype, device), device)
        for size, count in tokens.items():
            say(f"{size}: {count} tokens")
            rows.append(
                {"size": size, "tokens": count} | _race(softmax, linear, count, batch_size, runs)
            )
        result = {
            "machine": machine(),
            "device": device,
            "dtype": str(next(softmax.parameters()).dtype).removeprefix("torch."),
            "channels": channels,
            "heads": heads,
            "batch_size": batch_size,
            "method": method,
            "runs": runs,
            "rows": rows,
        }
    if as_json:
        emit_json(result)
    else:
        _print(result)


def _layers(
    channels: int, heads: int, method: str, dtype: torch.dtype, device: str
) -> tuple[Any, Any]:
    """The same layer twice: as diffusers runs it, and linear with a learned part beside it."""
    import copy

    import torch
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    from linfusion.attention import get_method
    from linfusion.attention.base import SelfAttentionProcessor

    chosen = get_method(method)
    kind = chosen.processor
    if isinstance(kind, tuple) or not issubclass(kind, SelfAttentionProcessor):
        raise ValueError(
            f"method: {method!r} needs the grid of its tokens from a whole model, which one layer"
            " alone is not; make bench measures it there"
        )
    torch.manual_seed(0)
    softmax = Attention(channels, heads=heads, dim_head=channels // heads)
    softmax.set_processor(AttnProcessor2_0())
    linear = copy.deepcopy(softmax)
    [setting] = chosen.settings({"layer": linear}, None, {}).values()
    linear.add_module(chosen.name, chosen.child(linear, setting))
    linear.set_processor(chosen.processors(linear)(linear))
    return softmax.to(device, dtype).eval(), linear.to(device, dtype).eval()


def _race(softmax: Any, linear: Any, tokens: int, batch_size: int, runs: int) -> dict[str, Any]:
    """Both layers on the same input, turn by turn, so that a busy machine slows them alike."""
    import torch

    from linfusion.cli.measure import measure

    like = next(softmax.parameters())
    x = torch.randn(batch_size, tokens, like.shape[-1], device=like.device, dtype=like.dtype)
    layers = {"softmax": softmax, "linear": linear}
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    peaks: dict[str, list[int | None]] = {name: [] for name in layers}
    with torch.inference_mode():
        for run in range(runs + 1):  # the first warms up
            for name, layer in layers.items():
                _, took, peak = measure(partial(layer, x), str(like.device))
                if run:
                    seconds[name].append(took)
                    peaks[name].append(peak)
    row: dict[str, Any] = {}
    for name in layers:
        row[f"{name}_seconds"] = statistics.median(seconds[name])
        known = [peak for peak in peaks[name] if peak is not None]
        row[f"{name}_peak_bytes"] = max(known) if known else None
    row["speedup"] = row["softmax_seconds"] / row["linear_seconds"]
    return row


def _print(result: dict[str, Any]) -> None:
    from linfusion.cli.measure import human_bytes

    emit_table(
        ["size", "tokens", "softmax", "linear", "speed-up", "softmax peak", "linear peak"],
        [
            [
                row["size"],
                f"{row['tokens']:,}",
                f"{row['softmax_seconds'] * 1e3:.1f} ms",
                f"{row['linear_seconds'] * 1e3:.1f} ms",
                f"{row['speedup']:.2f}×",
                human_bytes(row["softmax_peak_bytes"]),
                human_bytes(row["linear_peak_bytes"]),
            ]
            for row in result["rows"]
        ],
        title=(
            f"{result['method']}, {result['channels']} channels, {result['heads']} heads, "
            f"{result['dtype']}, {result['device']}; median of {result['runs']} runs; "
            f"peak above the layer and its input. {result['machine']}"
        ),
    )
