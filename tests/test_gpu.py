"""What a machine without a GPU can see of the CUDA path: shapes, types and devices of a whole step on tensors that only say they
are on a GPU (any wait of the host for the device, `.item()` say, raises there), what torch.compile is given, and SyncBatchNorm."""

import types

import pytest
import torch
from conftest import AST, CNN, HYBRID
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import analyze
import dataset
import distill
import evaluate
import models
import train_teacher

GPU = torch.device("cuda", 0)
NAMES = [AST, CNN, HYBRID]
pytestmark = pytest.mark.usefixtures("toy")
torch.ones((), requires_grad=True).backward()  # the first starts autograd's threads: here none, so tests can fork


def settings(data, name, *flags):
    line = ["--data", str(data.root), "--model", name, "--pretrained", "no", "--batch-size", "12", *flags]
    line += ["--patchout", "3", "1"] if name == AST else []
    return train_teacher.resolve(train_teacher.parser("").parse_args(line), data)


@pytest.fixture
def gpu(monkeypatch):
    """Tensors made in here are of no content; what needs a driver is replaced."""
    rand, generator = torch.rand, torch.Generator
    monkeypatch.setattr(dataset, "prefetch", lambda work, steps, device: map(work, steps))  # the mode knows one thread
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t)
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    monkeypatch.setattr(torch, "rand", lambda *a, generator, **k: rand(*a, **k))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def opened(folder, split, mode, monkeypatch):
    """A data set that reads real clips, into the mode's GPU if they are kept there."""
    data = dataset.FbankDataset(folder, split)
    read = data.batch

    def batch(indices):
        with unset_fake_temporarily() if data.cache is None else mode:
            return read(indices)

    monkeypatch.setattr(data, "batch", batch)
    return data


def moved(model):
    """model.to(GPU), which the mode cannot do to real weights."""
    for m in model.modules():
        for k, v in m._parameters.items():
            m._parameters[k] = v if v is None else torch.nn.Parameter(torch.empty_like(v, device=GPU), v.requires_grad)
        for k, v in m._buffers.items():
            m._buffers[k] = v if v is None else torch.empty_like(v, device=GPU)
    return model


def built(data, name, **options):
    with unset_fake_temporarily():  # timm reads its own tensors
        model = models.build_model(name, len(data.classes), data.n_frames, **options)
        return model.to(memory_format=torch.channels_last) if models.family(name) == "cnn" else model


@pytest.mark.parametrize("cache", ["disk", "device"])
@pytest.mark.parametrize("name", NAMES)
def test_a_distillation_step_stays_on_the_gpu(multi, gpu, name, cache, monkeypatch):
    data = opened(multi, "train", gpu, monkeypatch)
    args = settings(data, name)
    model, teacher = moved(built(data, name, kd_head=True)).train(), moved(built(data, CNN)).eval()
    teacher.requires_grad_(False)
    if cache == "device":
        data.keep_on(GPU)
        assert data.cache.device == GPU and data.batch([3, 1])[0].device == GPU
    optimizer, run = torch.optim.Adam(model.parameters(), fused=True), types.SimpleNamespace(model=model, names=[])
    log = torch.zeros(4, train_teacher.COLUMNS_OF_LOG, device=GPU)
    for step, (x, y, mixed, keep) in enumerate(dataset.batches(data, args, 1, GPU)):
        assert {v.device for v in (x, y, mixed)} == {GPU} and x.shape == (12, data.n_frames, 128)
        assert keep is None if name != AST else (keep.device, keep.shape) == (GPU, (9,))  # of 12 rows and 2 columns
        with torch.no_grad(), models.autocast(GPU):
            teacher_logits = [teacher(x)]
        with models.autocast(GPU):
            logits, kd_logits = model(x, both=True, keep=keep)
        assert {v.dtype for v in (*teacher_logits, logits, kd_logits)} == {torch.float32}
        losses = distill.cmkd_loss(logits, teacher_logits, y, data.task, 0.5, 1.0, kd_logits)
        for p in model.parameters():  # PyTorch's own backward pass wants a driver
            p.grad = torch.empty_like(p)
        train_teacher.record(run, log, step, dict(zip(("loss", "loss_g", "loss_d"), losses)))
        optimizer.step()
    assert step == 3 and log.device == GPU and run.names == ["loss", "loss_g", "loss_d", "grad_norm"]
    with pytest.raises(Exception, match="_local_scalar_dense"):
        train_teacher.means(run, log)  # waits for the device, so the steps did not


def test_predictions_on_the_gpu_have_one_shape(multi, gpu, monkeypatch):
    data, shapes = opened(multi, "eval", gpu, monkeypatch), []
    model = moved(built(data, AST))
    model.register_forward_pre_hook(lambda _, inputs: shapes.append((tuple(inputs[0].shape), inputs[0].device)))

    def arrived(found):
        assert found.device == GPU and found.shape == (14, 3)
        raise ConnectionAbortedError

    monkeypatch.setattr(torch.Tensor, "cpu", arrived)
    with pytest.raises(ConnectionAbortedError):
        evaluate.predict(model, data, GPU, data.mean, data.std, batch_size=5)
    assert shapes == [((5, data.n_frames, 128), GPU)] * 3


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # of .numpy() while the mode is on
@pytest.mark.parametrize("name", NAMES)
def test_analyses_stay_on_the_gpu(multi, gpu, name, monkeypatch):
    data, fetched = opened(multi, "eval", gpu, monkeypatch), []
    model, meta = moved(built(data, name)).eval(), {"mean": data.mean, "std": data.std}

    def fetch(found):
        fetched.append(found.device)
        with unset_fake_temporarily():
            return torch.zeros(found.shape)

    def truth(*args, of=dataset.targets):  # is of the host
        with unset_fake_temporarily():
            return of(*args)

    monkeypatch.setattr(torch.Tensor, "cpu", fetch)
    monkeypatch.setattr(dataset, "targets", truth)
    for kind, ((level, *_), _) in analyze.LEVELS.items():
        disturb = analyze.disturbance(kind, level, 0, data, GPU)
        assert evaluate.predict(model, data, GPU, data.mean, data.std, disturb=disturb)[0].shape == (14, 3)
    assert analyze.predict_with_features(model, meta, data, GPU, "")[1].shape == (14, 64)
    if name == AST:
        assert analyze.attention_distance(model, meta, data, GPU, "").shape == (2, 2)
    assert set(fetched) == {GPU}


@pytest.mark.parametrize("free, flag, place", [(1e9, [], "cuda"), (5e5, [], None), (5e5, ["--cache", "device"], "cuda"), (1e9, ["--cache", "disk"], None)])  # fmt: skip
def test_clips_live_on_the_gpu_where_they_fit(multi, gpu, monkeypatch, capsys, free, flag, place):
    data = opened(multi, "train", gpu, monkeypatch)  # 48 clips of 30 x 128 x 2 bytes: 0.4 MB
    args = settings(data, CNN, *flag)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 8e9))
    train_teacher.place_clips(args, data, GPU)
    assert (data.cache is not None and data.cache.device.type) == (place or False)
    assert ("from cuda memory" if place else "through the page cache") in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_training_and_one_for_scoring(multi, name, monkeypatch):
    data = dataset.FbankDataset(multi, "train")
    model, args = models.build_model(name, 3, data.n_frames), settings(data, name, "--compile")
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **k: plain(m, fullgraph=True, backend="eager", **k))
    torch._dynamo.reset()
    counters.clear()
    assert models.wrap(model, args, GPU) is model
    for epoch in range(2):
        model.train()
        for step in range(3):
            keep = torch.arange(step, step + 9) if name == AST else None  # patchout draws others each step
            sum(model(torch.randn(4, data.n_frames, 128), both=True, keep=keep)).sum().backward()
        assert counters["stats"]["unique_graphs"] == epoch + 1
        with torch.no_grad():
            model.eval()(torch.randn(8, data.n_frames, 128))
        assert counters["stats"]["unique_graphs"] == 2
    teacher = models.build_model(name, 3, data.n_frames).eval().requires_grad_(False)
    with torch.no_grad():  # its norms are folded first
        models.wrap(teacher, args, GPU, trains=False)(torch.randn(4, data.n_frames, 128))
    assert counters["stats"]["unique_graphs"] == 3
    for flags in ["--no-compile"], ["--epochs", "2083"]:  # of 48 clips: compiling would not pay
        other = models.build_model(name, 3, data.n_frames)
        assert models.wrap(other, settings(data, name, *flags), GPU)._compiled_call_impl is None
    assert settings(data, name, "--epochs", "2084").compile


@pytest.mark.slow
@pytest.mark.parametrize("name", [AST, "densenet-121", "hybrid-b0"])
def test_compiled_models_compute_the_same(multi, name, monkeypatch):
    monkeypatch.setattr(models, "STOCHASTIC_DEPTH", 0.0)  # a compiled model draws other numbers
    data, found = dataset.FbankDataset(multi, "train"), []
    for flags in (["--no-compile"], ["--compile"]):
        torch.manual_seed(0)
        model = models.build_model(name, 3, data.n_frames).double().train()
        torch.manual_seed(1)
        z = models.wrap(model, settings(data, name, *flags), GPU)(torch.randn(4, data.n_frames, 128).double())
        z.square().sum().backward()
        assert (model._compiled_call_impl is None) == (flags == ["--no-compile"])
        found.append([z.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "densenet-121", CNN, HYBRID])
def test_synchronised_norms_keep_timms_activations(multi, name, monkeypatch):
    data = dataset.FbankDataset(multi, "train")
    model, x = models.build_model(name, 3, data.n_frames).eval(), torch.randn(2, data.n_frames, 128)
    with torch.no_grad():
        before, names, args = model(x), list(model.state_dict()), settings(data, name)
        monkeypatch.setattr(models, "world", lambda: 2)
        monkeypatch.setattr(models, "DistributedDataParallel", lambda m, **_: m)
        args.compile = True
        after = models.wrap(model, args, GPU)
        assert after is model and list(after.state_dict()) == names
        torch.testing.assert_close(after(x), before, rtol=1e-4, atol=1e-5)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, torch.nn.SyncBatchNorm) for m in norms)
    assert model._compiled_call_impl is None  # each of them would end a graph


@pytest.mark.parametrize("kd_head", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_logits_do_not_tie(name, kd_head):
    model = models.build_model(name, 3, n_frames=32, kd_head=kd_head).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z = torch.stack(model(torch.randn(8, 32, 128), both=True))
    assert z.dtype == torch.float32 and (z.bfloat16().float() != z).float().mean() > 0.9


def test_a_full_gpu_is_one_sentence():
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(SystemExit, match="error: the GPU's memory is full: use a smaller --batch-size"):
        models.command_line(main)


@pytest.mark.parametrize("fault, said", [(RuntimeError("NCCL"), "Traceback"), (ValueError("a flag"), "error: a flag")])
def test_the_error_of_a_rank_does_not_wait_for_the_others(monkeypatch, capsys, fault, said):
    def main():
        raise fault

    def end(code):  # as os._exit, no exit handler and no destructor runs
        raise SystemExit(f"ended at once: {code}")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(models.os, "_exit", end)
    with pytest.raises(SystemExit, match="ended at once: 1"):
        models.command_line(main)
    assert said in capsys.readouterr().err
