"""The models of CMKD (Gong et al., 2022, Sections 2.1, 2.2 and 4.5): building, loading, saving.

    AST      overlapping 16x16 patches of a log-mel spectrogram through a DeiT-distilled Transformer (Section 2.2)
    CNN      an image CNN with 1 input channel, mean over time and frequency of its last feature map (Section 2.1)
    Hybrid   EfficientNet features under four attention heads over time (PSLA; Section 4.5, Table 8)

All share one contract: `model(x)` with x (B, T, F) normalised log-mel gives logits (B, C); `model(x, both=True)` gives
(logits, logits for the teacher's loss), the same tensor twice unless the model has a separate distillation head; with
one, `model(x)` is the mean of the two. `model.features(x)` gives the representation (B, d).

    python -c "import models; print(models.build_model('ast-tiny', n_classes=200))"
"""

import atexit
import ctypes
import itertools
import math
import os
import pathlib
import re
import signal
import socket
import sys
import urllib.parse
import urllib.request
import zipfile

import joblib  # comes with scikit-learn
import safetensors.torch  # comes with timm
import timm
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm, resample_abs_pos_embed, resample_patch_embed
from timm.models import DenseNet, EfficientNet, clean_state_dict
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import dataset
from dataset import N_MELS, PATCH, STRIDE, command_line, rank, world  # noqa: F401 (the scripts: models.command_line)

# name: (family, timm tag of the ImageNet backbone). The tags are fixed: timm's default for b6 was trained on JFT.
MODELS = {
    "ast-tiny": ("ast", "deit_tiny_distilled_patch16_224.fb_in1k"),
    "ast-small": ("ast", "deit_small_distilled_patch16_224.fb_in1k"),
    "ast-base": ("ast", "deit_base_distilled_patch16_384.fb_in1k"),
    "efficientnet-b0": ("cnn", "efficientnet_b0.ra_in1k"),
    "efficientnet-b2": ("cnn", "efficientnet_b2.ra_in1k"),
    "efficientnet-b6": ("cnn", "tf_efficientnet_b6.aa_in1k"),
    "densenet-121": ("cnn", "densenet121.tv_in1k"),
    "hybrid-b0": ("hybrid", "efficientnet_b0.ra_in1k"),
    "hybrid-b2": ("hybrid", "efficientnet_b2.ra_in1k"),
}
STOCHASTIC_DEPTH = 0.2  # of EfficientNets, torchvision's default: the paper's CNNs are torchvision's (footnote 1)
PRECISION = {"cuda": "bfloat16", "cpu": "float32"}
FORMAT = 1  # of the files that save_checkpoint writes


def family(name):
    """'ast', 'cnn' or 'hybrid' for a model name; ValueError for a name that is neither in MODELS nor 'timm:<CNN>'."""
    if name.startswith("timm:"):
        return "cnn"
    if name not in MODELS:
        raise ValueError(f"unknown model '{name}': choose one of {', '.join(MODELS)}, or timm:<any timm CNN>")
    return MODELS[name][0]


# ---------------------------------------------------------------------------------------------------- architectures


class AST(nn.Module):
    """Audio Spectrogram Transformer (Section 2.2). Parameter names are those of the original AST release."""

    def __init__(self, tag, n_classes, n_frames, kd_head):
        super().__init__()
        self.n_frames = n_frames
        self.grid = dataset.patch_grid(n_frames)
        self.v = timm.create_model(tag, num_classes=0)  # without DeiT's own two heads, which AST does not use
        d = self.v.embed_dim
        self.v.patch_embed.proj = nn.Conv2d(1, d, PATCH, stride=STRIDE)
        self.v.pos_embed = nn.Parameter(torch.empty(1, 2 + self.grid[0] * self.grid[1], d))
        nn.init.trunc_normal_(self.v.pos_embed, std=0.02)
        self.mlp_head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, n_classes))
        self.kd_head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, n_classes)) if kd_head else None
        for m in self.modules():  # Hugging Face's value (the release has 1e-6): seen only on untrained weights
            if isinstance(m, nn.LayerNorm):
                m.eps = 1e-12

    def tokens(self, x, keep=None):
        """x (B, T, F) -> class token (B, d), distillation token (B, d), after the final norm. keep (N',): only these patches
        are attended to (patchout), each at its own position."""
        if x.shape[1] != self.n_frames:
            raise ValueError(f"this AST was built for {self.n_frames} frames, its input has {x.shape[1]}")
        x = self.v.patch_embed.proj(x.transpose(1, 2).unsqueeze(1))  # of (B, 1, F, T)
        x = x.flatten(2).transpose(1, 2) + self.v.pos_embed[:, 2:]  # (B, N, d), frequency-major
        x = x if keep is None else x[:, keep]
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.v.cls_token, self.v.dist_token)]
        x = torch.cat([torch.cat(prefix, 1) + self.v.pos_embed[:, :2], x], 1)  # (B, 2 + N', d)
        x = self.v.norm(self.v.blocks(x))
        return x[:, 0], x[:, 1]

    def features(self, x, keep=None):
        cls, dist = self.tokens(x, keep)
        return (cls + dist) / 2  # (B, d)

    def forward(self, x, both=False, keep=None):
        cls, dist = self.tokens(x, keep)  # with a kd_head (Section 4.2) each has its own head and its own loss
        z = (cls + dist) / 2 if self.kd_head is None else cls  # (B, d)
        return outputs(self.mlp_head, self.kd_head, z, both, dist)


class CNN(nn.Module):
    """A timm CNN with 1 input channel and mean pooling over time and frequency (Section 2.1)."""

    def __init__(self, tag, n_classes, kd_head, head=nn.Linear):
        super().__init__()
        depth = {"drop_path_rate": STOCHASTIC_DEPTH} if "efficientnet" in tag else {}
        self.backbone = timm.create_model(tag, in_chans=1, num_classes=0, global_pool="", **depth)
        d = self.backbone.head_hidden_size
        self.head = head(d, n_classes)
        self.kd_head = head(d, n_classes) if kd_head else None

    def feature_map(self, x):
        """x (B, T, F) -> (B, d, F/32, T/32)"""
        return self.backbone(x.transpose(1, 2).unsqueeze(1))

    def features(self, x):
        return self.feature_map(x).mean((2, 3))  # (B, d)

    def frame_logits(self, x):
        """x (B, T, F) -> (B, T/32, C): the head on each column of the map; their mean is the clip's, the head being linear."""
        return outputs(self.head, self.kd_head, self.feature_map(x).mean(2).transpose(1, 2), both=False)

    def forward(self, x, both=False, keep=None):  # keep is an AST's
        return outputs(self.head, self.kd_head, self.features(x), both)


class AttentionPool(nn.Module):
    """PSLA's multi-head attention over time: (B, T', d) -> logits (B, C).

    Head h: sum_t sigmoid(att_h(t)) sigmoid(cla_h(t)) / sum_t sigmoid(att_h(t)); heads are mixed by learned weights that
    start at 1/4. That mixture is a probability p; it leaves as log(p / (1 - p)), so that every loss takes logits.
    """

    def __init__(self, d, n_classes, heads=4):
        super().__init__()
        self.att = nn.Linear(d, heads * n_classes)
        self.cla = nn.Linear(d, heads * n_classes)
        self.weight = nn.Parameter(torch.full((heads,), 1 / heads))

    def forward(self, x):
        shape = (*x.shape[:2], len(self.weight), -1)  # x in float32 (outputs): 1 - 1e-7 is 1 in bfloat16
        att = self.att(x).sigmoid().clamp(1e-7, 1 - 1e-7).view(shape)  # (B, T', heads, C)
        cla = self.cla(x).sigmoid().view(shape)
        p = (att * cla).sum(1) / att.sum(1)  # (B, heads, C)
        p = (p * self.weight[:, None]).sum(1)  # no matrix product: TF32 would round 0.9999 to 1
        return torch.logit(p, eps=1e-7)


class Hybrid(CNN):
    """CNN-attention hybrid (Section 4.5): EfficientNet features, mean over frequency, PSLA attention over time."""

    def __init__(self, tag, n_classes, kd_head):
        super().__init__(tag, n_classes, kd_head, AttentionPool)

    def forward(self, x, both=False, keep=None):
        return outputs(self.head, self.kd_head, self.feature_map(x).mean(2).transpose(1, 2), both)  # of (B, T', d)


def outputs(head, kd_head, z, both, z_kd=None):
    """(logits, kd_logits), or what evaluation uses: the mean of the two heads, which for one head is that head. z_kd: what
    kd_head sees, if not z. Outside autocast: logits in bfloat16 tie (0.12 mAP lost on simulated scores of FSD50K's size)."""
    with torch.autocast(z.device.type, enabled=False):
        dtype = next(head.parameters()).dtype
        logits = kd_logits = head(z.to(dtype))  # (..., C)
        if kd_head is not None:
            kd_logits = kd_head((z if z_kd is None else z_kd).to(dtype))
    return (logits, kd_logits) if both else (logits if kd_head is None else (logits + kd_logits) / 2)


def build_model(name, n_classes, n_frames=1000, pretrained=False, kd_head=False):
    """A model of MODELS, or 'timm:<backbone>', for (B, n_frames, 128) inputs and n_classes logits.

    pretrained: False (random), True (timm's ImageNet weights, from its cache or the Hugging Face hub), or the path of a
    file that load_pretrained understands. Raises ValueError for an unknown name or weights that do not fit, and
    FileNotFoundError for a path that does not exist; asked-for weights are never replaced by random ones.
    """
    kind, tag = MODELS[name] if name in MODELS else (family(name), name.removeprefix("timm:"))
    if not timm.is_model(tag.split(".")[0]):
        raise ValueError(f"unknown model '{name}': timm {timm.__version__} has no '{tag}'; see timm.list_models()")
    if kind == "ast":
        model = AST(tag, n_classes, n_frames, kd_head)
    else:
        try:
            model = {"cnn": CNN, "hybrid": Hybrid}[kind](tag, n_classes, kd_head)
            with torch.no_grad():
                z = model.eval().feature_map(torch.zeros(1, n_frames, N_MELS))
            model.train()
            if z.ndim != 4 or z.shape[1] != model.backbone.head_hidden_size:
                raise ValueError(f"'{name}' gives {tuple(z.shape)}, not a (B, d, F, T) map: it is no plain CNN")
        except (AssertionError, AttributeError, RuntimeError, TypeError) as e:
            raise ValueError(f"'{name}' cannot take (1, {N_MELS}, {n_frames}) spectrograms as a CNN: {e}") from e
    model.spec = {"name": name, "n_classes": n_classes, "n_frames": n_frames, "kd_head": kd_head}
    if pretrained is True:
        load_pretrained(model, f"ImageNet weights {tag}", imagenet_state(tag))
    elif pretrained:
        load_pretrained(model, pretrained)
    return model


# ------------------------------------------------------------------------------------------------- foreign weights


def imagenet_state(tag):
    """timm's ImageNet state dict of a tag, from its cache or the Hugging Face hub; ValueError if neither has it."""
    from huggingface_hub import constants  # comes with timm

    hub = urllib.parse.urlsplit(constants.ENDPOINT)
    if not urllib.request.getproxies():
        try:
            socket.create_connection((hub.hostname, hub.port or 443), timeout=10).close()
        except OSError:  # the hub's client would retry for most of a minute, with a warning each time
            constants.HF_HUB_OFFLINE = True
    try:
        return timm.create_model(tag, pretrained=True).state_dict()
    except Exception as e:  # the client raises errors of several libraries: network, HTTP, cache, timm itself
        way_out = "connect to a network, or give --pretrained PATH (timm's weights), or --pretrained no for random ones"
        raise ValueError(f"cannot get the ImageNet weights '{tag}' ({type(e).__name__}): {way_out}") from e


def read_weights(path):
    """The tensors of a .pth, .bin or .safetensors file, a Hugging Face folder or a run's, without wrappers' prefixes."""
    path = best_of(path)
    if path.is_dir():  # .pth: the original AST release's
        found = [p for name in ("model.safetensors", "pytorch_model.bin", "*.pth") for p in sorted(path.glob(name))]
        if not found:
            raise FileNotFoundError(f"{path} holds neither model.safetensors nor pytorch_model.bin nor a .pth")
        if (path / "config.json").is_file():
            read_config(path)
        path = found[0]
    file = torch_load(path)
    inner = ("state", "state_dict", "model", "model_state_dict")  # ours, Lightning, DeiT's release, PyTorch's tutorial
    state = next((file[k] for k in inner if isinstance(file.get(k), dict)), file)
    if not state or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{path} is not a state dict of tensors (it holds {', '.join([*file][:3])}): save that alone")
    check_finite(state, path)
    lightning = "model." * all(k.startswith("model.") for k in state)
    return clean_state_dict({k.removeprefix(lightning): v for k, v in state.items()})


BODY = "audio_spectrogram_transformer."
HF_NAMES = {  # the AST release's names: as Hugging Face saves them; of two that overlap the longer comes first
    "v.cls_token": f"{BODY}embeddings.cls_token", "v.dist_token": f"{BODY}embeddings.distillation_token",
    "v.pos_embed": f"{BODY}embeddings.position_embeddings", "v.norm.": f"{BODY}layernorm.",
    "v.patch_embed.proj.": f"{BODY}embeddings.patch_embeddings.projection.", "v.blocks.": f"{BODY}encoder.layer.",
    ".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after.", ".attn.q.": ".attention.attention.query.",
    ".attn.k.": ".attention.attention.key.", ".attn.v.": ".attention.attention.value.",
    ".attn.proj.": ".attention.output.dense.", ".mlp.fc1.": ".intermediate.dense.", ".mlp.fc2.": ".output.dense.",
    "mlp_head.0.": "classifier.layernorm.", "mlp_head.1.": "classifier.dense.",
}  # fmt: skip
IN_MEMORY = {"v.blocks.": f"{BODY}layers.", ".attn.proj.": ".attention.o_proj."}  # of transformers 5, not as it saves
IN_MEMORY |= {f".attn.{p}.": f".attention.{p}_proj." for p in "qkv"}


def from_hugging_face(state):
    """Hugging Face AST names -> the original release's, with query, key and value joined; the release's own stay."""
    out = {}
    for key, value in state.items():
        for ours, theirs in (*HF_NAMES.items(), *IN_MEMORY.items()):
            key = key.replace(theirs, ours)
        out[key] = value
    for key in [k for k in out if ".attn.q." in k]:
        names = [key.replace(".attn.q.", f".attn.{p}.") for p in "qkv"]
        out[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([out.pop(name) for name in names if name in out])
    return out


def to_hugging_face(state):
    """The inverse of from_hugging_face: our AST's state dict under the names that Hugging Face saves."""
    out = {}
    for key, value in state.items():
        for p, part in zip("qkv", value.chunk(3)) if ".attn.qkv." in key else [("", value)]:
            name = key.replace(".attn.qkv.", f".attn.{p}.")
            for ours, theirs in HF_NAMES.items():
                name = name.replace(ours, theirs)
            out[name] = part.contiguous()
    return out


def resize_positions(pos, old, new):
    """Position embeddings (1, 2 + f*t, d) of grid old = (f, t) for grid new: cut from the centre where new is smaller,
    bilinear where it is larger, frequency and time each (Section 2.2 and the AST release)."""
    grid = pos[:, 2:].reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, d, f, t)
    grid = nn.functional.interpolate(grid, [*map(max, old, new)], mode="bilinear", align_corners=False)
    for dim, size in enumerate(new, 2):
        grid = grid.narrow(dim, grid.shape[dim] // 2 - size // 2, size)
    return torch.cat([pos[:, :2], grid.flatten(2).transpose(1, 2)], 1)


def from_timm_vit(state, grid, source):
    """A timm ViT's state dict as an AST of DeiT-distilled's grid holds one: -> (state, what was changed).

    One class token (and its position) serves both tokens; LayerScale is folded into the matrices before it; patches of another
    size than 16x16 are resampled (timm's resample_patch_embed) and their positions with them, to DeiT's `grid`.
    ValueError for a ViT without a class token, or whose positions are not a square.
    """
    state, changed = dict(state), []
    if not {"cls_token", "pos_embed"} <= state.keys():
        raise ValueError(f"{source} is a ViT without a class token or learned positions: an AST cannot start from it")
    if "dist_token" not in state:
        state["dist_token"] = state["cls_token"]
        changed.append("its class token serves both")
    pos, size = state["pos_embed"].float(), state["patch_embed.proj.weight"].shape[-1]
    side = int(pos.shape[1] ** 0.5)
    n = pos.shape[1] - side**2  # positions of class tokens: DeiT-distilled has 2, others 1 or none
    if n > 2:
        raise ValueError(f"{source}: {pos.shape[1]} positions are not a square and at most 2 class tokens")
    prefix, positions = pos[:, [0, n - 1]] if n else torch.zeros_like(pos[:, :2]), pos[:, n:]
    if size != PATCH:
        weight = state["patch_embed.proj.weight"].float()
        state["patch_embed.proj.weight"] = resample_patch_embed(weight, [PATCH, PATCH])
        positions = resample_abs_pos_embed(positions, grid, [side, side], num_prefix_tokens=0)
        changed.append(f"patches {size}x{size} -> {PATCH}x{PATCH}, positions {side}x{side} -> {grid[0]}x{grid[1]}")
    state["pos_embed"] = torch.cat([prefix, positions], 1)
    scales = [k for k in state if re.search(r"\.ls[12]\.gamma$", k)]
    for key in scales:
        gamma = state.pop(key).float()
        matrix = key.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        state[f"{matrix}.weight"] = state[f"{matrix}.weight"].float() * gamma[:, None]
        state[f"{matrix}.bias"] = state[f"{matrix}.bias"].float() * gamma
    if scales:
        changed.append("LayerScale folded")
    return {f"v.{k}": v for k, v in state.items()}, changed


def to_ast(model, state, source):
    """A state dict of timm's ViTs, of the AST release or of Hugging Face's AST, with our AST's names and positions."""
    square = "patch_embed.proj.weight" in state  # timm's ViTs, of square images; all else has our 12 rows
    grid = model.v.patch_embed.grid_size  # DeiT's, for patches of another size
    state, changed = from_timm_vit(state, grid, source) if square else (from_hugging_face(state), [])
    state = {k: v for k, v in state.items() if not re.match(r"v\.head(_dist)?\.", k)}  # DeiT's own, unused by AST
    if (pos := state.get("v.pos_embed")) is not None:
        n = pos.shape[1] - 2
        old = (round(n**0.5),) * 2 if square else (model.grid[0], n // model.grid[0])
        if old[0] * old[1] != n:
            raise ValueError(f"{source}: {n} positions do not make a grid of {old[0]} rows of patches")
        if old != model.grid:
            changed.append(f"positions {old[0]}x{old[1]} -> {model.grid[0]}x{model.grid[1]}")
            state["v.pos_embed"] = resize_positions(pos.float(), old, model.grid)
    return state, changed


def to_cnn(model, state):
    """A state dict of a timm CNN with the names of our CNN or hybrid."""
    if any(k.startswith("backbone.") for k in state):
        return state
    classifier = model.backbone.pretrained_cfg.get("classifier", "classifier")
    rename = lambda k: "head" + k[len(classifier) :] if k.startswith(classifier + ".") else "backbone." + k
    return {rename(k): v for k, v in state.items()}


def load_pretrained(model, path, state=None):
    """Start `model` from other people's (or our own) weights; prints what was left out, raises on anything unexpected.

    Understands timm state dicts (3-channel stems included; for an AST any ViT of its width and depth), the original AST
    release's .pth (`module.v.*`), Hugging Face ASTForAudioClassification weights (file or folder) and this project's
    checkpoints. A head of another class count stays at its initialisation, and the printed line says so. Given a state
    dict, `path` only names it. Raises FileNotFoundError, or ValueError with the keys that do not fit.
    """
    own, state = model.state_dict(), state or read_weights(path)
    state, changed = to_ast(model, state, path) if isinstance(model, AST) else (to_cnn(model, state), [])
    for key, value in state.items():  # a 3-channel stem: the sum equals showing the spectrogram on all three channels
        if key in own and value.ndim == 4 and value.shape[1] == 3 and own[key].shape[1] == 1:
            state[key] = value.sum(1, keepdim=True)
    for head in ("mlp_head", "head", "kd_head"):
        mine, theirs = ({k: v.shape for k, v in s.items() if k.startswith(f"{head}.")} for s in (own, state))
        if mine != theirs and (mine or head == "kd_head"):
            state = {k: v for k, v in state.items() if k not in theirs} | {k: own[k] for k in mine}
            found = f"its {head} is for other classes or of another kind" if theirs else f"no {head} in it"
            changed.append(f"{found}: ours starts at its initialisation" if mine else f"its {head} was left out")
    state = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")} | state  # old files lack these counters
    faults = {"missing": [k for k in own if k not in state], "unexpected": [k for k in state if k not in own]}
    faults["of another shape"] = [k for k in own if k in state and own[k].shape != state[k].shape]
    if any(faults.values()):
        few = lambda keys: ", ".join(keys[:20]) + ", ..." * (len(keys) > 20)
        lists = "; ".join(f"{what} {len(keys)}: {few(keys)}" for what, keys in faults.items() if keys)
        raise ValueError(f"{path} does not fit {model.spec['name']}: {lists}")
    model.load_state_dict(state)
    print(f"weights from {path}" + "".join(f"; {c}" for c in changed))


# -------------------------------------------------------------------------------------------------- our own files


def save_checkpoint(path, model, /, **meta):
    """Write weights and everything needed to use them: model, classes, mean, std, n_frames, sample_rate, task, data, args.

    `meta` holds plain Python types only; load with load_checkpoint (which is torch.load with weights_only=True).
    """
    state = {k: v.cpu() for k, v in clean_state_dict(model.state_dict()).items()}  # whatever wraps it
    content = meta | {"format": FORMAT, "model": getattr(model, "module", model).spec, "state": state}

    def write(p):
        with open(p, "wb") as f:  # given a path, torch.save hides why it could not write
            torch.save(content, f)

    dataset.atomic_write(path, write)


def torch_load(path):
    """The dictionary in a weight file, on the CPU; FileNotFoundError, or ValueError if it is damaged (a flipped bit included)."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}: name a file or a run (--pretrained also takes no, imagenet)")
    try:
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a CRC of the zip that a checkpoint is: torch.load does not verify them")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:  # the unpickler raises almost anything on bytes that are not its own
        if isinstance(e, OSError) and e.filename:  # it may not be read
            raise
        way_out = "use another, and of a whole model save the state_dict()"
        raise ValueError(f"{path} is not a readable weight file (damaged, of another format?): {way_out}") from e


def read_checkpoint(path):
    """The dictionary that save_checkpoint wrote; FileNotFoundError, or ValueError if it is something else."""
    file = torch_load(path)
    if "format" not in file or "state" not in file:
        way_out = "give it to --pretrained, or an AST's folder with config.json and preprocessor_config.json"
        raise ValueError(f"{path} is no checkpoint of this project: {way_out}")
    if file["format"] != FORMAT:
        raise ValueError(f"{path} has format {file['format']}, not {FORMAT}: use the version that wrote it")
    check_finite(file["state"], path)
    return file


def check_finite(state, path):
    broken = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise ValueError(f"{path} holds weights that are not finite ({broken[0]}): its training diverged")


AST_CONFIG = {  # what Hugging Face's config.json may vary and our AST does not: the value that it must have
    "patch_size": PATCH, "frequency_stride": STRIDE, "time_stride": STRIDE, "num_mel_bins": N_MELS, "qkv_bias": True,
    "hidden_act": "gelu",
}  # fmt: skip
AST_WIDTHS = {192: "ast-tiny", 384: "ast-small", 768: "ast-base"}  # with heads of 64, which no tensor shows


def read_config(folder):
    """config.json of a folder as Hugging Face writes it; ValueError for an AST that computes something else than ours"""
    config = dataset.read_json(folder / "config.json")
    theirs = AST_CONFIG | {"num_attention_heads": 12, "hidden_size": 768} | config  # AST-Base's may be left out
    width = theirs["hidden_size"]
    ours = AST_CONFIG | ({"num_attention_heads": width // 64} if width in AST_WIDTHS else {})
    for key, value in ours.items() if "audio" in config.get("model_type", "audio") else ():
        if theirs[key] != value:
            raise ValueError(f"{folder} holds an AST with {key} {theirs[key]}, and ours has {value}: it does not fit")
    return config


def read_folder(folder):
    """An AST's folder as Hugging Face holds it, or with the original release's .pth -> what read_checkpoint gives, and its eps.

    Classes and task are those of config.json (id2label, problem_type), the normalisation that of preprocessor_config.json. Our
    export also notes the fold. Without a problem_type, AudioSet's 527 classes are multi-label and all others single-label.
    """
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            what = "which an AST as Hugging Face holds it needs: add it, or give a checkpoint"
            raise FileNotFoundError(f"{folder} has no best.pt, and no {name}, {what}")
    config, audio = read_config(folder), dataset.read_json(folder / "preprocessor_config.json")
    if (rate := audio.get("sampling_rate", dataset.SAMPLE_RATE)) != dataset.SAMPLE_RATE:
        raise ValueError(f"{folder} holds an AST with sampling_rate {rate}, and ours has 16000: it cannot be used here")
    try:
        n_frames, labels = int(config.get("max_length", 1024)), config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
        classes = [labels[str(i)] for i in range(len(labels))]
        mean, std = (0.0, 0.5) if audio.get("do_normalize") is False else (float(audio["mean"]), float(audio["std"]))
    except (KeyError, TypeError, ValueError) as e:
        what = "max_length, id2label of config.json or mean, std of preprocessor_config.json"
        raise ValueError(f"{folder}: {what} are damaged or missing ({e}): restore them") from e
    kinds = {"multi_label_classification": "multi-label", "single_label_classification": "single-label"}
    task = kinds.get(config.get("problem_type"), "multi-label" if len(classes) == 527 else "single-label")
    state = from_hugging_face(read_weights(folder))
    pos = state.get("v.pos_embed", torch.empty(1, 0, 0))
    name = AST_WIDTHS.get(pos.shape[2])
    if name is None or pos.shape[1] != 2 + math.prod(dataset.patch_grid(n_frames)):
        raise ValueError(f"{folder} holds no AST of width 192, 384 or 768 for max_length {n_frames}")
    meta = {"model": {"name": name, "n_classes": len(classes), "n_frames": n_frames, "kd_head": False}, "state": state}
    meta |= {"eps": config.get("layer_norm_eps"), "classes": classes, "task": task, "mean": mean, "std": std}
    meta |= {"n_frames": n_frames, "sample_rate": dataset.SAMPLE_RATE, "data": None, "epoch": None}
    return meta | {"args": {"fold": config.get("fold"), "seed": None, "pretrained": str(folder)}}


def best_of(path):
    """The checkpoint that a path stands for: a run's folder for its best.pt"""
    best = pathlib.Path(path, "best.pt")
    return best if best.is_file() else pathlib.Path(path)


def load_checkpoint(path, n_frames=None):
    """-> (model in eval mode on the CPU, meta). With `n_frames`, for clips of that many: an AST's positions are resampled.
    A folder is an AST as Hugging Face holds it. Errors as read_checkpoint, and ValueError where the weights do not fit."""
    meta = read_folder(pathlib.Path(path)) if os.path.isdir(path) else read_checkpoint(path)
    spec, state, eps = meta["model"], meta.pop("state"), meta.pop("eps", None)
    model = build_model(**spec | {"n_frames": n_frames or spec["n_frames"]})
    try:
        model.load_state_dict(to_ast(model, state, path)[0] if isinstance(model, AST) else state)
    except RuntimeError as e:
        raise ValueError(f"{path}: its weights are not those of {spec['name']}, {spec['n_classes']} classes") from e
    for m in model.modules():
        if eps and isinstance(m, nn.LayerNorm):
            m.eps = eps
    return model.eval(), meta


# -------------------------------------------------------------------------------------------------- how they run


def setup(device=None, precision=None):
    """The device of this process; under torchrun also joins the group (NCCL on GPUs, gloo on CPU)."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no GPU here: use --device cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    local, n_local = (int(os.environ.get(k, d)) for k, d in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    device = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    if n_local > 1:  # torchrun sets OMP_NUM_THREADS to 1, whatever the machine has
        torch.set_num_threads(max(1, joblib.cpu_count() // n_local))
    elif "OMP_NUM_THREADS" not in os.environ:  # torch does not see a container's quota
        torch.set_num_threads(min(joblib.cpu_count(), torch.get_num_threads()))
    if use_cuda:
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")  # TF32 where float32 remains
    elif precision == "bfloat16" and not torch.cpu._is_avx512_bf16_supported():
        print("this CPU has no AVX512-BF16: --precision bfloat16 is slower here than float32")
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a torchrun that is killed takes us along
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo", device_id=device if use_cuda else None)
        atexit.register(dist.destroy_process_group)
        if rank():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # only rank 0 prints
    return device


def check_same(what, value):
    """ValueError unless every process has the same value: machines that differ would wait for each other for ever."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    if values.count(value) < len(values):
        raise ValueError(f"{what} is not the same for all processes: give every machine the same folders")


def autocast(device, precision=None):
    """--precision; by default bfloat16 on a GPU and float32 on a CPU (where only some have fast bfloat16)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=(precision or PRECISION[device.type]) == "bfloat16")


def fold_norms(model):
    """Multiply every batch norm that directly follows a convolution into it, in place: in eval mode it is one fixed scale and
    shift a channel. A frozen CNN then computes the same with fewer passes over memory."""
    if not isinstance(getattr(model, "backbone", None), EfficientNet | DenseNet):
        return  # these define their layers in the order of use; a few of timm's other CNNs do not
    for parent in list(model.modules()):
        for (a, conv), (b, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, a, fuse_conv_bn_eval(conv, norm))
                setattr(parent, b, norm.act)  # timm's norms hold the activation


def wrap(model, args, device, trains=True):
    """The model as it runs: channels_last for a CNN, --compile on CUDA; one that trains under torchrun is in DDP, with
    SyncBatchNorm on GPUs, which would cut a compiled graph at every norm. A frozen teacher (trains=False) has its batch norms
    folded into its convolutions, in place."""
    if not trains:
        fold_norms(model)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # the shapes of training do not change
    if trains and world() > 1 and device.type == "cuda":
        model = convert_sync_batchnorm(model)  # timm's: torch's would drop the activations inside timm's norms
    if not isinstance(model, AST):
        model.to(memory_format=torch.channels_last)
    synced = any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    if device.type == "cuda" and args.compile and not synced:
        model.compile(dynamic=False)
        print("the student is compiled in its first step" if trains else "a teacher is compiled in its first step")
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if trains and world() > 1 else model


def progress(total, label, initial=0, unit="clip"):
    """A progress bar on rank 0: live on a terminal, a line every half minute in a log."""
    every = 0.5 if sys.stderr.isatty() else 30
    return tqdm(desc=label, total=total, initial=initial, unit=unit, mininterval=every, disable=rank() > 0, leave=False)
