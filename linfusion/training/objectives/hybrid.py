"""The loss of a diffusion transformer that predicts noise and variance, and LiT's distillation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class HybridLosses(NamedTuple):
    """Scalars; `total` is what to go down on.

    Attributes:
        total: simple + bound + kd_noise·noise + kd_variance·variance.
        simple: MSE to the noise that was added.
        bound: variational bound of the learned variance in bits a dimension, 0 without one.
        noise: MSE to the teacher's noise, 0 without a teacher.
        variance: MSE to the teacher's variance head, 0 without one.
    """

    total: Tensor
    simple: Tensor
    bound: Tensor
    noise: Tensor
    variance: Tensor


def hybrid_losses(
    student_out: Tensor,
    teacher_out: Tensor | None,
    noise: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    t: Tensor,
    scheduler: Any,
    kd_noise: float = 0.5,
    kd_variance: float = 0.05,
    log_variance: bool = False,
) -> HybridLosses:
    """L_simple + L_vb + λ₁ MSE(ε, ε_T) + λ₂ MSE(v, v_T)  (Wang et al. 2025, LiT, eq. 5).

    L_vb is that of Nichol & Dhariwal 2021 (eq. 15 f.) with the mean detached, so that it teaches
    the variance alone; it is not rescaled, as in DiT.

    Args:
        student_out: [B, 2C, H, W], noise and raw variance head, or [B, C, H, W] without variance.
        teacher_out: of the teacher for the same x_t, t and condition; None trains without one.
        noise: [B, C, H, W], what was added.
        x_t, x_0: [B, C, H, W], the noisy and the clean latents.
        t: [B], whole timesteps.
        scheduler: with `betas` and `alphas_cumprod`, epsilon prediction.
        kd_noise: λ₁; 0.5 class-conditional, 1.0 text-to-image.
        kd_variance: λ₂; 0.05.
        log_variance: compare log σ² instead of the raw head; its range shrinks as t grows.

    Raises:
        ValueError: shapes that do not agree; a λ without a teacher, or λ₂ without a variance head;
            a scheduler that predicts something else.
    """
    prediction = scheduler.config.prediction_type
    if prediction != "epsilon":
        raise ValueError(f"scheduler: predicts {prediction!r}; the loss is that of 'epsilon'")
    channels = noise.shape[1]
    for name, x in (("x_t", x_t), ("x_0", x_0)):
        if x.shape != noise.shape:
            raise ValueError(f"{name}: got {tuple(x.shape)}, the noise is {tuple(noise.shape)}")
    if t.shape != noise.shape[:1]:
        raise ValueError(f"t: got {tuple(t.shape)}, expected ({noise.shape[0]},)")
    for name, value in (("kd_noise", kd_noise), ("kd_variance", kd_variance)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: got {value!r}, expected 0 or a positive number")
        if value and teacher_out is None:
            raise ValueError(f"{name}: got {value}, but teacher_out is None; expected 0")
    eps, raw = _halves("student_out", student_out, noise)
    zero = eps.new_zeros(())
    simple = (noise.float() - eps).square().mean()
    bound = zero
    if raw is not None:
        bound = variational_bound(eps.detach(), raw, x_t, x_0, t, scheduler).mean()
    kd_eps = kd_var = zero
    if teacher_out is not None:
        eps_teacher, raw_teacher = _halves("teacher_out", teacher_out.detach(), noise)
        kd_eps = (eps_teacher - eps).square().mean()
        if kd_variance:
            missing = "student_out" if raw is None else "teacher_out"
            if raw is None or raw_teacher is None:
                raise ValueError(
                    f"kd_variance: got {kd_variance}, but {missing} has {channels} channels and no"
                    " variance head; expected 0"
                )
            if log_variance:
                raw, raw_teacher = (log_sigma2(x, t, scheduler) for x in (raw, raw_teacher))
            kd_var = (raw_teacher - raw).square().mean()
    total = simple + bound + kd_noise * kd_eps + kd_variance * kd_var
    return HybridLosses(total, simple, bound, kd_eps, kd_var)


def log_sigma2(raw: Tensor, t: Tensor, scheduler: Any) -> Tensor:
    """log σ² = f log β_t + (1 - f) log β̃_t,  f = (v + 1)/2  (Nichol & Dhariwal 2021, eq. 15).

    Args:
        raw: [B, C, H, W], the variance head.
        t: [B].
        scheduler: with `betas` and `alphas_cumprod`.
    """
    betas, posterior = scheduler.betas.double(), _posterior_variance(scheduler)
    low, high = (_at(x.log(), t, raw) for x in (posterior, betas))
    fraction = (raw.float() + 1) / 2
    return fraction * high + (1 - fraction) * low


def variational_bound(
    eps: Tensor, raw: Tensor, x_t: Tensor, x_0: Tensor, t: Tensor, scheduler: Any
) -> Tensor:
    """One term of the bound for each picture, [B], in bits a dimension.

    KL(q(x_{t-1} | x_t, x_0) ‖ N(μ(ε), σ²)), and at t = 0 -log p(x_0) with bins of 1/127.5.

    Args:
        eps: [B, C, H, W], predicted noise; detach it to teach the variance alone.
        raw: [B, C, H, W], the variance head.
        x_t, x_0: [B, C, H, W].
        t: [B].
        scheduler: with `betas` and `alphas_cumprod`.
    """
    abar = scheduler.alphas_cumprod.double()
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    betas = scheduler.betas.double()
    c_0 = betas * before.sqrt() / (1 - abar)
    c_t = (1 - before) * (1 - betas).sqrt() / (1 - abar)

    x_t, x_0, eps = x_t.float(), x_0.float(), eps.float()
    guess = (x_t - _at((1 - abar).sqrt(), t, x_t) * eps) / _at(abar.sqrt(), t, x_t)
    mean = _at(c_0, t, x_t) * guess + _at(c_t, t, x_t) * x_t
    true_mean = _at(c_0, t, x_t) * x_0 + _at(c_t, t, x_t) * x_t
    true_log = _at(_posterior_variance(scheduler).log(), t, x_t)
    log = log_sigma2(raw, t, scheduler)
    kl = 0.5 * (
        log - true_log - 1 + (true_log - log).exp() + (true_mean - mean).square() * (-log).exp()
    )
    first = -_binned_log_likelihood(x_0, mean, 0.5 * log)
    nats = torch.where(t.view(-1, 1, 1, 1) == 0, first, kl)
    return nats.mean((1, 2, 3)) / math.log(2)


def _halves(name: str, out: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
    """Noise and variance head of a model's output, float32."""
    batch, channels, *size = noise.shape
    if tuple(out.shape) not in {(batch, channels, *size), (batch, 2 * channels, *size)}:
        raise ValueError(
            f"{name}: got {tuple(out.shape)}, expected {(batch, channels, *size)} or, with a"
            f" variance head, {(batch, 2 * channels, *size)}"
        )
    out = out.float()
    if out.shape[1] == channels:
        return out, None
    return out[:, :channels], out[:, channels:]


def _posterior_variance(scheduler: Any) -> Tensor:
    """β̃, whose first entry, 0, is replaced by the second."""
    abar, betas = scheduler.alphas_cumprod.double(), scheduler.betas.double()
    variance = betas[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    return torch.cat([variance[:1], variance])


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries `t` of a table [T] as float32 [B, 1, 1, 1]."""
    return table.to(like.device)[t].float().view(-1, 1, 1, 1)


def _binned_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the mass of a Gaussian in the bin of x, of width 2/255; the outermost are open."""
    inverse = (-log_scale).exp()
    upper = torch.special.log_ndtr((x - mean + 1 / 255) * inverse)
    above = torch.special.log_ndtr(-(x - mean - 1 / 255) * inverse)
    inside = torch.special.ndtr((x - mean + 1 / 255) * inverse) - torch.special.ndtr(
        (x - mean - 1 / 255) * inverse
    )
    middle = inside.clamp(min=1e-12).log()
    return torch.where(x < -0.999, upper, torch.where(x > 0.999, above, middle))
