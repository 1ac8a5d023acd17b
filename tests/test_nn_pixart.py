"""The PixArt-Sigma modules against the published formulas, written out in plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from w2s_fast.nn import KVCompressedAttention, PixArtBlock, PixArtSigma
from w2s_fast.nn.pixart import position_embedding


def shake(module, seed=0):
    """Random parameters everywhere, so that no zero hides a term."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module.double()


def official_attention(module, x, grid):
    """Projection, QK norm, convolution and LayerNorm of k and v, attention."""
    b, n, c = x.shape
    q, k, v = module.qkv(x).reshape(b, n, 3, c).unbind(2)
    if module.q_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    if module.ratio > 1:
        def compress(z):
            g = z.reshape(b, *grid, c).permute(0, 3, 1, 2)
            return module.norm(module.sr(g).flatten(2).transpose(1, 2))
        k, v = compress(k), compress(v)
    q, k, v = (z.reshape(b, z.shape[1], module.num_heads, -1).transpose(1, 2) for z in (q, k, v))
    return module.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


def official_block(block, x, y, t, grid, lengths):
    """Text tokens packed without padding, one sample after the other."""
    def norm(x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (block.scale_shift_table[None] + t).chunk(6, 1)
    x = x + gate_a * official_attention(block.attn, norm(x) * (1 + scale_a) + shift_a, grid)
    cross, heads = block.cross_attn, block.cross_attn.num_heads
    made = []
    for row, text, length in zip(x, y, lengths, strict=True):
        q = cross.q_linear(row).unflatten(1, (heads, -1)).transpose(0, 1)
        k, v = (z.transpose(0, 1) for z in cross.kv_linear(text[:length]).unflatten(1, (2, heads, -1)).unbind(1))
        made.append(cross.proj(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)))
    x = x + torch.stack(made)
    mlp = block.mlp.fc2(F.gelu(block.mlp.fc1(norm(x) * (1 + scale_m) + shift_m), approximate="tanh"))
    return x + gate_m * mlp


@pytest.mark.parametrize("ratio, grid, qk_norm", [(1, (4, 6), False), (2, (4, 6), True), (2, (5, 7), False),
                                                  (4, (8, 4), False)])
def test_attention_is_the_official_one(ratio, grid, qk_norm):
    module = shake(KVCompressedAttention(24, 3, ratio=ratio, qk_norm=qk_norm))
    x = torch.randn(2, grid[0] * grid[1], 24, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    outputs = [module(x, grid), official_attention(module, x, grid)]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    leaves = [x, *module.parameters()]
    ours, theirs = (torch.autograd.grad(o, leaves, upstream) for o in outputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("masked", [False, True])
def test_block_is_the_official_one(masked):
    block = shake(PixArtBlock(16, 2, ratio=2))
    x, y, t = (torch.randn(s, dtype=torch.float64) for s in ((2, 24, 16), (2, 5, 16), (2, 6, 16)))
    lengths = [3, 5] if masked else [5, 5]
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long() if masked else None
    torch.testing.assert_close(block(x, y, t, (4, 6), mask), official_block(block, x, y, t, (4, 6), lengths))


def small(**settings):
    sizes = {"dim": 16, "depth": 3, "num_heads": 2, "caption_features": 5, "caption_tokens": 4}
    return PixArtSigma(8, **{**sizes, **settings})


def test_model_is_the_official_one():
    model = shake(small(compressed=[1, 2])).eval()
    x, t, y = torch.randn(2, 4, 8, 12, dtype=torch.float64), torch.tensor([3, 981]), torch.randn(2, 1, 4, 5).double()
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    tokens = F.conv2d(x, model.x_embedder.proj.weight, model.x_embedder.proj.bias, 2).flatten(2).transpose(1, 2)
    tokens = tokens + position_embedding(16, (4, 6), 4, 8 / 64).double()
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = model.t_embedder.mlp(torch.cat((angle.cos(), angle.sin()), 1).double())
    conditioning = model.t_block(time).reshape(2, 6, 16)
    text = model.y_embedder.y_proj(y[:, 0])
    for block in model.blocks:
        tokens = official_block(block, tokens, text, conditioning, (4, 6), [2, 4])
    shift, scale = (model.final_layer.scale_shift_table[None] + time[:, None]).chunk(2, 1)
    tokens = model.final_layer.linear(F.layer_norm(tokens, (16,), eps=1e-6) * (1 + scale) + shift)
    want = torch.einsum("nhwpqc->nchpwq", tokens.reshape(2, 4, 6, 2, 2, 8)).reshape(2, 8, 8, 12)
    torch.testing.assert_close(model(x, t, y, mask.reshape(2, 1, 1, 4)), want)


def test_parameter_names_are_the_official_ones():
    block = {
        "scale_shift_table", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
        "cross_attn.q_linear.weight", "cross_attn.q_linear.bias", "cross_attn.kv_linear.weight",
        "cross_attn.kv_linear.bias", "cross_attn.proj.weight", "cross_attn.proj.bias", "mlp.fc1.weight", "mlp.fc1.bias",
        "mlp.fc2.weight", "mlp.fc2.bias",
    }  # fmt: skip
    compression = {"attn.sr.weight", "attn.sr.bias", "attn.norm.weight", "attn.norm.bias"}
    rest = {
        "x_embedder.proj.weight", "x_embedder.proj.bias", "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias",
        "t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias", "t_block.1.weight", "t_block.1.bias",
        "y_embedder.y_embedding", "y_embedder.y_proj.fc1.weight", "y_embedder.y_proj.fc1.bias",
        "y_embedder.y_proj.fc2.weight", "y_embedder.y_proj.fc2.bias", "final_layer.linear.weight",
        "final_layer.linear.bias", "final_layer.scale_shift_table",
    }  # fmt: skip
    want = rest | {f"blocks.{i}.{name}" for i in range(3) for name in block | (compression if i == 2 else set())}
    assert set(small(compressed=[2]).state_dict()) == want
    qk = set(KVCompressedAttention(8, 2, qk_norm=True).state_dict())
    assert qk - {n[5:] for n in block} == {"q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"}


def test_uncompressed_checkpoint_loads_into_a_compressed_model():
    plain, model = shake(small()).float(), small(compressed=[1, 2])
    checkpoint = {**plain.state_dict(), "pos_embed": torch.zeros(1, 16, 16)}
    missing, unexpected = model.load_state_dict(checkpoint, strict=False)
    assert sorted(missing) == sorted(f"blocks.{i}.attn.{n}" for i in (1, 2)
                                     for n in ("sr.weight", "sr.bias", "norm.weight", "norm.bias"))
    assert not unexpected
    assert (model.blocks[1].attn.sr.weight == 0.25).all() and (model.blocks[1].attn.sr.bias == 0).all()
    small().load_state_dict(checkpoint)


def test_compression_switches_on_and_off():
    model = shake(small()).eval()
    x, t, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([3, 981]), torch.randn(2, 4, 5).double()
    before = model(x, t, y)
    assert model.enable_kv_compression(ratio=1) == [] and torch.equal(model(x, t, y), before)
    made = model.enable_kv_compression([1, 2], ratio=2)
    assert sum(p.numel() for p in made) == 2 * 7 * 16 and all(p.dtype == torch.float64 for p in made)
    after = model(x, t, y)
    assert not torch.allclose(after, before)
    grads = torch.autograd.grad(after.square().sum(), made)
    assert all(g.abs().sum() > 0 for g in grads)
    model.enable_kv_compression([1, 2], ratio=1)
    torch.testing.assert_close(model(x, t, y), before)


def test_parameters_of_fourteen_compressed_blocks():
    with torch.device("meta"):
        model = PixArtSigma()
        made = model.enable_kv_compression(range(14, 28), 2)
    assert sum(p.numel() for p in made) == 112_896
    assert 0.6e9 < sum(p.numel() for p in model.parameters()) < 0.62e9


def test_position_embedding_golden():
    made = position_embedding(1152, (64, 64), 64, 2)[3 * 64 + 5].double()
    want = {0: 0.598472144, 288: -0.801143616, 576: 0.997494987, 864: 0.070737202, 1: 0.659594112}
    assert all(made[i].item() == pytest.approx(v, abs=1e-7) for i, v in want.items())
    assert made.sum().item() == pytest.approx(618.659980, abs=1e-4)
    wide = position_embedding(1152, (32, 96), 32, 1)[3 * 96 + 5]
    assert wide[0].item() == pytest.approx(0.995407962, abs=1e-7)
    assert wide[576].item() == pytest.approx(0.141120008, abs=1e-7)


def test_empty_captions_in_training():
    model = shake(small(caption_dropout=1.0)).train()
    x, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([3, 981])
    first, second = (model(x, t, torch.randn(2, 4, 5).double()) for _ in range(2))
    torch.testing.assert_close(first, second)
    assert not torch.allclose(model.eval()(x, t, torch.randn(2, 4, 5).double()), first)


@pytest.mark.parametrize("height, width", [(8, 8), (2, 2), (6, 10), (10, 14), (4, 26)])
def test_sizes_are_the_official_ones(height, width):
    """Non-square, odd grids, and grids that windows of 2 x 2 do not cover."""
    model = shake(small(compressed=[1], mode="conv", ratio=2) if min(height, width) > 2 else small()).eval()
    x, t, y = torch.randn(2, 4, height, width).double(), torch.tensor([3, 981]), torch.randn(2, 4, 5).double()
    made = model(x, t, y)
    assert made.shape == (2, 8, height, width) and made.isfinite().all()
    grid = (height // 2, width // 2)
    block, tokens = model.blocks[1], torch.randn(2, grid[0] * grid[1], 16, dtype=torch.float64)
    text, conditioning = torch.randn(2, 3, 16).double(), torch.randn(2, 6, 16).double()
    want = official_block(block, tokens, text, conditioning, grid, [3, 3])
    torch.testing.assert_close(block(tokens, text, conditioning, grid), want)


def test_one_timestep_for_all():
    model = shake(small()).eval()
    x, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 4, 5).double()
    want = model(x, torch.tensor([7, 7]), y)
    for one in (torch.tensor(7), torch.tensor([7])):
        torch.testing.assert_close(model(x, one, y), want)


BAD = [
    (lambda m: m(torch.zeros(1, 4, 9, 11), T, Y), r"x must be of shape \(B, 4, H, W\), H and W multiples of the"),
    (lambda m: m(torch.zeros(1, 4, 8, 7), T, Y), r"H and W multiples of the patch 2, got \(1, 4, 8, 7\)"),
    (lambda m: m(torch.zeros(1, 4, 0, 8), T, Y), "x must be of shape"),
    (lambda m: m(torch.zeros(1, 3, 8, 8), T, Y), "x must be of shape"),
    (lambda m: m(torch.zeros(4, 8, 8), T, Y), "x must be of shape"),
    (lambda m: m(X, torch.tensor([7, 7]), Y), r"timestep must be of shape \(1,\), \(1,\) or \(\), got \(2,\)"),
    (lambda m: m(X, T, torch.zeros(2, 3, 5)), r"y must be of shape \(1, L, 5\), L >= 1, got \(2, 3, 5\)"),
    (lambda m: m(X, T, torch.zeros(1, 0, 5)), "y must be of shape"),
    (lambda m: m(X, T, torch.zeros(1, 3, 6)), "y must be of shape"),
    (lambda m: m(X, T, Y, torch.ones(1, 4)), r"mask must be of shape \(1, 3\), got \(1, 4\)"),
    (lambda m: m.train()(X, T, torch.zeros(1, 7, 5)), "y must be of at most caption_tokens = 4 tokens in training"),
    (lambda m: small(depth=0), "depth must be >= 1, got 0"),
    (lambda m: small(patch=0), "patch must be >= 1, got 0"),
    (lambda m: small(patch=3), "latent_size must be a multiple of the patch 3, got 8"),
    (lambda m: small(in_channels=0), "in_channels must be >= 1"),
    (lambda m: small(interpolation=0.0), "interpolation must be a finite number > 0"),
    (lambda m: PixArtSigma(8, dim=18, depth=1, num_heads=2), "dim must be a multiple of 4, got 18"),
    (lambda m: PixArtSigma(8, dim=16, depth=1, num_heads=0), "num_heads must be >= 1, got 0"),
    (lambda m: PixArtSigma(8, dim=16, depth=1, num_heads=3), "num_heads must be a divisor of dim 16, got 3"),
    (lambda m: m.set_resolution(9), "latent_size must be a multiple of the patch 2, got 9"),
    (lambda m: KVCompressedAttention(12, 0), "num_heads must be >= 1, got 0"),
    (lambda m: KVCompressedAttention(0, 1), "dim must be >= 1, got 0"),
]
X, T, Y = torch.zeros(1, 4, 8, 8), torch.tensor([7]), torch.zeros(1, 3, 5)


@pytest.mark.parametrize("call, message", BAD, ids=range(len(BAD)))
def test_sizes_that_fit_nothing(call, message):
    with pytest.raises(ValueError, match=message):
        call(small().eval())


def test_an_adapter_on_the_taps_is_refused():
    module = KVCompressedAttention(8, 2, ratio=2)
    module.sr = torch.nn.Sequential(module.sr)
    with pytest.raises(ValueError, match="without an adapter, got Sequential"):
        module(torch.zeros(1, 16, 8), (4, 4))


def test_errors():
    with pytest.raises(ValueError, match="num_heads must be a divisor of dim 10, got 4"):
        KVCompressedAttention(10, 4)
    with pytest.raises(ValueError, match="ratio must be >= 1"):
        KVCompressedAttention(8, 2, ratio=0)
    with pytest.raises(ValueError, match="mode must be one of"):
        KVCompressedAttention(8, 2, ratio=2, mode="ave")
    with pytest.raises(ValueError, match=r"layers must be in \[0, 2\], got 14"):
        small().enable_kv_compression(range(14, 28))
    with pytest.raises(ValueError, match="H W"):
        KVCompressedAttention(8, 2, ratio=2)(torch.zeros(1, 24, 8), (5, 5))


def small_model(seed=0):
    torch.manual_seed(seed)
    return shake(PixArtSigma(8, dim=16, depth=2, num_heads=2, caption_features=5, compressed=[1], qk_norm=True))


def inputs():
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(2, 4, 8, 8), torch.tensor([3, 700]), draw(2, 3, 5)


def test_hooks_that_make_a_weight_run():
    """Pruning and the older weight norm compute a weight before each call of its module."""
    x, grid = torch.randn(2, 24, 16, dtype=torch.float64), (4, 6)
    for change in ("pruned", "normed"):
        module = shake(KVCompressedAttention(16, 2, ratio=2, qk_norm=True))
        for part in (module.sr, module.norm, module.q_norm):
            if change == "pruned":
                torch.nn.utils.prune.l1_unstructured(part, "weight", 0.3)
                part.weight_orig.data.mul_(1.5)
            elif part is module.sr:
                torch.nn.utils.weight_norm(part)
                part.weight_g.data.mul_(1.5)
        found, wanted = module(x, grid), official_attention(module, x, grid)
        torch.testing.assert_close(found, wanted)
        for loss in (found.square().sum(), wanted.square().sum()):
            module.zero_grad()
            loss.backward(retain_graph=True)
            grads = [p.grad.clone() for p in module.parameters()]
            if loss is not wanted:
                first = grads
        torch.testing.assert_close(first, grads)


def test_blocks_are_called_where_somebody_waits_for_it():
    plain, given = small_model(), inputs()
    wanted = plain(*given)
    wanted.square().sum().backward()
    seen = []
    hooked = small_model()
    hooked.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    hooked.final_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    wrapped = small_model()
    for i, block in enumerate(wrapped.blocks):
        wrapped.blocks[i] = checkpoint_wrapper(block)
    for model in (hooked, wrapped):
        found = model(*given)
        torch.testing.assert_close(found, wanted)
        found.square().sum().backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert seen == [(2, 16, 16)] * 2


def test_sharded_block_by_block(mesh):
    """FSDP2 gathers a unit's parameters when it is called."""
    from torch.distributed.fsdp import fully_shard

    plain, sharded, given = small_model(), small_model(), inputs()
    for unit in (*sharded.blocks, sharded.final_layer, sharded):
        fully_shard(unit, mesh=mesh)
    wanted, found = plain(*given), sharded(*given)
    torch.testing.assert_close(found, wanted)
    wanted.square().sum().backward()
    found.square().sum().backward()
    for a, b in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad)
