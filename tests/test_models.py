"""models.py: sizes, parity with Hugging Face and timm, foreign weights, heads, patchout, our own checkpoints, downloads."""

import argparse
import http.server
import pathlib
import socket
import threading

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from conftest import AST, CNN, HYBRID, ROOT, TIMM_CNN
from safetensors.torch import save_file
from timm.layers import resample_patch_embed
from torch import nn

import dataset
import models

WEIGHTS = ROOT.parent / "shared" / "weights"
LITE0 = WEIGHTS / "tf_efficientnet_lite0-imagenet.pth"
DINO, AS_DEIT = WEIGHTS / "vit_small_patch14_dinov2.pth", WEIGHTS / "vit_small_dinov2-as-deit.pth"
TOY_VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2}  # as the toy AST's
CPU = torch.device("cpu")
torch.set_num_threads(1)  # tiny tensors: threads only wait for each other where other work keeps the cores busy
pytestmark = pytest.mark.usefixtures("toy")


def spectrograms(B=2, T=100, seed=0):
    return torch.randn(B, T, 128, generator=torch.Generator().manual_seed(seed))


def randomised(model, seed=0):
    """The model with every parameter and statistic random, so that no two of them could be swapped unseen; in eval mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            # norms and biases; tokens and positions; else a gain at which the input is still seen in a CNN's output
            scale = {1: 0.1, 3: 0.5}.get(p.ndim) or (1.4 if p.ndim == 4 else 1.0) / p[0].numel() ** 0.5
            p.copy_(torch.randn(p.shape, generator=g) * scale + (p.ndim == 1))
        for name, b in model.named_buffers():
            if "running" in name:
                b.copy_(torch.rand(b.shape, generator=g) + 0.5)
        for pool in model.modules():
            if isinstance(pool, models.AttentionPool):
                pool.weight.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    return model.eval()


@torch.no_grad()
def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)
    spread = [a.std(), (a[0] - a[-1]).abs().max()] if len(a) > 1 else [a.std()]  # over everything, between clips
    assert min(spread) > 20 * atol, "all but constant: this comparison shows nothing"


# -------------------------------------------------------------------------------------------------------- Table 1, names


def test_sizes_and_patches():
    millions = {"ast-tiny": 5.7, "ast-small": 21.9, "ast-base": 86.3}
    whole = {"efficientnet-b0": 4, "efficientnet-b2": 8, "efficientnet-b6": 41, "densenet-121": 7}
    with torch.device("meta"):  # shapes without numbers: nothing is computed
        for name in (*millions, *whole):
            model = models.build_model(name, n_classes=200, n_frames=1000)
            size = sum(p.numel() for p in model.parameters()) / 1e6
            assert round(size, 1) == millions.get(name, round(size, 1)), name
            assert round(size) == whole.get(name, round(size)), name
        for n_frames, patches in ((1000, 1188), (500, 588)):
            ast = models.build_model(AST, 200, n_frames=n_frames)
            assert ast.grid[0] * ast.grid[1] == patches and ast.v.pos_embed.shape == (1, 2 + patches, 64)
            assert ast.v.patch_embed.proj(torch.zeros(1, 1, 128, n_frames)).shape[2:] == ast.grid


def test_imagenet_tags_are_fixed_and_exist():
    tags = {name: tag for name, (_, tag) in models.MODELS.items() if name not in (AST, HYBRID)}
    assert tags == {
        "ast-tiny": "deit_tiny_distilled_patch16_224.fb_in1k",
        "ast-small": "deit_small_distilled_patch16_224.fb_in1k",
        "ast-base": "deit_base_distilled_patch16_384.fb_in1k",
        "efficientnet-b0": "efficientnet_b0.ra_in1k",
        "efficientnet-b2": "efficientnet_b2.ra_in1k",
        "efficientnet-b6": "tf_efficientnet_b6.aa_in1k",
        "densenet-121": "densenet121.tv_in1k",
        "hybrid-b0": "efficientnet_b0.ra_in1k",
        "hybrid-b2": "efficientnet_b2.ra_in1k",
    }
    assert set(tags.values()) <= set(timm.list_pretrained())


def test_unknown_and_unfit_models_are_errors():
    unfit = "timm:resnet10t.no_tag", "timm:test_vit", "timm:efficientvim_m1"
    for name in ("resnet", "ast-huge", "", "timm:", "timm:nothing", *unfit):
        with pytest.raises(ValueError, match=f"'{name}'") as error:
            models.build_model(name, 5, n_frames=100)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="built for 60 frames.* 70"):
        models.build_model(AST, 5, n_frames=60)(spectrograms(1, 70))


# ---------------------------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """(a random ASTForAudioClassification of the toy AST's shape, 100 frames, 7 classes; the folder it was saved to).

    Its embeddings are so small that the first LayerNorm shows which eps it adds to their variance."""
    import transformers

    config = transformers.ASTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, max_length=100, num_labels=7
    )
    model = randomised(transformers.ASTForAudioClassification(config))
    with torch.no_grad():
        for p in model.audio_spectrogram_transformer.embeddings.parameters():
            p *= 1e-3
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "state.pth")
    return model, folder


@pytest.mark.parametrize("file", [".", "state.pth"])
def test_logits_equal_hugging_face(hugging_face, file):
    theirs, folder = hugging_face
    ours = models.build_model(AST, 7, n_frames=100, pretrained=folder / file).eval()
    x = spectrograms()
    close(ours(x), theirs(x).logits)


def test_hugging_face_weights_of_another_length_and_class_count(hugging_face, capsys):
    theirs, folder = hugging_face
    ours = models.build_model(AST, 5, n_frames=60, pretrained=folder)
    assert "positions 12x9 -> 12x5" in (said := capsys.readouterr().out) and "mlp_head is for other classes" in said
    pos = theirs.state_dict()["audio_spectrogram_transformer.embeddings.position_embeddings"]
    assert torch.equal(ours.v.pos_embed, models.resize_positions(pos, (12, 9), (12, 5)))


def test_incomplete_hugging_face_weights_are_an_error(hugging_face, tmp_path):
    state = hugging_face[0].state_dict()
    token = [k for k in state if k.endswith("cls_token")]
    keys = [k for k in state if "layers.1.attention" in k and "k_proj" in k]  # weight and bias of one block
    for lost, named in ((token, r"missing 1: v\.cls_token"), (keys, r"v\.blocks\.1\.attn\.qkv")):
        assert lost
        torch.save({k: v for k, v in state.items() if k not in lost}, tmp_path / "some.pth")
        with pytest.raises(ValueError, match=named):
            models.build_model(AST, 7, n_frames=100, pretrained=tmp_path / "some.pth")


# --------------------------------------------------------------------------------------------------- the original release


@pytest.fixture(scope="module")
def ast():
    return randomised(models.build_model(AST, 7, n_frames=100))


def released(ast):
    """The state dict as the original AST release writes it: through DataParallel, with DeiT's own two heads."""
    junk = {f"module.v.{head}.{k}": torch.zeros(1000) for head in ("head", "head_dist") for k in ("weight", "bias")}
    return {f"module.{k}": v for k, v in ast.state_dict().items()} | junk


def test_original_release(ast, tmp_path, capsys):
    torch.save(released(ast), tmp_path / "ast.pth")
    ours = models.build_model(AST, 7, n_frames=100, pretrained=tmp_path / "ast.pth").eval()
    x = spectrograms()
    assert torch.equal(ours(x), ast(x)) and "other classes" not in capsys.readouterr().out


def test_original_release_with_other_classes_and_length(ast, tmp_path, capsys):
    torch.save(released(ast), tmp_path / "ast.pth")
    torch.manual_seed(1)
    fresh = models.build_model(AST, 9, n_frames=160)
    torch.manual_seed(1)
    ours = models.build_model(AST, 9, n_frames=160, pretrained=tmp_path / "ast.pth")
    assert (
        "mlp_head is for other classes or of another kind: ours starts at its initialisation" in capsys.readouterr().out
    )
    assert all(torch.equal(ours.mlp_head.state_dict()[k], v) for k, v in fresh.mlp_head.state_dict().items())
    assert torch.equal(ours.v.pos_embed, models.resize_positions(ast.v.pos_embed, (12, 9), (12, 15)))
    blocks = ast.v.blocks.state_dict()
    assert all(torch.equal(v, blocks[k]) for k, v in ours.v.blocks.state_dict().items())


@pytest.mark.parametrize("name", [AST, CNN])
def test_keys_that_do_not_fit_are_listed(name, tmp_path):
    model = models.build_model(name, 7, n_frames=100)
    state = model.state_dict()
    first, second, *_ = [k for k in state if k.endswith("weight") and state[k].ndim == 4 or ".norm1.weight" in k]
    for broken, says in (
        (state | {f"{first}.more": torch.zeros(2)}, rf"does not fit {name}: unexpected 1: {first}.more"),
        ({k: v for k, v in state.items() if k not in (first, second)}, rf"missing 2: {first}, {second}"),
        (state | {second: torch.zeros(3, 5)}, rf"another shape 1: {second}"),
    ):
        before = {k: v.clone() for k, v in state.items()}
        torch.save(broken, tmp_path / "broken.pth")
        with pytest.raises(ValueError, match=says):
            models.load_pretrained(model, tmp_path / "broken.pth")
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # left as it was


# ------------------------------------------------------------------------------------------------------------------ timm


@pytest.mark.parametrize("tag", ["test_efficientnet", "resnet10t"])
def test_timm_weights_give_timm_logits_on_a_grey_image(tag, tmp_path, capsys):
    theirs = randomised(timm.create_model(tag, num_classes=11))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    x = spectrograms(2, 64)
    grey = x.transpose(1, 2)[:, None].expand(-1, 3, -1, -1)  # (B, 3, F, T): the spectrogram on all three channels
    ours = models.build_model(f"timm:{tag}", 11, n_frames=64, pretrained=tmp_path / "w.pth").eval()
    close(ours(x), theirs(grey), atol=1e-4)
    assert "other classes" not in capsys.readouterr().out
    other = models.build_model(f"timm:{tag}", 3, n_frames=64, pretrained=tmp_path / "w.pth").eval()
    assert "head is for other classes" in capsys.readouterr().out
    assert torch.equal(other.features(x), ours.features(x)) and other(x).shape == (2, 3)


@pytest.mark.skipif(not LITE0.exists(), reason=f"no weights at {LITE0}")
def test_real_imagenet_weights():
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    theirs.load_state_dict(torch.load(LITE0, weights_only=True))
    ours = models.build_model("timm:tf_efficientnet_lite0", 1000, n_frames=100, pretrained=LITE0).eval()
    x = spectrograms()
    grey = x.transpose(1, 2)[:, None].expand(-1, 3, -1, -1)
    close(ours(x), theirs(grey), atol=1e-4)
    close(ours.features(x), theirs.forward_features(grey).mean((2, 3)), atol=1e-4)
    with pytest.raises(ValueError, match=f"does not fit {AST}: missing"):
        models.build_model(AST, 5, n_frames=100, pretrained=LITE0)


def test_hybrid_starts_from_the_weights_of_its_cnn(tmp_path, capsys):
    theirs = randomised(timm.create_model("efficientnet_b0", num_classes=3))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = models.build_model("hybrid-b0", 3, n_frames=64, pretrained=tmp_path / "w.pth").eval()
    x = spectrograms(1, 64)
    assert "its head is for other classes or of another kind" in capsys.readouterr().out
    close(ours.feature_map(x), theirs.forward_features(x.transpose(1, 2)[:, None].expand(-1, 3, -1, -1)), atol=1e-4)


def vit(**options):
    """A random timm ViT of the toy AST's width and depth."""
    return randomised(timm.models.VisionTransformer(num_classes=10, **TOY_VIT, **options))


def distilled():
    theirs = randomised(timm.create_model("deit_toy_distilled"))
    assert theirs.state_dict()["head_dist.weight"].shape == (1000, 64)
    return theirs


VITS = {  # the ViT, the side of its grid for 16x16 patches, and what the printed line says
    "DeiT, distilled": (distilled, 14, "positions 14x14 -> 12x29; no mlp_head"),
    "DeiT": (vit, 14, "its class token serves both; positions 14x14 -> 12x29; no mlp_head"),
    "DeiT of 384 pixels": (lambda: vit(img_size=384), 24, "its class token serves both; positions 24x24 -> 12x29; no mlp_head"),
    "position-free token": (lambda: vit(no_embed_class=True), 14, "its class token serves both; positions 14x14 -> 12x29; no"),
    "DINOv2": (
        lambda: vit(patch_size=14, img_size=14 * 18, init_values=0.1), 18,
        "its class token serves both; patches 14x14 -> 16x16, positions 18x18 -> 14x14; LayerScale folded; positions 14x14 -> 12x29",
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", VITS)
def test_an_ast_starts_from_a_vit(kind, tmp_path, capsys):
    make, side, line = VITS[kind]
    theirs = make()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = models.build_model(AST, 10, n_frames=300, pretrained=tmp_path / "vit.pth").eval()
    assert f"vit.pth; {line}" in capsys.readouterr().out
    pos, weight = theirs.pos_embed, theirs.patch_embed.proj.weight
    n = pos.shape[1] - side**2  # class tokens with a position
    grid = pos[:, n:].reshape(1, side, side, 64).permute(0, 3, 1, 2)
    if weight.shape[-1] != 16:  # as timm does it
        weight = resample_patch_embed(weight, [16, 16])
        grid, side = nn.functional.interpolate(grid, (14, 14), mode="bicubic", antialias=True), 14
    grid = grid[:, :, side // 2 - 6 : side // 2 + 6]  # 12 rows, from the centre
    grid = nn.functional.interpolate(grid, (12, 29), mode="bilinear").flatten(2).mT
    x = spectrograms(2, 300)
    image = x.mT[:, None].expand(-1, 3, -1, -1)
    patches = nn.functional.conv2d(image, weight, theirs.patch_embed.proj.bias, stride=10).flatten(2).mT
    tokens = [theirs.cls_token, getattr(theirs, "dist_token", theirs.cls_token)]
    tokens = [t + (pos[:, min(i, n - 1) : min(i, n - 1) + 1] if n else 0) for i, t in enumerate(tokens)]
    tokens = torch.cat([torch.cat(tokens, 1).expand(2, -1, -1), patches + grid], 1)
    out = theirs.norm(theirs.blocks(tokens))  # with LayerScale as it was
    close(ours.features(x), (out[:, 0] + out[:, 1]) / 2, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "without a class token"),
        ({"pos_embed": "none"}, "without a class token or learned positions"),
        ({"img_size": (176, 224)}, "155 positions are not a square"),
        ({"reg_tokens": 4, "no_embed_class": True}, r"does not fit ast-toy: unexpected 1: v\.reg_token"),
        ({"qk_norm": True}, "does not fit ast-toy: unexpected 8"),
    ],
)
def test_a_vit_that_an_ast_cannot_start_from_is_named(options, error, tmp_path):
    torch.save(vit(**options).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=f"vit.pth.*{error}") as caught:
        models.build_model(AST, 10, n_frames=100, pretrained=tmp_path / "vit.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not (DINO.exists() and AS_DEIT.exists()), reason=f"no weights at {WEIGHTS}")
def test_dinov2_gives_what_its_conversion_by_hand_gives(capsys):
    model, x, found = models.build_model("ast-small", 5, n_frames=100).eval(), spectrograms(), []
    for path in (DINO, AS_DEIT):
        models.load_pretrained(model, path)
        with torch.no_grad():
            found.append(model.features(x))
    assert "LayerScale folded" in capsys.readouterr().out
    ours, by_hand = found  # stored in float16, before the folding and after
    assert (ours - by_hand).norm() < 2e-3 * by_hand.norm()
    assert (ours - by_hand).abs().max() < 0.05 * (by_hand[0] - by_hand[1]).abs().max()


def test_resize_positions():
    pos = torch.randn(1, 2 + 12 * 9, 4)
    grid = pos[:, 2:].reshape(12, 9, 4)
    assert torch.equal(models.resize_positions(pos, (12, 9), (12, 9)), pos)
    cut = models.resize_positions(pos, (12, 9), (12, 4))  # the AST release: from 9 // 2 - 4 // 2
    assert torch.equal(cut[:, :2], pos[:, :2]) and torch.equal(cut[0, 2:].reshape(12, 4, 4), grid[:, 2:6])
    assert torch.equal(models.resize_positions(pos, (12, 9), (7, 9))[0, 2:].reshape(7, 9, 4), grid[3:10])
    longer = nn.functional.interpolate(grid.permute(2, 0, 1)[None], (12, 20), mode="bilinear")[0].permute(1, 2, 0)
    close(models.resize_positions(pos, (12, 9), (12, 20))[0, 2:].reshape(12, 20, 4), longer, atol=1e-6)
    both = nn.functional.interpolate(grid[3:10].permute(2, 0, 1)[None], (7, 20), mode="bilinear")[0].permute(1, 2, 0)
    close(models.resize_positions(pos, (12, 9), (7, 20))[0, 2:].reshape(7, 20, 4), both, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("name", [AST, CNN, HYBRID])
def test_heads_and_gradients(name):
    x = spectrograms(2, 64)
    for kd_head in (False, True):
        model = randomised(models.build_model(name, 3, n_frames=64, kd_head=kd_head))
        logits, kd_logits = model(x, both=True)
        assert model(x).shape == logits.shape == (2, 3) and model.features(x).ndim == 2
        if kd_head:
            close(model(x), (logits + kd_logits) / 2, atol=1e-6)
            assert (logits - kd_logits).abs().min() > 1e-5
        else:
            assert kd_logits is logits and torch.equal(model(x), logits)
        logits, kd_logits = model.train()(x, both=True)  # DDP needs a gradient for every parameter
        (logits.square().sum() + kd_logits.square().sum()).backward()
        without = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not without, without


@torch.no_grad()
def test_ast_heads_read_one_token_each():
    model = randomised(models.build_model(AST, 3, n_frames=64, kd_head=True))
    x = spectrograms(2, 64)
    cls, dist = model.tokens(x)
    logits, kd_logits = model(x, both=True)
    close(logits, model.mlp_head(cls), atol=1e-6)
    close(kd_logits, model.kd_head(dist), atol=1e-6)
    close(model.features(x), (cls + dist) / 2, atol=1e-6)
    assert (cls - dist).abs().mean() > 1e-3
    model.v.dist_token += torch.linspace(
        -1, 1, 64
    )  # reaches the class token through attention, and the distillation token directly
    moved = [(a - b).abs().mean() for a, b in zip(model(x, both=True), (logits, kd_logits))]
    assert moved[1] > moved[0] > 0


@torch.no_grad()
def test_cnn_pools_the_mean_of_its_last_map():
    model = randomised(models.build_model(CNN, 3, n_frames=100, kd_head=True))
    x = spectrograms()
    z = model.feature_map(x).mean((2, 3))
    assert z.shape == (2, model.backbone.head_hidden_size)
    close(model.features(x), z, atol=1e-6)
    logits, kd_logits = model(x, both=True)
    close(logits, z @ model.head.weight.T + model.head.bias)
    close(kd_logits, z @ model.kd_head.weight.T + model.kd_head.bias)


@torch.no_grad()
def test_attention_pooling_by_hand():
    pool, (B, T, d, C) = models.AttentionPool(6, 3), (2, 5, 6, 3)
    assert pool.weight.tolist() == [0.25] * 4
    pool.weight.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    x = torch.randn(B, T, d) * 2
    linear = [x.double() @ m.weight.double().T + m.bias.double() for m in (pool.att, pool.cla)]
    att, cla = (1 / (1 + np.exp(-z.numpy())) for z in linear)
    logits = pool(x)
    for b in range(B):
        for c in range(C):
            p = 0
            for h in range(4):  # head h holds outputs h C .. h C + C - 1
                a, s = att[b, :, h * C + c], cla[b, :, h * C + c]
                p += float(pool.weight[h]) * (a / a.sum() * s).sum()
            assert abs(logits[b, c].item() - np.log(p / (1 - p))) < 1e-4
    close(pool.double()(x.double()), logits.double(), atol=1e-4)


def test_hybrid_pools_frequency_by_mean_and_time_by_attention():
    model = randomised(models.build_model(HYBRID, 3, n_frames=64))
    x = spectrograms(2, 64)
    with torch.no_grad():
        z = model.feature_map(x)  # (B, d, F / 8, T / 8)
        assert z.shape == (2, 64, 16, 8)
        close(model(x), model.head(z.mean(2).mT), atol=1e-6)
        nn.init.normal_(model.head.att.weight, std=0.4)
        nn.init.normal_(model.head.cla.weight, std=0.4)
        z = torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(1))
        model.feature_map = lambda x: z
        close(model(x), model.head(z.mean(2).mT))
        assert (model(x) - model.head(z.mean(3).mT)).abs().max() > 0.1
        del model.feature_map
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x * 1e4)
    nn.functional.binary_cross_entropy_with_logits(logits, torch.ones_like(logits)).backward()
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [1e3, -1e3])
def test_attention_pooling_stays_finite(size):
    """Where every sigmoid is 0 or 1, in float32 and from bfloat16 features, there are still finite logits and gradients."""
    for sign in (1, -1):
        pool = models.AttentionPool(4, 2)
        nn.init.constant_(pool.att.weight, size)
        nn.init.constant_(pool.cla.weight, size * sign)
        for x in (torch.ones(1, 3, 4), torch.ones(1, 3, 4, dtype=torch.bfloat16)):
            x.requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                logits = models.outputs(pool, None, x, both=False)
            assert logits.isfinite().all() and (logits * np.sign(size) * sign > 10).all()
            logits.sum().backward()
            assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in pool.parameters())


# -------------------------------------------------------------------------------------- stochastic depth, patchout, teachers


def test_stochastic_depth_grows_linearly_to_two_tenths():
    for name in ("efficientnet-b0", "hybrid-b0", CNN):
        blocks = [block for stage in models.build_model(name, 3, n_frames=64).backbone.blocks for block in stage]
        rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
        assert rates == pytest.approx([0.2 * i / len(blocks) for i in range(len(blocks))]), name


@torch.no_grad()
@pytest.mark.parametrize(("name", "random"), [("hybrid-b0", True), ("densenet-121", False), (AST, False)])
def test_stochastic_depth_is_random_in_training_only_and_of_efficientnets_only(name, random):
    model, x = models.build_model(name, 3, n_frames=32), spectrograms(4, 32)

    def logits(seed):
        torch.manual_seed(seed)
        return model(x)

    model.train()
    assert torch.equal(logits(1), logits(2)) != random and torch.equal(logits(1), logits(1))
    model.eval()
    assert torch.equal(logits(1), logits(2))


@torch.no_grad()
def test_patchout_attends_to_the_kept_patches_at_their_positions(ast):
    x, v, keep = spectrograms(), ast.v, torch.tensor([3, 10, 50, 51, 107])  # of 12 rows (frequency) of 9 columns (time)
    tokens = [v.cls_token[:, 0] + v.pos_embed[:, 0], v.dist_token[:, 0] + v.pos_embed[:, 1]]
    tokens = [t.expand(2, -1) for t in tokens]
    for i in keep.tolist():
        f, t = 10 * (i // 9), 10 * (i % 9)
        square = x[:, t : t + 16, f : f + 16].mT.flatten(1)  # (B, 16 bins x 16 frames)
        patch = square @ v.patch_embed.proj.weight.flatten(1).T + v.patch_embed.proj.bias
        tokens.append(patch + v.pos_embed[:, 2 + i])
    out = v.norm(v.blocks(torch.stack(tokens, 1)))
    close(ast.features(x, keep), (out[:, 0] + out[:, 1]) / 2)
    close(ast(x, keep=keep), ast.mlp_head((out[:, 0] + out[:, 1]) / 2))
    assert (ast(x, keep=keep) - ast(x)).abs().max() > 0.01
    assert torch.equal(ast(x, keep=torch.arange(108)), ast(x))


def test_gradients_reach_only_kept_patches():
    model, keep = randomised(models.build_model(AST, 3, n_frames=100, kd_head=True)), torch.tensor([0, 8, 9, 99])
    x = spectrograms().requires_grad_()
    sum(z.square().sum() for z in model(x, both=True, keep=keep)).backward()
    reached = model.v.pos_embed.grad[0].abs().sum(1).nonzero().flatten()
    assert reached.tolist() == [0, 1, *(2 + keep).tolist()]
    seen = torch.zeros(100, 128, dtype=torch.bool)
    for i in keep.tolist():
        seen[10 * (i % 9) : 10 * (i % 9) + 16, 10 * (i // 9) : 10 * (i // 9) + 16] = True
    assert torch.equal(x.grad.abs().sum(0) > 0, seen)


@torch.no_grad()
@pytest.mark.parametrize(("name", "left"), [(CNN, 0), (HYBRID, 0), ("densenet-121", 62), (AST, 0)])
def test_a_frozen_teacher_computes_the_same_without_its_norms(name, left):
    """Batch norms are folded into convolutions, but for DenseNet's that come before one. --teacher-precision: float32 logits."""
    model, x = randomised(models.build_model(name, 3, n_frames=64, kd_head=True)).double(), spectrograms(2, 64)
    norms = lambda m: sum(isinstance(k, nn.BatchNorm2d) for k in m.modules())
    args, whole, before = argparse.Namespace(compile=True), norms(model), model(x.double(), both=True)
    assert norms(models.wrap(model, args, CPU)) == whole  # that one trains
    teacher = models.wrap(model, args, CPU, trains=False)
    assert norms(teacher) == left <= whole and not teacher.training
    for a, b in zip(teacher(x.double(), both=True), before):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    with models.autocast(CPU, "bfloat16"):
        rough = teacher.float()(x)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), (before[0] + before[1]) / 2, rtol=0.1, atol=0.1)


# ------------------------------------------------------------------------------------------------------- our checkpoints


META = {"classes": ["a", "b", "c"], "mean": -4.5, "std": 3.25, "n_frames": 64, "sample_rate": 16000}
META |= {"task": "multi-label", "data": "data/x", "args": {"lr": 1e-3}}


class Wrapped(nn.Module):  # as DistributedDataParallel does it
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(("name", "kd_head"), [(AST, True), (CNN, False), (CNN, True), (HYBRID, False)])
def test_checkpoint_round_trip(name, kd_head, tmp_path):
    model = randomised(models.build_model(name, 3, n_frames=64, kd_head=kd_head))
    models.save_checkpoint(tmp_path / "new" / "m.pt", model.train(), **META)
    loaded, meta = models.load_checkpoint(tmp_path / "new" / "m.pt")
    assert not loaded.training and all(p.device.type == "cpu" for p in loaded.parameters())
    x = spectrograms(2, 64)
    assert torch.equal(loaded(x), model.eval()(x))
    assert all(torch.equal(a, b) for a, b in zip(loaded(x, both=True), model(x, both=True)))
    assert {k: meta[k] for k in META} == META
    assert meta["model"] == {"name": name, "n_classes": 3, "n_frames": 64, "kd_head": kd_head}
    plain = torch.load(tmp_path / "new" / "m.pt", weights_only=True)
    assert plain["mean"] == -4.5 and set(plain["state"]) == set(model.state_dict())
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["m.pt"]


def test_checkpoints_hold_no_prefixes(tmp_path):
    model = randomised(models.build_model(CNN, 3, n_frames=64))
    names, x = set(model.state_dict()), spectrograms(1, 64)
    compiled = models.build_model(CNN, 3, n_frames=64)
    compiled.load_state_dict(model.state_dict())
    compiled.compile()  # in place
    wrapped = (
        Wrapped(model),
        torch.compile(model),
        Wrapped(torch.compile(model)),
        compiled,
    )
    for i, net in enumerate(wrapped):
        models.save_checkpoint(tmp_path / f"{i}.pt", net, **META)
        assert set(torch.load(tmp_path / f"{i}.pt", weights_only=True)["state"]) == names
        assert torch.equal(models.load_checkpoint(tmp_path / f"{i}.pt")[0](x), model(x))


def test_own_checkpoint_as_a_start(ast, tmp_path, capsys):
    models.save_checkpoint(tmp_path / "ast.pt", ast, **META)
    models.save_checkpoint(tmp_path / "run" / "best.pt", ast, **META)
    torch.save({"state_dict": {f"model.{k}": v for k, v in ast.state_dict().items()}}, tmp_path / "lightning.ckpt")
    for start in ("ast.pt", "run", "lightning.ckpt"):
        same = models.build_model(AST, 7, n_frames=100, pretrained=tmp_path / start).eval()
        assert (
            torch.equal(same(spectrograms()), ast(spectrograms())) and "initialisation" not in capsys.readouterr().out
        )
    other = models.build_model(AST, 4, n_frames=64, pretrained=tmp_path / "ast.pt", kd_head=True)
    said = capsys.readouterr().out
    assert "mlp_head is for other classes" in said and "no kd_head in it" in said and "positions 12x9 -> 12x5" in said
    assert torch.equal(other.v.norm.weight, ast.v.norm.weight) and other(spectrograms(1, 64)).shape == (1, 4)
    cnn = randomised(models.build_model(CNN, 3, n_frames=100, kd_head=True))
    models.save_checkpoint(tmp_path / "cnn.pt", cnn, **META)
    other = models.build_model(CNN, 3, n_frames=64, pretrained=tmp_path / "cnn.pt").eval()
    assert "kd_head was left out" in capsys.readouterr().out
    assert torch.equal(other(spectrograms()), cnn(spectrograms(), both=True)[0])
    with pytest.raises(
        ValueError, match=rf"does not fit {AST}: missing \d+: v\.cls_token.*, \.\.\.; unexpected"
    ) as error:
        models.build_model(AST, 3, n_frames=64, pretrained=tmp_path / "cnn.pt")
    assert len(str(error.value)) < 2000  # not hundreds of keys


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")

    def fails(temporary):
        temporary.write_bytes(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        dataset.atomic_write(path, fails)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="disk full"):
        dataset.atomic_write(tmp_path / "none.pt", fails)
    dataset.atomic_write(path, lambda temporary: temporary.write_bytes(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_files_that_cannot_be_used_are_named(tmp_path):
    model = models.build_model(TIMM_CNN, 3, n_frames=64)
    models.save_checkpoint(tmp_path / "good.pt", model, **META)
    whole = (tmp_path / "good.pt").read_bytes()
    file = torch.load(tmp_path / "good.pt", weights_only=True)
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "stub.pt").write_bytes(whole[:100])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_bytes(b"hello\n")
    torch.save(file | {"format": 99}, tmp_path / "later.pt")
    torch.save(file["state"], tmp_path / "foreign.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    torch.save(file | {"state": {k: v for k, v in file["state"].items() if "head" not in k}}, tmp_path / "headless.pt")
    torch.save(pathlib.PurePosixPath("x"), tmp_path / "object.pt")
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-5])
    (tmp_path / "text.safetensors").write_bytes(b"hello\n")
    (tmp_path / "folder").mkdir()

    def unusable(function, name, error=ValueError):
        with pytest.raises(error, match=name) as caught:
            function(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)

    unreadable = ["cut.pt", "stub.pt", "empty.pt", "text.pt", "numbers.pt", "object.pt"]
    for name in (*unreadable, "later.pt", "foreign.pt", "headless.pt"):
        unusable(models.load_checkpoint, name)
    unusable(models.load_checkpoint, "none.pt", FileNotFoundError)
    for name in (*unreadable, "cut.safetensors", "text.safetensors", "a.safetensors"):
        unusable(lambda path: models.load_pretrained(model, path), name)
    for name in ("none.pt", "folder"):
        unusable(lambda path: models.load_pretrained(model, path), name, FileNotFoundError)


# ------------------------------------------------------------------------------------------- ImageNet weights from the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that names the hub's address, for a user who has nothing in the cache."""
    constants = huggingface_hub.constants

    def at(port):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"http://127.0.0.1:{port}{template}")
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")

    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return at


def test_imagenet_weights_without_a_network_are_an_error_with_a_way_out(hub):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers
        hub(s.getsockname()[1])
        with pytest.raises(ValueError, match="--pretrained PATH.*--pretrained no") as error:
            models.build_model(TIMM_CNN, 3, n_frames=64, pretrained=True)
    assert "'test_efficientnet'" in str(error.value) and "\n" not in str(error.value)


def test_imagenet_weights_come_from_the_hub(hub, tmp_path, capsys):
    tag = "test_efficientnet.r160_in1k"
    theirs = randomised(timm.create_model(tag))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    body = (tmp_path / "model.safetensors").read_bytes()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self, get=False):
            found = self.path == f"/timm/{tag}/resolve/main/model.safetensors"
            self.send_response(200 if found else 404)
            self.send_header("ETag", '"0123456789abcdef"')
            self.send_header("X-Repo-Commit", "f" * 40)
            self.send_header("Content-Length", str(len(body) if found else 0))
            self.end_headers()
            if get and found:
                self.wfile.write(body)

        def do_GET(self):
            self.do_HEAD(get=True)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub(server.server_port)
    try:
        ours = models.build_model(f"timm:{tag}", 1000, n_frames=64, pretrained=True).eval()
    finally:
        server.shutdown()
        server.server_close()
    assert f"ImageNet weights {tag}" in capsys.readouterr().out
    x = spectrograms(2, 64)
    close(ours(x), theirs(x.transpose(1, 2)[:, None].expand(-1, 3, -1, -1)), atol=1e-4)


@pytest.mark.parametrize("left", [0, 10, 5000, 30000, -1])
def test_a_file_that_was_cut_short_is_named(tmp_path, left):
    path = tmp_path / "cut.pt"
    torch.save({"a": torch.zeros(100000)}, path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match="cut.pt is not a readable weight file"):
        models.torch_load(path)
