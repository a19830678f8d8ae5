"""What is run and compared with the reference, at sizes chosen to hurt.

A case launches kernels through the library's own code and returns how far each result is from the
float64 reference. To add a family of kernels, write a function in `families` that takes a `Target`,
and give its cases a name in `CASES`.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.ptx.comparing import Case, Comparison, bf16, f16, f32
from benchmarks.ptx.families import elementwise, linear, scan, window


def _case(function: Callable[..., list[Comparison]], *arguments: object, **options: object) -> Case:
    return lambda target: function(target, *arguments, **options)


CASES: dict[str, Case] = {
    "linear bf16 D=40": _case(linear.linear, bf16, 200, 300, 2, 40),
    "linear bf16 D=64, packed": _case(linear.linear, bf16, 200, 200, 2, 64, packed=True),
    "linear f16 D=80, weighted": _case(linear.linear, f16, 150, 170, 2, 80, weighted=True),
    "linear bf16 D=160": _case(linear.linear, bf16, 130, 130, 1, 160),
    "linear f32 D=64": _case(linear.linear, f32, 100, 130, 2, 64),
    "linear bf16 D=72, relu_eps, sum": _case(
        linear.linear, bf16, 100, 100, 2, 72, phi="relu_eps", normalizer="sum"
    ),
    "linear bf16 D=64, nothing normalised": _case(
        linear.linear, bf16, 100, 100, 2, 64, phi="identity", normalizer="none"
    ),
    "linear one token": _case(linear.linear, bf16, 1, 1, 1, 64),
    "linear bf16 D=8, 3 heads, batch 2": _case(linear.linear, bf16, 33, 65, 3, 8, batch=2),
    "linear f16 D=33": _case(linear.linear, f16, 70, 50, 2, 33),
    "linear bf16 D=64, Dv=24": _case(linear.linear, bf16, 70, 90, 2, 64, dv=24),
    "linear f32 D=20, Dv=130": _case(linear.linear, f32, 40, 50, 1, 20, dv=130),
    "linear bf16 D=320": _case(linear.linear, bf16, 40, 70, 1, 320),
    "linear many splits": _case(linear.linear, bf16, 64, 2000, 1, 64),
    "linear two bytes off": _case(linear.strided, bf16, linear.two_bytes_off),
    "linear heads first": _case(linear.strided, f16, linear.heads_first),
    "linear every third token": _case(linear.strided, bf16, linear.every_third_token),
    "linear features apart": _case(linear.strided, bf16, linear.features_apart),
    "linear expanded": _case(linear.strided, bf16, linear.expanded),
    "window bf16 D=64, r=5": _case(window.window, bf16, (20, 27), 5.0, 2, 64, always=70),
    "window bf16 D=128, tiled": _case(
        window.window, bf16, (19, 17), 6.0, 1, 128, always=33, tiled=True
    ),
    "window f16 D=40, video": _case(window.window, f16, (5, 9, 6), 3.0, 2, 40),
    "window f32 D=64": _case(window.window, f32, (13, 20), 4.0, 1, 64, always=20),
    "window f32 D=128, square": _case(
        window.window, f32, (13, 10), 4.0, 1, 128, always=5, shape="square"
    ),
    "window 1 × 9, r=100": _case(window.window, bf16, (1, 9), 100.0, 3, 64, always=1, batch=2),
    "window 9 × 1 × 2": _case(window.window, f16, (9, 1, 2), 2.0, 1, 16, tiled=True),
    "window r=1, D=72": _case(window.window, bf16, (10, 10), 1.0, 1, 72),
    "window f32 D=8": _case(window.window, f32, (9, 11), 3.5, 1, 8, always=3),
    "window bf16 D=80, cells": _case(
        window.window, bf16, (13, 18), 3.0, 1, 80, always=5, cells=(4, 4)
    ),
    "window f32 D=16, cells, video": _case(
        window.window, f32, (3, 5, 7), 2.0, 1, 16, cells=(2, 2, 3)
    ),
    "hybrid bf16 D=64": _case(window.hybrid, bf16, (13, 18), 3.0, 2, 64, 64),
    "hybrid bf16 D=72, 120 features, tiled": _case(
        window.hybrid, bf16, (9, 13), 3.0, 1, 72, 120, tiled=True
    ),
    "hybrid f32 D=16, video": _case(window.hybrid, f32, (3, 5, 7), 2.0, 1, 16, 8),
    "norm and activation bf16, 320 channels": _case(elementwise.norm_and_activation, bf16, 70, 320),
    "norm and activation f32, 129 channels": _case(elementwise.norm_and_activation, f32, 37, 129),
    "norm and rotation bf16 D=128": _case(elementwise.norm_and_rotation, bf16, 33, 3, 128),
    "norm and rotation f16 D=36": _case(elementwise.norm_and_rotation, f16, 7, 2, 36),
    "both directions bf16, 128 channels": _case(elementwise.both_directions, bf16, 37, 128, 4, 0),
    "both directions f32, 36 channels": _case(elementwise.both_directions, f32, 20, 36, 7, 3),
    "gate and norm bf16 D=320": _case(elementwise.gate_and_norm, bf16, 19, 1, 320),
    "norm and gate f32, 3×20": _case(elementwise.gate_and_norm, f32, 9, 3, 20, gate_last=True),
    "scan bf16 64×64, chunk 256": _case(scan.scan, bf16, 600, 2, 1, 64, 64, 256),
    "scan bf16 64×64, chunk 64, reverse": _case(
        scan.scan, bf16, 200, 4, 2, 64, 64, 64, reverse=True
    ),
    "scan f16 64×128, chunk 128": _case(scan.scan, f16, 300, 2, 1, 64, 128, 128, extras=False),
    "scan f32 32×16, chunk 16": _case(scan.scan, f32, 75, 2, 1, 32, 16, 16),
    "scan one token": _case(scan.scan, bf16, 1, 2, 1, 64, 64, 64),
    "scan bf16 100×24, chunk 17": _case(scan.scan, bf16, 70, 2, 2, 100, 24, 17),
    "scan f16 8×8, batch 2": _case(scan.scan, f16, 40, 3, 1, 8, 8, 256, batch=2, reverse=True),
    "scan bf16 128×128": _case(scan.scan, bf16, 140, 1, 1, 128, 128, 128),
    "scan f32 128×128": _case(scan.scan, f32, 50, 1, 1, 128, 128, 64),
    "scan 8 heads, splits": _case(scan.scan, bf16, 70, 8, 1, 32, 32, 64, extras=False),
}
