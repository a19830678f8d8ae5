"""The loss of a diffusion transformer with learned variance, and LiT's distillation."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from linfusion.training.objectives.hybrid import hybrid_losses, log_sigma2, variational_bound


def scheduler(**changes):
    return DDPMScheduler(beta_schedule="linear", variance_type="learned_range", **changes)


def batch(channels=8, t=(0, 1, 400, 999)):
    g = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, len(t), 4, 6, 6, generator=g) * 0.5
    t = torch.tensor(t)
    student, teacher = torch.randn(2, len(t), channels, 6, 6, generator=g)
    x_t = scheduler().add_noise(x_0, noise, t)
    return student, teacher, noise, x_t, x_0, t, scheduler()


def test_the_total_is_the_sum_of_its_parts():
    losses = hybrid_losses(*batch(), kd_noise=0.5, kd_variance=0.05)
    parts = losses.simple + losses.bound + 0.5 * losses.noise + 0.05 * losses.variance
    torch.testing.assert_close(losses.total, parts)
    assert all(part > 0 for part in losses)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    student, _, *rest = batch()
    losses = hybrid_losses(student, student.clone(), *rest)
    assert losses.noise == 0 and losses.variance == 0
    alone = hybrid_losses(student, None, *rest, kd_noise=0.0, kd_variance=0.0)
    assert torch.equal(losses.total, alone.total)


def gradient(part, **options):
    student, teacher, *rest = batch()
    student.requires_grad_(), teacher.requires_grad_()
    getattr(hybrid_losses(student, teacher, *rest, **options), part).backward()
    assert teacher.grad is None
    return student.grad.chunk(2, 1)


@pytest.mark.parametrize(
    "part, to_noise, to_variance",
    [
        ("simple", True, False),
        ("bound", False, True),
        ("noise", True, False),
        ("variance", False, True),
    ],
)
def test_each_part_teaches_one_head(part, to_noise, to_variance):
    noise, variance = gradient(part)
    assert (bool(noise.any()), bool(variance.any())) == (to_noise, to_variance)


def test_the_learned_variance_lies_between_beta_and_its_posterior():
    s, t = scheduler(), torch.arange(1, 1000)
    raw = torch.ones(999, 1, 1, 1)
    high, low = log_sigma2(raw, t, s), log_sigma2(-raw, t, s)
    torch.testing.assert_close(high.flatten(), s.betas[1:].log(), atol=1e-5, rtol=0)
    assert (low < high).all()
    # At t = 0 the posterior has no variance; the entry of t = 1 stands in.
    zero = log_sigma2(-raw[:1], torch.tensor([0]), s)
    torch.testing.assert_close(zero, low[:1])


def test_the_learned_variance_is_the_one_that_diffusers_samples_with():
    s, raw = scheduler(), torch.randn(1, 4, 6, 6)
    for t in (1, 500, 999):
        theirs = s._get_variance(t, predicted_variance=raw)
        torch.testing.assert_close(
            log_sigma2(raw, torch.tensor([t]), s), theirs, rtol=1e-4, atol=1e-4
        )


def test_the_bound_is_the_divergence_of_two_gaussians():
    student, _, _, x_t, x_0, t, s = batch(t=(2, 500, 999))
    eps, raw = student.chunk(2, 1)
    found = variational_bound(eps, raw, x_t, x_0, t, s)
    abar, betas = s.alphas_cumprod, s.betas
    for i, n in enumerate(t.tolist()):
        before, after, beta = abar[n - 1].double(), abar[n].double(), betas[n].double()
        guess = (x_t[i].double() - (1 - after).sqrt() * eps[i]) / after.sqrt()
        mean, true_mean = (
            before.sqrt() * beta / (1 - after) * x
            + (1 - beta).sqrt() * (1 - before) / (1 - after) * x_t[i]
            for x in (guess, x_0[i].double())
        )
        sigma = (log_sigma2(raw[i : i + 1], t[i : i + 1], s)[0].double() / 2).exp()
        true_sigma = ((1 - before) / (1 - after) * beta).sqrt().expand_as(sigma)
        kl = torch.distributions.kl_divergence(
            torch.distributions.Normal(true_mean, true_sigma),
            torch.distributions.Normal(mean, sigma),
        )
        torch.testing.assert_close(found[i].double(), kl.mean() / math.log(2), rtol=2e-3, atol=1e-7)


def test_the_last_step_is_the_likelihood_of_bins():
    student, _, noise, _, x_0, t, s = batch(t=(0,))
    x_0 = x_0.clamp(-0.9, 0.9)
    raw = student[:, 4:]
    x_t = s.add_noise(x_0, noise, t)
    found = variational_bound(noise, raw, x_t, x_0, t, s)  # the right noise: the mean is x_0
    sigma = (log_sigma2(raw, t, s) / 2).exp()
    normal = torch.distributions.Normal(0.0, sigma)
    mass = normal.cdf(torch.tensor(1 / 255)) - normal.cdf(torch.tensor(-1 / 255))
    torch.testing.assert_close(found, -mass.log().mean()[None] / math.log(2), rtol=1e-3, atol=1e-4)


def test_the_bound_is_finite_far_from_the_truth():
    student, _, _, x_t, x_0, t, s = batch()
    found = variational_bound(student[:, :4] * 50, student[:, 4:] * 3, x_t, x_0 * 4, t, s)
    assert found.isfinite().all()


def test_log_variance_compares_variances():
    *head, s = batch()
    raw = hybrid_losses(*head, s)
    log = hybrid_losses(*head, s, log_variance=True)
    assert log.noise == raw.noise and 0 < log.variance < raw.variance


def test_without_a_variance_head_there_is_no_bound():
    student, _, *rest = batch(channels=4)
    losses = hybrid_losses(student, student + 1, *rest, kd_variance=0.0)
    assert losses.bound == 0 and losses.variance == 0
    torch.testing.assert_close(losses.noise, torch.tensor(1.0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"teacher": None}, "kd_noise: got 0.5, but teacher_out is None"),
        ({"teacher": (4, 4, 6, 6)}, "kd_variance: got 0.05, but teacher_out has 4 channels"),
        ({"student": (4, 4, 6, 6)}, "kd_variance: got 0.05, but student_out has 4 channels"),
        ({"teacher": (4, 8, 3, 6)}, r"teacher_out: got \(4, 8, 3, 6\), expected"),
        ({"x_t": (4, 4, 3, 6)}, r"x_t: got \(4, 4, 3, 6\)"),
        ({"t": (3,)}, r"t: got \(3,\), expected \(4,\)"),
        ({"kd_noise": -1}, "kd_noise: got -1, expected 0 or a positive number"),
        ({"prediction": "v_prediction"}, "scheduler: predicts 'v_prediction'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    student, teacher, noise, x_t, x_0, t, s = batch()
    if "student" in change:
        student = torch.zeros(change["student"])
    if "teacher" in change:
        teacher = change["teacher"] and torch.zeros(change["teacher"])
    x_t = torch.zeros(change.get("x_t", x_t.shape))
    t = torch.zeros(change.get("t", t.shape), dtype=torch.long)
    s = scheduler(prediction_type=change.get("prediction", "epsilon"))
    with pytest.raises(ValueError, match=message):
        hybrid_losses(student, teacher, noise, x_t, x_0, t, s, kd_noise=change.get("kd_noise", 0.5))
