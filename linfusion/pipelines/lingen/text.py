"""Texts as the transformer takes them: embeddings and masks, of one encoder or of two."""

from __future__ import annotations

from typing import Any

from diffusers.utils import logging
from diffusers.utils.torch_utils import get_module_execution_device

logger = logging.get_logger(__name__)

Text = Any  # a tensor, or a list of one for each encoder


def encode_texts(pipe: Any, texts: list[str], device: Any, length: int) -> tuple[Text, Text]:
    """Embeddings and masks of texts by every encoder; a warning where one is cut off."""
    found = []
    pairs = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
    for tokenizer, encoder in pairs[: len(pipe.transformer.config.text_dims)]:
        known = getattr(encoder.config, "max_position_embeddings", length)
        most = min(length, tokenizer.model_max_length, known)
        tokens = tokenizer(
            texts, padding="max_length", max_length=most, truncation=True, return_tensors="pt"
        )
        full = tokenizer(texts, padding=False, verbose=False).input_ids
        for text, ids in zip(texts, full, strict=True):
            if len(ids) > most:
                logger.warning(f"prompt: {len(ids)} tokens, of which {most} are read: {text!r}")
        there = get_module_execution_device(encoder)  # not where it is, if it is offloaded
        mask = tokens.attention_mask.to(there)
        out = encoder(tokens.input_ids.to(there), attention_mask=mask)
        found.append((out.last_hidden_state.to(device), mask.to(device)))
    embeds, masks = ([each[i] for each in found] for i in (0, 1))
    return (embeds, masks) if len(found) > 1 else (embeds[0], masks[0])


def repeated(embeds: Text, masks: Text, times: int, device: Any) -> tuple[Text, Text]:
    """Each text several times, one after the other, on a device."""

    def repeat(t: Any) -> Any:
        if isinstance(t, list | tuple):
            return [repeat(part) for part in t]
        return None if t is None else t.to(device).repeat_interleave(times, 0)

    return repeat(embeds), repeat(masks)


def prompts_in_time(embeds: Text, masks: Text, prompts: int) -> list[tuple[Text, Text]]:
    """(embeddings, mask) of each prompt over time, a batch of one; of one prompt, the whole."""
    if prompts == 1:
        return [(embeds, masks)]

    def row(t: Any, i: int) -> Any:
        return [row(part, i) for part in t] if isinstance(t, list) else t[i : i + 1]

    return [(row(embeds, i), row(masks, i)) for i in range(prompts)]
