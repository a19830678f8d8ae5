"""The zoo's text side: tokenizers learned from the captions, and small CLIP and T5 encoders."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH, T5_LENGTH = 32, 16
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


def build_text_encoder(
    tokenizer: CLIPTokenizer, *, width: int = 128, layers: int = 3
) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        projection_dim=width,
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


def build_t5_tokenizer(captions: Iterable[str], vocab_size: int = 1536) -> T5Tokenizer:
    """A Unigram vocabulary in T5's order: padding, end, unknown, then the pieces by frequency."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    letters = [chr(c) for c in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=letters,
        show_progress=False,
    )
    words = sorted(word for caption in captions for word in caption.split())
    unigram.train_from_iterator(words + EXTRA_WORDS * 50, trainer)
    vocab = [tuple(piece) for piece in json.loads(unigram.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)


def build_t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)
