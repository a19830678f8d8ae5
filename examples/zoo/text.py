"""The zoo's text side: a CLIP tokenizer learned from the captions, and a small CLIP encoder."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 32
ARTICLES = ("a", "an", "the", "one", "some")
# Words a prompt may well hold and the captions do not, so that they cost one token, not six.
EXTRA_WORDS = ["a", "an", "the", "of", "on", "in", "emoji", "picture", "icon", "drawing", "cute"]


def build_tokenizer(captions: Iterable[str], vocab_size: int = 2048) -> CLIPTokenizer:
    """A byte-level BPE with CLIP's end-of-word mark; every frequent caption word is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2 - len(alphabet),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words = sorted(word for caption in captions for word in caption.split())
    bpe.train_from_iterator(words + EXTRA_WORDS * 50, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet)]
    known = set(tokens)
    for pair in merges:
        if (merged := "".join(pair)) not in known:
            known.add(merged)
            tokens.append(merged)
    tokens += [START, END]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=LENGTH,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def vary(captions: tuple[str, ...], rng: random.Random, drop: float = 0.1) -> str:
    """A caption as a user might write it; empty with probability `drop`, to train guidance."""
    if rng.random() < drop:
        return ""
    caption = captions[0] if rng.random() < 0.7 else rng.choice(captions)
    if rng.random() < 0.4:
        caption = f"{rng.choice(ARTICLES)} {caption}"
    return caption
