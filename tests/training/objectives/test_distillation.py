"""Teacher and student in one model, and their losses."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from safetensors.torch import load_file

import linfusion
from linfusion.training import Distillation
from linfusion.training.teachers.images import noise_scheduler, training_target
from tests.tiny import denoise, tiny_unet, tiny_xl_unet, unet_inputs


def batch(unet, n=2):
    inputs = unet_inputs(unet, batch=n, seed=3)
    target = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    return {**inputs, "timestep": inputs["timestep"].expand(n)}, target


def disturb(pair):
    """Move the student away from the teacher."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in pair.trained().values():
            p += 0.1 * torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("build", [tiny_unet, tiny_xl_unet])
def test_the_teacher_inside_is_the_unet_bit_for_bit(build):
    unet = build()
    before = denoise(unet)
    pair = Distillation(unet)
    disturb(pair)
    with pair.teacher():
        assert torch.equal(denoise(unet), before)
    assert (denoise(unet) - before).abs().max() > 1e-2


def test_closing_gives_back_the_same_bits():
    unet = tiny_unet().train()
    unet.conv_in.requires_grad_(False)
    original = copy.deepcopy(unet)
    flags = [p.requires_grad for p in unet.parameters()]
    pair = Distillation(unet)
    disturb(pair)
    pair.close()
    state = original.state_dict()
    assert unet.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in unet.state_dict().items())
    assert [p.requires_grad for p in unet.parameters()] == flags and unet.training
    assert torch.equal(denoise(unet.eval()), denoise(original.eval()))


def test_a_new_student_is_the_linear_form_of_its_teacher():
    linear = tiny_unet()
    linfusion.linearize(linear, "linfusion")
    unet = tiny_unet()
    Distillation(unet)
    assert torch.equal(denoise(unet), denoise(linear))


def test_only_attention_is_trained():
    with_projections = Distillation(tiny_unet()).trained()
    without = Distillation(tiny_unet(), train_projections=False).trained()
    assert set(without) < set(with_projections)
    assert all(".attn1.linfusion." in name for name in without)
    kinds = {name.split(".attn1.")[1].split(".")[0] for name in with_projections}
    assert kinds == {"linfusion", "to_q", "to_k", "to_v", "to_out"}


def test_losses_are_those_of_the_paper():
    unet = tiny_unet()
    pair = Distillation(unet)
    disturb(pair)
    inputs, target = batch(unet)
    losses = pair.losses(unet, inputs, target)

    def run():
        outputs = {}
        hooks = [
            layer.register_forward_hook(lambda m, a, out, name=name: outputs.update({name: out}))
            for name, layer in pair.layers.items()
        ]
        with torch.no_grad():
            prediction = unet(**inputs).sample
        for hook in hooks:
            hook.remove()
        return prediction, outputs

    student, student_features = run()
    with pair.teacher():
        teacher, teacher_features = run()
    features = [F.mse_loss(student_features[n], teacher_features[n]) for n in pair.layers]
    assert len(features) == 7
    torch.testing.assert_close(losses["simple"], F.mse_loss(student, target))
    torch.testing.assert_close(losses["kd"], F.mse_loss(student, teacher))
    torch.testing.assert_close(losses["feature"], torch.stack(features).mean())


@pytest.mark.parametrize("loss", ["simple", "kd", "feature"])
def test_each_loss_reaches_what_is_trained_and_nothing_else(loss):
    unet = tiny_unet()
    pair = Distillation(unet)
    disturb(pair)
    pair.losses(unet, *batch(unet))[loss].backward()
    reached = {name for name, p in unet.named_parameters() if p.grad is not None}
    assert reached == set(pair.trained())
    assert all(p.grad is None for _, parts in pair._teacher.values()
               for m in parts.values() for p in m.parameters())  # fmt: skip


def test_training_brings_the_student_to_its_teacher():
    unet = tiny_unet()
    pair = Distillation(unet)
    optimizer = torch.optim.AdamW(pair.trained().values(), lr=5e-4)
    distances = []
    for _ in range(16):
        losses = pair.losses(unet, *batch(unet))
        distances.append(losses["kd"].item())
        optimizer.zero_grad()
        (losses["kd"] + losses["feature"]).backward()
        optimizer.step()
    assert distances[-1] < 0.6 * distances[0]


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        unet = tiny_unet()
        pair = Distillation(unet)
        disturb(pair)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        losses = pair.losses(unet, *batch(unet))
        sum(losses.values()).backward()
        gradients.append({name: p.grad for name, p in pair.trained().items()})
    plain, checkpointed = gradients
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-4, atol=1e-6)


def test_a_student_continues_from_saved_weights(tmp_path):
    first = Distillation(tiny_unet())
    disturb(first)
    first.save(tmp_path)
    unet = tiny_unet()
    before = denoise(unet)
    second = Distillation(unet, weights=tmp_path)
    assert torch.equal(denoise(second.model), denoise(first.model))
    with second.teacher():
        assert torch.equal(denoise(second.model), before)
    second.close()
    assert torch.equal(denoise(unet), before)


def test_a_half_precision_base_has_a_student_in_fp32():
    unet = tiny_unet().bfloat16()
    pair = Distillation(unet)
    assert {p.dtype for p in pair.trained().values()} == {torch.float32}
    inputs, target = batch(unet)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = pair.losses(unet, inputs, target.bfloat16())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pair.trained().values())
    pair.close()
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_of_the_target_gives_back_the_latents(prediction):
    scheduler = noise_scheduler(DDPMScheduler(prediction_type=prediction))
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 4, 8, 8, generator=g, dtype=torch.float64)
    t = torch.tensor([0, 500, 900])
    noisy = scheduler.add_noise(x, noise, t)
    target = training_target(scheduler, x, noise, t)
    a = scheduler.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    if prediction == "epsilon":
        found = (noisy - (1 - a).sqrt() * target) / a.sqrt()
    else:
        found = a.sqrt() * noisy - (1 - a).sqrt() * target
    torch.testing.assert_close(found, x, rtol=0, atol=1e-4)


def test_a_prediction_type_set_later_is_honoured():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="v_prediction")
    assert noise_scheduler(scheduler).config.prediction_type == "v_prediction"


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="prediction_type: the scheduler has 'sample', accepted"):
        noise_scheduler(DDPMScheduler(prediction_type="sample"))


def test_what_a_projection_learns_is_kept_at_its_rank_and_saved_as_that(tmp_path):
    unet = tiny_unet()
    pair = Distillation(unet, projection_rank=2)
    disturb(pair)
    pair.constrain()
    moved = denoise(unet)
    path, attn = next(iter(pair.layers.items()))
    with pair.teacher():
        base = copy.deepcopy(unet.get_submodule(path).to_q.weight)
    found = torch.linalg.svdvals(attn.to_q.weight - base)
    assert found[1] > 1e-2 and found[2:].max() < 1e-5
    pair.save(tmp_path)
    pair.close()
    linfusion.linearize(unet, weights=tmp_path)
    torch.testing.assert_close(denoise(unet), moved, rtol=0, atol=1e-4)
    names = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert f"{path}.to_q.lora_A.weight" in names and f"{path}.to_q.weight" not in names


def test_a_rank_that_no_projection_has_is_refused_before_anything_changes():
    unet = tiny_unet()
    before = denoise(unet)
    with pytest.raises(ValueError, match="projection_rank: got 4096, expected a whole number"):
        Distillation(unet, projection_rank=4096)
    assert torch.equal(denoise(unet), before) and linfusion.summary(unet)


def test_nothing_of_a_step_is_held_after_its_backward_pass_with_checkpointing():
    unet = tiny_unet()
    pair = Distillation(unet)
    disturb(pair)
    unet.enable_gradient_checkpointing()
    unet.train()
    alive = weakref.WeakSet()
    first = next(iter(pair.layers.values()))
    first.register_forward_hook(lambda module, args, output: alive.add(output))
    losses = pair.losses(unet, *batch(unet))
    sum(losses.values()).backward()
    del losses
    gc.collect()
    assert all(p.grad is not None for p in pair.trained().values())
    # Of the teacher's output, which the next step replaces, there is no graph.
    assert not any(output.requires_grad for output in alive)


def test_checkpointing_changes_no_gradient_of_the_feature_loss():
    grads = []
    for checkpointing in (False, True):
        unet = tiny_unet()
        pair = Distillation(unet)
        disturb(pair)
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        for _ in range(2):  # the second step finds what the first left
            unet.zero_grad()
            pair.losses(unet, *batch(unet))["feature"].backward()
        grads.append({name: p.grad for name, p in pair.trained().items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4)


def test_a_second_thread_is_refused_while_the_model_is_the_teacher():
    unet = tiny_unet()
    pair = Distillation(unet)
    errors = []

    def work():
        try:
            pair.losses(unet, *batch(unet))
        except RuntimeError as error:
            errors.append(str(error))

    with pair.teacher():
        before = denoise(unet)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert torch.equal(denoise(unet), before)
    assert len(errors) == 1 and "another thread uses this model as a teacher" in errors[0]
    pair.losses(unet, *batch(unet))


def test_quantized_projections_are_not_trained():
    class QLinear(torch.nn.Linear):
        pass

    unet = tiny_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v.__class__ = QLinear
    before = list(unet.state_dict())
    with pytest.raises(ValueError, match=r"mid_block.*to_v are quantised or otherwise changed"):
        Distillation(unet)
    assert list(unet.state_dict()) == before
