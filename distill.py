"""CMKD: train a student against the truth and a frozen teacher's soft prediction (Sections 2.4, 4.2 and 4.4).

    python distill.py --data data/demo --model ast-tiny --teacher exp/demo/efficientnet-b0-s0/best.pt         # CPU
    python distill.py --data data/fsd50k --model ast-base --teacher exp/fsd50k/{efficientnet-b0,densenet-121}-s0/best.pt
    torchrun --nproc_per_node=8 distill.py ...                                                                # 8 GPUs

Consistent teaching: teacher and student see the very same augmented spectrogram. The recipe, the flags and the files are
those of train_teacher.py; --teacher and how to weigh it are added. With --lam 1 the weights are train_teacher.py's.
"""

import math
import time

import torch
import torch.nn.functional as F

import evaluate
import models
import prep_data
import train_teacher

# tau by direction and data (Section 4.2, Table 5; Section 5.2)
KD = {"lam": 0.5, "tau": 1.0, "tau from ASTs to a CNN or hybrid": 2.5, "tau on ESC-50": 5.0}


def cmkd_loss(
    student_logits, teacher_logits, targets, task, lam=0.5, tau=1.0, kd_logits=None, combine="loss", kl="bernoulli"
):  # fmt: skip
    """Eq. (1): lam Loss_g(psi(Zs), y) + (1 - lam) Loss_d(psi(Zs), psi(Zt / tau)) -> (loss, loss_g, loss_d), scalars.

    Logits (B, C); teacher_logits one tensor or a list; targets (B, C), soft. tau divides the teacher's logits only, and there
    is no tau^2. Loss_d is KL(teacher || student): per class of a Bernoulli with the mean over batch and classes (multi-label),
    or over the softmax with the mean over the batch (single-label, or kl='softmax'). kd_logits are those of a separate
    distillation head. Computed in float32 or wider.

    combine='loss' (Multi-Loss): each teacher's loss weighs (1 - lam) / n. mean_i KL(p_i || q) = KL(mean p || q) + a constant
    in q, so it is one cross-entropy against the mean probability less the mean entropy. 'ensemble' averages the logits, the
    reading of "averaged predictions" that differs: averaged probabilities would have the same gradient as Multi-Loss.
    """
    zs, zk, y = (
        z if z.dtype == torch.float64 else z.float()
        for z in (student_logits, student_logits if kd_logits is None else kd_logits, targets)
    )
    zt = teacher_logits if isinstance(teacher_logits, (list, tuple)) else [teacher_logits]
    zt = torch.stack([z.detach().to(zk.dtype) for z in zt]) / tau  # (n, B, C)
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
        loss_d = F.cross_entropy(zk, p.mean(0)) - entropy
    return lam * loss_g + (1 - lam) * loss_d, loss_g, loss_d


def load_teachers(paths, data, args, device):
    """Frozen teachers in eval mode: [(model, scale, offset)], [name]. ValueError if one knows other classes, another task or
    fold. scale * x + offset turns the student's normalised input into the teacher's, exactly."""
    teachers, names = [], []
    for path in paths:
        model, meta = models.load_checkpoint(path, data.n_frames)
        evaluate.check_same(f"teacher {path}", meta, data)
        fold = meta["args"].get("fold")
        if fold != args.fold:
            mine = f"--fold {args.fold}" if args.fold is not None else "no --fold"
            raise ValueError(
                f"teacher {path} was trained with --fold {fold}, the student has {mine}: test clips would leak"
            )
        scale, offset = data.std / meta["std"], (data.mean - meta["mean"]) / (2 * meta["std"])
        if (scale, offset) != (1, 0):
            print(f"teacher {path} has another normalisation: its input is converted")
        model = train_teacher.faster(model.requires_grad_(False).to(device), args, device)
        teachers.append((model, scale, offset))
        names.append(meta["model"]["name"])
    return teachers, names


def main():
    p = train_teacher.parser(__doc__)
    p.add_argument("--teacher", nargs="+", required=True, metavar="CKPT", help="one or more checkpoints")
    p.add_argument("--lam", type=float, default=KD["lam"], help="weight of the truth, in [0, 1] (default: %(default)s)")
    p.add_argument("--tau", type=float, help="temperature of the teacher (default: by direction and data, see KD)")
    p.add_argument(
        "--combine", choices=["loss", "ensemble"], default="loss", help="several teachers: Multi-Loss or Ensemble"
    )
    p.add_argument("--kl", choices=["bernoulli", "softmax"], default="bernoulli", help="Loss_d of multi-label data")
    p.add_argument(
        "--conventional", action="store_true", help="the teacher sees the mixture without masks, noise and shift"
    )
    p.add_argument(
        "--kd-head", action="store_true", help="a separate head for the teacher's loss; scored by the mean of both"
    )
    args = p.parse_args()
    if not 0 <= args.lam <= 1:
        raise ValueError(f"--lam {args.lam} is out of range [0, 1]")
    device = evaluate.setup(args.device)
    data, val = train_teacher.open_data(args)
    train_teacher.resolve(args, data)
    teachers, names = load_teachers(args.teacher, data, args, device)
    if args.tau is None:
        to_cnn = all(models.family(n) == "ast" for n in names) and models.family(args.model) != "ast"
        args.tau = KD[
            "tau on ESC-50" if args.recipe == "esc50" else "tau from ASTs to a CNN or hybrid" if to_cnn else "tau"
        ]
    if not 0 < args.tau < math.inf:
        raise ValueError(f"--tau {args.tau} is out of range: it must be above 0")
    settings = train_teacher.start(args, data, "-from-" + "+".join(n.replace(":", "-") for n in names))
    meta = train_teacher.meta_of(data, settings, teachers=names)

    torch.manual_seed(args.seed)
    pretrained = {"no": False, "imagenet": True}.get(args.pretrained, args.pretrained)
    model = models.build_model(args.model, len(data.classes), data.n_frames, pretrained, args.kd_head).to(device)
    optimizer = train_teacher.make_optimizer(model, args)
    start_epoch, first, totals, history = train_teacher.resume(args, model, optimizer)
    train_teacher.begin_run(args, model, meta, history, data, device)
    net = train_teacher.wrap(model, args, device)

    n_steps, saved, asked = train_teacher.steps_of(data, args), time.monotonic(), train_teacher.ask_to_stop()
    for epoch in range(start_epoch, args.epochs + 1):
        began, factor = time.monotonic(), train_teacher.decay_factor(args, epoch, history)
        net.train()
        total = torch.zeros(3, device=device) if totals is None else torch.tensor(totals, device=device)
        fault = torch.full((), math.inf, device=device)
        with evaluate.progress(n_steps * args.batch_size, "clip", f"epoch {epoch}", first * args.batch_size) as bar:
            for step, (x, y, mixed) in enumerate(train_teacher.batches(data, args, epoch, device, first), first):
                train_teacher.set_rate(optimizer, args, factor, (epoch - 1) * n_steps + step)
                seen = prep_data.normalise(mixed, data.mean, data.std) if args.conventional else x
                with evaluate.autocast(device):
                    with torch.no_grad():
                        teacher_logits = [t(seen if (a, b) == (1, 0) else a * seen + b) for t, a, b in teachers]
                    logits, kd_logits = net(x, both=True)
                losses = cmkd_loss(
                    logits, teacher_logits, y, data.task, args.lam, args.tau, kd_logits, args.combine, args.kl
                )
                optimizer.zero_grad(set_to_none=True)
                losses[0].backward()
                fault = train_teacher.first_fault(fault, step, losses[0], model)
                optimizer.step()
                total += torch.stack(losses).detach()
                if bar.update(args.batch_size):
                    train_teacher.check_fault(fault, args, data, epoch, optimizer)
                    loss, loss_g, loss_d = (total / (step + 1)).tolist()
                    bar.set_postfix(loss=f"{loss:.4f}", truth=f"{loss_g:.4f}", teacher=f"{loss_d:.4f}", refresh=False)
                if train_teacher.save_due(saved, asked):
                    train_teacher.check_fault(fault, args, data, epoch, optimizer)
                    train_teacher.save_last(args, model, optimizer, meta, history, step + 1, total)
                    saved = train_teacher.stop_or_go_on(asked, args)
        train_teacher.check_fault(fault, args, data, epoch, optimizer)
        loss, loss_g, loss_d = total / n_steps
        clips = (n_steps - first) * args.batch_size
        parts = {"loss": loss, "loss_g": loss_g, "loss_d": loss_d}
        entry = train_teacher.epoch_entry(epoch, optimizer, clips, began, device, **parts)
        train_teacher.finish_epoch(args, model, optimizer, val, device, meta, history, entry)
        first, totals, saved = 0, None, time.monotonic()
    train_teacher.finish_run(args, history)


if __name__ == "__main__":
    models.command_line(main)
