"""Official DiT and LiT checkpoints: a DiT of our own in the authors' names is the oracle."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linfusion.layers.record import record_of
from linfusion.lit.authors_checkpoints import load_dit, read_checkpoint, use_official_timesteps
from tests.tiny_dit import tiny_dit

WIDTH, HEADS, SIDE, CLASSES = 24, 4, 4, 5


class Block(nn.Module):
    """adaLN-zero, softmax attention or LiT's, in the authors' names."""

    def __init__(self, lit_heads):
        super().__init__()
        self.lit_heads = lit_heads
        self.attn = nn.Module()
        if lit_heads:
            self.attn.q, self.attn.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
            d = WIDTH // lit_heads
            self.attn.dwc = nn.Conv2d(d, d, 5, padding=2, groups=d)
        else:
            self.attn.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.attn.proj = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def attention(self, x):
        n = x.shape[1]
        heads = self.lit_heads or HEADS
        qkv = (
            torch.cat([self.attn.q(x), self.attn.kv(x)], -1) if self.lit_heads else self.attn.qkv(x)
        )
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        if not self.lit_heads:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            q, k = q.relu() + 1e-6, k.relu() + 1e-6
            z = q @ k.mean(2, keepdim=True).mT + 1e-6
            out = q @ (k.mT @ v / n) / z
            image = v.mT.unflatten(-1, (SIDE, SIDE)).flatten(0, 1)
            out = out + self.attn.dwc(image).flatten(2).mT.unflatten(0, (-1, heads))
        return self.attn.proj(out.transpose(1, 2).flatten(2))

    def forward(self, x, c):
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        y = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift
        x = x + gate * self.attention(y)
        y = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.mlp.fc2(F.gelu(self.mlp.fc1(y), approximate="tanh"))


class DiT(nn.Module):
    """The whole network: patches of 2, sine positions with the width first, learned variance."""

    def __init__(self, lit_heads=0):
        super().__init__()
        torch.manual_seed(0)
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(4, WIDTH, 2, 2)
        self.t_embedder, self.y_embedder = nn.Module(), nn.Module()
        self.t_embedder.mlp = nn.Sequential(
            nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)
        )
        self.y_embedder.embedding_table = nn.Embedding(CLASSES + 1, WIDTH)
        self.blocks = nn.ModuleList([Block(lit_heads) for _ in range(2)])
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(WIDTH, 2 * 2 * 8)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        self.pos_embed = nn.Parameter(positions()[None].float())

    def forward(self, x, t, y):
        x = self.x_embedder.proj(x).flatten(2).mT + self.pos_embed
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1))
        c = c + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        x = self.final_layer.linear(F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift)
        x = x.unflatten(1, (SIDE, SIDE)).unflatten(-1, (2, 2, 8))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 8, 2 * SIDE, 2 * SIDE)


def positions():
    quarter = WIDTH // 4
    omega = 10000 ** -(torch.arange(quarter).double() / quarter)
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")

    def code(at):
        angles = at.flatten()[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], 1)

    return torch.cat([code(column), code(row)], 1)


def inputs():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 2 * SIDE, 2 * SIDE, generator=g)
    return x, torch.tensor([0, 400, 999]), torch.tensor([0, 3, CLASSES])


def ours(model):
    x, t, y = inputs()
    with torch.no_grad():
        return model(x, t, y).sample


def theirs(model):
    with torch.no_grad():
        return model(*inputs())


@pytest.mark.parametrize("lit_heads", [0, 2, 3])
def test_a_converted_checkpoint_computes_what_the_original_does(lit_heads):
    original = DiT(lit_heads)
    model = load_dit(original.state_dict(), num_attention_heads=HEADS)
    assert (record_of(model) is not None) == bool(lit_heads)
    torch.testing.assert_close(ours(model), theirs(original), atol=1e-5, rtol=0)


def test_the_embedding_of_time_is_the_only_difference_to_diffusers():
    original = DiT()
    model = load_dit(original.state_dict(), num_attention_heads=HEADS, official_timesteps=False)
    difference = (ours(model) - theirs(original)).abs().amax((1, 2, 3))
    assert difference[0] < 1e-5 and difference[1:].min() > 1e-3  # t = 0, 400, 999


@pytest.mark.parametrize("t, expected", [(10, 0.9999), (100, 0.992), (500, 0.816), (999, 0.489)])
def test_the_two_embeddings_of_time_part_as_t_grows(t, expected):
    plain, official = tiny_dit(), tiny_dit()
    use_official_timesteps(official)
    a, b = (
        m.transformer_blocks[0].norm1.emb.time_proj(torch.tensor([t])) for m in (plain, official)
    )
    assert torch.cosine_similarity(a, b).item() == pytest.approx(expected, abs=1e-3)


def test_the_averaged_weights_of_a_file_are_preferred(tmp_path):
    averaged, raw = DiT().state_dict(), {n: t + 1 for n, t in DiT().state_dict().items()}
    for file, content in (
        ("both.pt", {"ema": averaged, "model": raw, "args": {}}),
        ("model.pt", {"model": averaged}),
        ("bare.pt", averaged),
    ):
        torch.save(content, tmp_path / file)
        found = read_checkpoint(tmp_path / file)
        assert torch.equal(found["final_layer.linear.bias"], averaged["final_layer.linear.bias"])
    model = load_dit(tmp_path / "both.pt", num_attention_heads=HEADS)
    torch.testing.assert_close(ours(model), theirs(DiT()), atol=1e-5, rtol=0)


class Unsafe:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_file_that_wants_to_run_something_is_refused(tmp_path, capsys):
    torch.save({"ema": Unsafe()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"file: cannot read .*bad.pt as tensors alone"):
        read_checkpoint(tmp_path / "bad.pt")
    assert capsys.readouterr().out == ""


def changed(lit_heads=0, drop=(), **more):
    tensors = DiT(lit_heads).state_dict()
    return {n: t for n, t in tensors.items() if n not in drop} | more


@pytest.mark.parametrize(
    "tensors, options, message",
    [
        (changed(drop=["blocks.1.mlp.fc1.bias"]), {}, "Missing: transformer_blocks.1.ff.net.0"),
        (changed(more=torch.ones(1)), {}, "Unexpected: more"),
        (changed(**{"final_layer.linear.bias": torch.ones(5)}), {}, "Misshapen: proj_out_2.bias"),
        (changed(pos_embed=torch.zeros(1, 16, WIDTH)), {}, "pos_embed .* is not the sine table"),
        (changed(drop=["x_embedder.proj.weight"]), {}, "source: not an official DiT checkpoint"),
        (changed(), {"heads": 2}, "heads: got 2, but the tensors are those of DiT"),
        (changed(), {"num_attention_heads": None}, "num_attention_heads: got None"),
        (changed(2), {"heads": 3}, "heads: got 3, but filters of 12 channels say 2"),
        (changed(1), {}, "heads: got None; with a filter for each of 24 channels"),
        (
            changed(
                2, drop=[f"blocks.{i}.attn.dwc.{n}" for i in (0, 1) for n in ("weight", "bias")]
            ),
            {},
            "heads: got None; without filters",
        ),
    ],
)
def test_what_is_no_such_checkpoint_is_refused_by_name(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        load_dit(tensors, **{"num_attention_heads": HEADS, **options})


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="file: cannot read"):
        read_checkpoint(tmp_path / "nothing.pt")
