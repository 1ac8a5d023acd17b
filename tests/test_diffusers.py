"""Key-value compression in diffusers' PixArt transformer, on a small model with random weights."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

from diffusers import PixArtTransformer2DModel

from w2s_fast.integrations.diffusers import KVCompressedPixArtTransformer2DModel, enable_kv_compression


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, cross_attention_dim=16, sample_size=8,
        caption_channels=6,
    )  # fmt: skip
    return made.double().eval()


def call(model, height=8, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, text = (torch.randn(s, generator=generator).double() for s in ((2, 4, height, width), (2, 5, 6)))
    dtype = next(model.parameters()).dtype
    return model(x.to(dtype), encoder_hidden_states=text.to(dtype), timestep=torch.tensor([3, 981])).sample


def test_ratio_one_is_the_original(model):
    before = call(model)
    assert enable_kv_compression(model, range(3), ratio=1) == []
    torch.testing.assert_close(call(model), before, rtol=1e-11, atol=1e-11)


def test_ratio_two_is_the_formula(model):
    """Against attention with keys and values averaged over windows and normalised, by a processor of the test's own."""

    class Plain:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
            q, k, v = (f(hidden_states) for f in (attn.to_q, attn.to_k, attn.to_v))
            k, v = (F.layer_norm(z.reshape(2, 2, 2, 3, 2, 16).mean((2, 4)).flatten(1, 2), (16,)) for z in (k, v))
            q, k, v = (z.unflatten(2, (2, 8)).transpose(1, 2) for z in (q, k, v))
            return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    plain = copy.deepcopy(model)
    for block in plain.transformer_blocks[1:]:
        block.attn1.set_processor(Plain())
    enable_kv_compression(model, [1, 2])
    torch.testing.assert_close(call(model), call(plain), rtol=1e-9, atol=1e-9)


def test_ratio_two_trains_and_copies_follow_their_own_grid(model):
    new = enable_kv_compression(model, [1, 2])
    assert sum(p.numel() for p in new) == 2 * (4 + 1 + 2) * 16
    optimizer = torch.optim.Adam(new, lr=0.01)
    target, losses = torch.randn(2, 8, 8, 12, dtype=torch.float64), []
    for _ in range(8):
        loss = (call(model) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in new)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    twin = copy.deepcopy(model)
    call(model, 4, 4)
    torch.testing.assert_close(call(twin), call(model))


def test_gradient_checkpointing(model):
    new = enable_kv_compression(model, [2])
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        gradients.append(torch.autograd.grad(call(model).square().sum(), new))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_save_and_load(model, tmp_path):
    enable_kv_compression(model, [1], ratio=2)
    enable_kv_compression(model, [2], ratio=2, mode="mean")
    with torch.no_grad():
        model.transformer_blocks[1].attn1.processor.sr.weight.add_(torch.randn(16, 1, 2, 2))
    before = call(model)
    model.save_pretrained(tmp_path)
    loaded = KVCompressedPixArtTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float64).eval()
    assert loaded.config.kv_compression == {"1": [2, "conv"], "2": [2, "mean"]}
    torch.testing.assert_close(call(loaded), before, rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    again = KVCompressedPixArtTransformer2DModel.from_pretrained(tmp_path / "again", torch_dtype=torch.float64).eval()
    torch.testing.assert_close(call(again), before, rtol=0, atol=0)


@torch.no_grad()
def test_sixteen_bits(model):
    want = call(model)
    enable_kv_compression(model, range(3), ratio=1)
    model.to(torch.bfloat16)
    found = call(model)
    assert found.dtype == torch.bfloat16
    assert (found.double() - want).abs().max() < 0.1 * want.abs().max()


def test_errors(model):
    with pytest.raises(ValueError, match=r"enable_kv_compression: layers must be in \[0, 2\], got 14"):
        enable_kv_compression(model)
    with pytest.raises(TypeError, match="transformer must be a PixArtTransformer2DModel, got Linear"):
        enable_kv_compression(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="ratio must be >= 1, got 0"):
        enable_kv_compression(model, [1], ratio=0)
    with pytest.raises(ValueError, match="mode must be one of"):
        enable_kv_compression(model, [1], mode="ave")
    assert "kv_compression" not in model.config
    enable_kv_compression(model, [1])
    with pytest.raises(RuntimeError, match="forward must run"):
        model.transformer_blocks[1].attn1(torch.zeros(1, 4, 16, dtype=torch.float64))
