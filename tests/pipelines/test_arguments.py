"""One request, as pipelines of different kinds take it."""

import pytest

from linfusion.pipelines.arguments import draw_arguments, pixel_multiple
from tests.tiny import tiny_sd_pipeline
from tests.tiny_joint import tiny_flux, tiny_flux_pipeline, tiny_sd3_pipeline, tiny_t5_tokenizer


def test_guidance_of_a_unet_is_its_own_argument():
    asked = draw_arguments(tiny_sd_pipeline(), 2, guidance_scale=4.0, negative_prompt="red")
    assert asked == {"guidance_scale": 4.0, "negative_prompt": ["red", "red"]}


def test_what_is_not_asked_for_is_left_to_the_pipeline():
    assert draw_arguments(tiny_sd_pipeline()) == {}


def test_guidance_of_flux_with_an_embedding_is_embedded():
    assert draw_arguments(tiny_flux_pipeline(), guidance_scale=4.0)["guidance_scale"] == 4.0


def test_guidance_of_flux_without_an_embedding_is_classifier_free():
    pipe = tiny_flux_pipeline(transformer=tiny_flux(guidance_embeds=False))
    asked = draw_arguments(pipe, 2, guidance_scale=4.0)
    assert asked["true_cfg_scale"] == 4.0 and asked["negative_prompt"] == ["", ""]
    assert "true_cfg_scale" not in draw_arguments(pipe, guidance_scale=1.0)


def test_a_negative_prompt_that_would_not_be_read_is_refused():
    pipe = tiny_flux_pipeline(transformer=tiny_flux(guidance_embeds=False))
    with pytest.raises(ValueError, match="negative_prompt: FluxPipeline reads it only with"):
        draw_arguments(pipe, negative_prompt="red")


def test_a_short_text_encoder_is_asked_for_no_more_than_it_reads():
    tokenizer = tiny_t5_tokenizer()
    tokenizer.model_max_length = 6
    asked = draw_arguments(tiny_flux_pipeline(tokenizer_2=tokenizer))
    assert asked == {"max_sequence_length": 6}
    assert draw_arguments(tiny_sd3_pipeline()) == {}


@pytest.mark.parametrize(
    ("build", "multiple"),
    [(tiny_sd_pipeline, 8), (tiny_flux_pipeline, 4), (tiny_sd3_pipeline, 4)],
)
def test_the_multiple_is_one_the_pipeline_takes(build, multiple):
    assert pixel_multiple(build()) == multiple
