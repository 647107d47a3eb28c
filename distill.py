"""CMKD: train a student against the truth and a frozen teacher's soft prediction (Sections 2.4, 4.2 and 4.4).

    python distill.py --data data/demo --model ast-tiny --teacher exp/demo/efficientnet-b0-s0/best.pt         # CPU
    python distill.py --data data/fsd50k --model ast-base --teacher exp/fsd50k/{efficientnet-b0,densenet-121}-s0/best.pt
    torchrun --nproc_per_node=8 distill.py ...                                                                # 8 GPUs

Consistent teaching: teacher and student see the very same augmented spectrogram. The recipe, the flags and the files are
those of train_teacher.py; --teacher and how to weigh it are added. With --lam 1 the weights are train_teacher.py's. To change
the loss, edit `cmkd_loss`, or add a term in the loop of `main`.
"""

import json
import math
import time
import zlib

import torch
import torch.nn.functional as F

import dataset
import evaluate
import models
import train_teacher

LAM = 0.5
TAU = {"AST to CNN or hybrid": 2.5, "ESC-50": 5.0, "else": 1.0}  # of each teacher (Table 5; Section 5.2: 5 or 6)


def cmkd_loss(
    student_logits, teacher_logits, targets, task, lam=0.5, tau=1.0, kd_logits=None, combine="loss", kl="bernoulli"
):  # fmt: skip
    """Eq. (1): lam Loss_g(psi(Zs), y) + (1 - lam) Loss_d(psi(Zs), psi(Zt / tau)) -> (loss, loss_g, loss_d), scalars.

    Logits (B, C); teacher_logits one tensor or a list; targets (B, C), soft. tau, a number or one for each teacher, divides the
    teacher's logits only, and there is no tau^2. Loss_d is KL(teacher || student): per class of a Bernoulli with the mean over
    batch and classes (multi-label), or over the softmax with the mean over the batch (single-label, or kl='softmax': on
    multi-label data divided by C, so that lam weighs alike). kd_logits are those of a separate distillation head. Computed in
    float32 or wider.

    combine='loss' (Multi-Loss): each teacher's loss weighs (1 - lam) / n. mean_i KL(p_i || q) = KL(mean p || q) + a constant
    in q, so it is one cross-entropy against the mean probability less the mean entropy. 'ensemble' averages the logits, the
    reading of "averaged predictions" that differs: averaged probabilities would have the same gradient as Multi-Loss.
    """
    wide = lambda z: z if z.dtype == torch.float64 else z.float()
    zs, zk, y = wide(student_logits), wide(student_logits if kd_logits is None else kd_logits), wide(targets)
    zt = teacher_logits if isinstance(teacher_logits, (list, tuple)) else [teacher_logits]
    taus = tau if isinstance(tau, (list, tuple)) else [tau] * len(zt)
    zt = torch.stack([z.detach().to(zk.dtype) / t for z, t in zip(zt, taus, strict=True)])  # (n, B, C)
    if combine == "ensemble":
        zt = zt.mean(0, keepdim=True)
    loss_g = train_teacher.truth_loss(zs, y, task)
    if task == "multi-label" and kl == "bernoulli":
        p = zt.sigmoid()
        entropy = -(p * F.logsigmoid(zt) + (1 - p) * F.logsigmoid(-zt)).mean()
        loss_d = F.binary_cross_entropy_with_logits(zk, p.mean(0)) - entropy
    else:
        p = zt.softmax(-1)
        entropy = -(p * zt.log_softmax(-1)).sum(-1).mean()
        loss_d = (F.cross_entropy(zk, p.mean(0)) - entropy) / (zk.shape[1] if task == "multi-label" else 1)
    return lam * loss_g + (1 - lam) * loss_d, loss_g, loss_d


def load_teachers(args, data, device):
    """Frozen teachers in eval mode: [(model, scale, offset)], [meta]. ValueError if one knows other classes, another task or
    fold. scale * x + offset turns the student's normalised input into the teacher's, exactly."""
    teachers, metas = [], []
    for path in args.teacher:
        model, meta = models.load_checkpoint(path, data.n_frames)
        evaluate.check_labels(f"teacher {path}", meta, data)
        fold = meta["args"].get("fold")
        if fold != args.fold:
            mine = f"--fold {args.fold}" if args.fold is not None else "no --fold"
            raise ValueError(f"teacher {path} has --fold {fold}, the student {mine}: test clips would leak")
        scale, offset = data.std / meta["std"], (data.mean - meta["mean"]) / (2 * meta["std"])
        if (scale, offset) != (1, 0):
            print(f"teacher {path} has another normalisation: its input is converted")
        model = models.wrap(model.requires_grad_(False).to(device), args, device, trains=False)
        teachers.append((model, scale, offset))
        metas.append(meta)
    return teachers, metas


def default_tau(args, meta, data):
    """TAU of one teacher: by direction, and ESC-50's only between pretrained models."""
    teacher, student = models.family(meta["model"]["name"]), models.family(args.model)
    if data.source in ("esc10", "esc50"):
        random = "no" in (args.pretrained, meta["args"].get("pretrained"))  # at 5 their targets are nearly flat
        return TAU["else" if random else "ESC-50"]
    return TAU["AST to CNN or hybrid" if teacher == "ast" and student != "ast" else "else"]


def resolve_tau(args, metas, data):
    """--tau: one value, or one for each teacher; the default is by each teacher's own direction."""
    args.tau = args.tau or [default_tau(args, meta, data) for meta in metas]
    if len(args.tau) not in (1, len(metas)):
        raise ValueError(f"--tau has {len(args.tau)} values for {len(metas)} teachers: give one, or one for each")
    if not all(0 < tau < math.inf for tau in args.tau):
        raise ValueError(f"--tau {' '.join(map(str, args.tau))} is out of range: it must be above 0")
    args.tau = args.tau[0] if len(set(args.tau)) == 1 else args.tau


def main():
    p = train_teacher.parser(__doc__)
    p.add_argument("--teacher", nargs="+", required=True, metavar="CKPT", help="one or more checkpoints")
    p.add_argument("--lam", type=float, default=LAM, help="weight of the truth, in [0, 1] (default: %(default)s)")
    p.add_argument("--tau", type=float, nargs="+", help="temperature of the teachers (default: by direction, see TAU)")
    p.add_argument("--combine", choices=["loss", "ensemble"], default="loss", help="teachers: Multi-Loss or Ensemble")
    p.add_argument("--kl", choices=["bernoulli", "softmax"], default="bernoulli", help="Loss_d of multi-label data")
    p.add_argument("--conventional", action="store_true", help="the teacher sees no masks, noise and shift")
    p.add_argument("--kd-head", action="store_true", help="a head for the teacher's loss; scored by the mean of both")
    p.add_argument("--teacher-precision", choices=["float32", "bfloat16"], help="default: that of the student")
    args = train_teacher.parse(p)
    args.teacher = [str(models.best_of(path)) for path in args.teacher]
    if not 0 <= args.lam <= 1:
        raise ValueError(f"--lam {args.lam} is out of range [0, 1]")
    if args.kd_head and args.lam in (0, 1):
        raise ValueError(f"--kd-head with --lam {args.lam} leaves a head untrained, and both are scored: leave it out")
    device = models.setup(args.device, args.precision)
    data, val = train_teacher.open_data(args)
    train_teacher.resolve(args, data)
    teachers, metas = load_teachers(args, data, device)
    resolve_tau(args, metas, data)
    args.teacher_args = [zlib.crc32(json.dumps(meta["args"], sort_keys=True).encode()) for meta in metas]  # made anew?
    args.teacher_epochs = [meta["epoch"] for meta in metas]  # best.pt of a teacher that still trains changes
    for path, meta in zip(args.teacher, metas):
        if (meta["model"]["name"], meta["args"].get("seed")) == (args.model, args.seed):
            print(f"teacher {path} has the student's model and seed, so its batches: for self-KD give another --seed")
    names = [meta["model"]["name"] for meta in metas]
    run = train_teacher.begin(args, data, val, device, f"-from-{'+'.join(names)}", teachers=names)
    net, n_steps = models.wrap(run.model, args, device), dataset.steps_in_epoch(data, args)
    for epoch in range(len(run.history) + 1, args.epochs + 1):
        net.train()
        began, first, decay = time.monotonic(), len(run.log), train_teacher.decay_factor(args, epoch, run.history)
        log = F.pad(run.log, (0, 0, 0, n_steps - first)).to(device)  # a row a step, first those before an interruption
        with models.progress(n_steps * args.batch_size, f"epoch {epoch}", first * args.batch_size) as bar:
            for step, (x, y, mixed, keep) in enumerate(dataset.batches(data, args, epoch, device, first), first):
                for group in run.optimizer.param_groups:  # linear warmup times the epoch's decay
                    group["lr"] = args.lr * decay * min(1, ((epoch - 1) * n_steps + step + 1) / max(1, args.warmup))
                seen = dataset.normalise(mixed, data.mean, data.std) if args.conventional else x  # (b, T, F)
                with torch.no_grad(), models.autocast(device, args.teacher_precision or args.precision):
                    teacher_logits = [t(seen if (a, b) == (1, 0) else a * seen + b) for t, a, b in teachers]
                with models.autocast(device, args.precision):
                    logits, kd_logits = net(x, both=True, keep=keep)  # (b, C) each
                loss, loss_g, loss_d = cmkd_loss(
                    logits, teacher_logits, y, data.task, args.lam, args.tau, kd_logits, args.combine, args.kl
                )
                terms = {"loss": loss, "loss_g": loss_g, "loss_d": loss_d}  # one more: add it to loss, name it here
                run.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                train_teacher.record(run, log, step, terms)
                run.optimizer.step()
                if bar.update(args.batch_size):  # now and then
                    bar.set_postfix(train_teacher.means(run, log[: step + 1]), refresh=False)
                if run.stop or time.monotonic() - run.saved > train_teacher.RESUME_SECONDS:
                    train_teacher.save_last(run, log[: step + 1])
        train_teacher.finish_epoch(run, log, began, (n_steps - first) * args.batch_size)


if __name__ == "__main__":
    models.command_line(main)
