"""What only a GPU can show. These tests are skipped without one, and the other tests hide it: TEST_GPU=0 pytest tests/test_cuda.py"""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, inside

import dataset
import evaluate
import models
import train_teacher

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: TEST_GPU=0 pytest tests/test_cuda.py"
)
GPU, CNN, HYBRID, AST = torch.device("cuda", 0), "timm:tf_efficientnet_lite0", "hybrid-b0", "ast-tiny"
FLAGS = ["--pretrained", "no", "--batch-size", "12", "--lr", "1e-4", "--epochs", "2", "--device", "cuda"]


def train(data, out, model, *flags, teacher=None):
    script = "distill.py" if teacher else "train_teacher.py"
    more = ["--teacher", teacher] if teacher else []
    return inside(script, "--data", data, "--model", model, "--out", out, *FLAGS, *more, *flags)


def predicted(path, folder, device):
    data = dataset.FbankDataset(folder, "eval")
    model, meta = models.load_checkpoint(path, data.n_frames)
    return evaluate.predict(model.to(device), data, device, meta["mean"], meta["std"])[0]


@pytest.fixture(scope="module")
def teacher(multi, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    train(multi, out, CNN)
    return out / "best.pt"


@pytest.mark.parametrize("how", [["--cache", "device", "--compile"], ["--cache", "disk"]])
@pytest.mark.parametrize("model", [AST, CNN, HYBRID])
def test_no_step_waits_for_the_gpu(multi, teacher, tmp_path, monkeypatch, model, how):
    batches, watched = dataset.batches, []

    def watch(*args):
        for step, batch in enumerate(batches(*args)):
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first one compiles
            watched.append(step)
            yield batch
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(dataset, "batches", watch)
    try:
        output = train(multi, tmp_path / "run", model, "--kd-head", *how, teacher=teacher)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched == [0, 1, 2, 3] * 2 and (tmp_path / "run" / "best.pt").exists(), output
    on_gpu, on_cpu = (predicted(tmp_path / "run" / "best.pt", multi, d) for d in (GPU, torch.device("cpu")))
    assert np.abs(on_gpu - on_cpu).max() < 1e-2


@pytest.mark.parametrize("how", [["--compile"], []])
def test_a_stopped_run_resumes(multi, teacher, tmp_path, monkeypatch, how):
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(multi, whole, AST, "--patchout", "3", "1", *how, teacher=teacher)
    batches = dataset.batches

    def stopping(data, args, epoch, device, first):
        for step, batch in enumerate(batches(data, args, epoch, device, first), first):
            if (epoch, step) == (2, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "batches", stopping)
        patch.setattr(os, "_exit", lambda code: sys.exit(f"error: ended with {code}"))
        assert train(multi, part, AST, "--patchout", "3", "1", *how, teacher=teacher) == "error: ended with 143"
    assert "epoch 2, step 2" in train(multi, part, AST, "--patchout", "3", "1", *how, teacher=teacher)
    start, a, b = (
        torch.nn.utils.parameters_to_vector(models.read_checkpoint(path)["state"].values())
        for path in (whole / "ep-00.pt", whole / "best.pt", part / "best.pt")
    )
    assert (a - b).norm() < 0.05 * (a - start).norm()  # on a GPU sums in another order are other numbers


def test_batches_are_the_same_from_disk_and_from_the_gpu(multi):
    args = train_teacher.parser("").parse_args(["--data", "d", "--model", CNN])
    vars(args).update(batch_size=12, mixup=0.5, freq_mask=48, time_mask=6, balanced=False, patchout=[0, 0])
    found = []
    for cached in (False, True):
        data = dataset.FbankDataset(multi, "train")
        if cached:
            data.keep_on(GPU)
        found.append([(x, y, mixed) for x, y, mixed, _ in dataset.batches(data, args, 1, GPU)])
    for a, b in zip(*found, strict=True):
        assert all(map(torch.equal, a, b))
    on_cpu = dataset.batches(dataset.FbankDataset(multi, "train"), args, 1, torch.device("cpu"))
    for (_, y, mixed), (_, y_cpu, mixed_cpu, _) in zip(found[0], on_cpu, strict=True):  # x: another generator's noise
        torch.testing.assert_close(y.cpu(), y_cpu)
        torch.testing.assert_close(mixed.cpu(), mixed_cpu, rtol=1e-5, atol=1e-4)


def test_one_process_of_torchrun_trains_through_nccl(multi, tmp_path):
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "1",
        ROOT / "train_teacher.py",
    ]
    line += ["--data", multi, "--model", AST, "--out", tmp_path / "run", *FLAGS]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "training on cuda:0 in bfloat16" in done.stdout, done.stderr
