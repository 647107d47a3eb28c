"""dataset.py: the reader of a prepared folder, the batches of an epoch. prep_data.py on data as people have it: AudioSet's lists,
class folders, odd files; and --check."""

import csv
import json
import pathlib
import resource
import shutil
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import AST, CNN, forked, inside, write_prepared

import dataset
import evaluate
import prep_data
import train_teacher

CPU = torch.device("cpu")
META = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "meta"
RNG = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------------ the reader


def edit(folder, change):
    """Rewrite clips.csv: change(row as a dictionary) edits it, and drops the line if it returns False."""
    with open(folder / "clips.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    kept = [r for r in rows if change(r) is not False]
    dataset.write_csv(folder / "clips.csv", dataset.CLIP_COLUMNS, [r.values() for r in kept])


def settings(data, *flags):
    line = ["--data", str(data.root), "--model", CNN, "--pretrained", "no", *map(str, flags)]
    return train_teacher.resolve(train_teacher.parser("").parse_args(line), data)


def test_a_table_that_somebody_cut_is_used_and_printed(multi, tmp_path, capsys):
    shutil.copytree(multi, tmp_path / "cut")
    whole = dataset.FbankDataset(multi, "train")
    edit(tmp_path / "cut", lambda r: r["id"] not in ("train-0", "train-7"))
    with open(tmp_path / "cut" / "clips.csv", "a") as f:
        f.write("\n")  # an editor's last, empty line
    capsys.readouterr()
    cut, val = (dataset.FbankDataset(tmp_path / "cut", split) for split in ("train", "val"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(str(tmp_path / "cut" / "clips.csv") in s and "edited" in s for s in lines)
    assert len(cut) == 46 and len(val) == 12 and "train-7" not in cut.ids
    assert torch.equal(cut[0][0], whole[1][0]) and torch.equal(cut[6][0], whole[8][0])
    frames = torch.cat([cut[i][0][: cut.frames[i]] for i in range(46)]).double()  # the statistics are of what is left
    assert cut.mean == pytest.approx(frames.mean().item(), abs=1e-9)
    assert cut.std == pytest.approx(frames.std(correction=0).item(), abs=1e-9)


@pytest.mark.parametrize(
    "column, value, words",
    [
        ("labels", "7", r"line 5 .*labels \[7\] of 3 classes"),
        ("labels", "x", "line 5 .*'x'"),
        ("labels", "-2", r"\[-2\]"),
        ("n_frames", "31", "line 5 .*31 of 30 frames"),
        ("row", "74", "row 74"),
    ],
)
def test_an_edit_that_cannot_be_is_one_sentence(multi, tmp_path, column, value, words):
    shutil.copytree(multi, tmp_path / "bad")
    edit(tmp_path / "bad", lambda r: r.update({column: value}) if r["id"] == "train-3" else None)
    with pytest.raises(ValueError, match=words) as error:
        dataset.FbankDataset(tmp_path / "bad", "train")
    assert "clips.csv" in str(error.value) and "\n" not in str(error.value)


def test_a_split_that_nothing_uses_is_said(multi, tmp_path, capsys):
    shutil.copytree(multi, tmp_path / "odd")
    edit(tmp_path / "odd", lambda r: r.update(split="urain") if r["id"] == "train-3" else None)
    assert len(dataset.FbankDataset(tmp_path / "odd", "train")) == 47
    assert "clips.csv has clips of a split 'urain'" in capsys.readouterr().out


@pytest.mark.parametrize("labels", ["", "0;1"])
def test_a_single_label_clip_has_one_label(folds, tmp_path, labels):
    shutil.copytree(folds, tmp_path / "bad")
    edit(tmp_path / "bad", lambda r: r.update(labels=labels) if r["id"] == "2-3" else None)
    with pytest.raises(ValueError, match=r"clips\.csv line .*labels \[.*\] of 3 classes, single-label"):
        dataset.FbankDataset(tmp_path / "bad", "train", 1)


def test_folds_are_numbers(tmp_path):
    folder = write_prepared(tmp_path / "data", {str(k): k for k in range(1, 12)}, False)
    for fold in (1, 10, 11):
        train, held = (dataset.FbankDataset(folder, split, fold) for split in ("train", "eval"))
        assert len(held) == fold and len(train) == 66 - fold and {i.split("-")[0] for i in held.ids} == {str(fold)}
    with pytest.raises(
        ValueError, match="of --fold 12: it has train and eval of --fold 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"
    ):
        dataset.FbankDataset(folder, "train", 12)
    with pytest.raises(ValueError, match="has no split 'train': it has train and eval of --fold 1"):
        dataset.FbankDataset(folder, "train")


def test_audioset_trains_on_both_lists_or_the_balanced_one(tmp_path):
    counts = {"train-balanced": 5, "train-unbalanced": 9, "eval": 3}
    folder = write_prepared(tmp_path / "data", counts, True, source="audioset")
    sizes = {split: len(dataset.FbankDataset(folder, split)) for split in ("train", "train-balanced", "eval")}
    assert sizes == {"train": 14, "train-balanced": 5, "eval": 3}
    for recipe, size in (("audioset", 14), ("audioset-bal", 5)):
        line = ["--data", str(folder), "--model", CNN, "--recipe", recipe]
        train, val = train_teacher.open_data(train_teacher.parser("").parse_args(line))
        assert len(train) == size and val is None
    folder = write_prepared(tmp_path / "balanced", {"train-balanced": 5, "eval": 3}, True, source="audioset")
    flags = ["--data", folder, "--model", CNN, "--pretrained", "no", "--epochs", 1, "--out", tmp_path / "run"]
    assert "AudioSet's balanced part only: use --recipe audioset-bal" in inside("train_teacher.py", *flags)
    assert "epoch  1/1" in inside("train_teacher.py", *flags, "--recipe", "audioset-bal")


def test_more_shards_than_open_files_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD", 1)  # AudioSet has 4,100 shards
    folder = write_prepared(tmp_path / "data", {"train": 290, "eval": 10}, True, shard=1)
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    flags = ["--data", folder, "--model", CNN, "--pretrained", "no", "--epochs", 1, "--batch-size", 145]
    code, output = forked("train_teacher.py", *flags, "--out", tmp_path / "run", before=limit)
    assert code == 0 and "epoch  1/1" in output, output


# ------------------------------------------------------------------------------------------------- batches of an epoch


def test_balanced_sampling_draws_classes_alike_and_depends_on_the_epoch(multi):
    data = dataset.FbankDataset(multi, "train")
    orders = [dataset.epoch_order(data, 0, e, True) for e in range(1, 400)]
    drawn = np.bincount(np.concatenate(orders), minlength=len(data)) / sum(map(len, orders))
    count = (data.labels[:, :, None] == np.arange(3)).sum((0, 1))
    weights = np.array([sum(1 / (count[c] + 0.01) for c in own if c >= 0) for own in data.labels])
    assert np.abs(drawn / (weights / weights.sum()) - 1).max() < 0.15
    plain = [dataset.epoch_order(data, seed, e, False) for seed, e in ((0, 1), (0, 2), (1, 1))]
    assert all(sorted(order) == list(range(len(data))) for order in plain)
    assert len({tuple(o) for o in [*plain, *orders[:2]]}) == 5


def same_batches(a, b):
    return all(torch.equal(u, v) for x, y in zip(a, b, strict=True) for u, v in zip(x, y) if u is not None)


def test_batches_do_not_depend_on_where_one_starts_or_where_clips_lie(multi):
    data = dataset.FbankDataset(multi, "train")
    args = settings(data, "--batch-size", 8)
    args.patchout = [3, 1]
    every = list(dataset.batches(data, args, 3, CPU))
    assert len(every) == 6 and every[0][0].shape == (8, 30, 128) and every[0][1].shape == (8, 3)
    assert same_batches(every[4:], dataset.batches(data, args, 3, CPU, first=4))
    kept = dataset.FbankDataset(multi, "train")
    kept.keep_on(CPU)
    assert kept.cache is not None and same_batches(every, dataset.batches(kept, args, 3, CPU))
    assert not same_batches(every, dataset.batches(data, args, 4, CPU))
    args.seed = 1
    assert not same_batches(every, dataset.batches(data, args, 3, CPU))


def test_torchs_stream_follows_from_the_step(multi):
    """Stochastic depth draws from it: a resumed run must draw what an undisturbed one does, and another step something else."""
    data = dataset.FbankDataset(multi, "train")
    args = settings(data, "--batch-size", 8)
    drawn = []
    for _ in dataset.batches(data, args, 1, CPU):
        drawn.append(torch.rand(4).tolist())
        torch.rand(len(drawn))  # how much a step draws does not matter
    assert [torch.rand(4).tolist() for _ in dataset.batches(data, args, 1, CPU, first=2)] == drawn[2:]
    assert len({tuple(d) for d in drawn}) == 6


@pytest.mark.parametrize("mixup", [0, 0.5, 1])
def test_a_batch_is_what_the_paper_says(multi, mixup):
    """Clips of the epoch's order, partners, masks, noise and shift of `draw`, undone and compared cell by cell."""
    data = dataset.FbankDataset(multi, "train")
    args = settings(data, "--batch-size", 12, "--mixup", mixup, "--freq-mask", 40, "--time-mask", 12)
    units, padded = [], 0
    for step, (x, y, mixed, keep) in enumerate(dataset.batches(data, args, 3, CPU)):
        clips = dataset.epoch_order(data, args.seed, 3, args.balanced)[12 * step : 12 * step + 12]
        rng = np.random.default_rng([args.seed, 3, step + 1])
        d = dataset.draw(rng, 12, len(data), mixup, 40, 12, 30)
        assert keep is None
        for i, (clip, partner, lam) in enumerate(zip(clips, d["partner"], d["lam"].tolist())):
            a, n = data[clip][0].double(), data.frames[clip]
            power = lam**2 * a.exp()
            if lam < 1:
                b = (1 - lam) ** 2 * data[partner][0].double().exp()
                power[: data.frames[partner]] += b[: data.frames[partner]]
            want = power.log().clamp(min=-15.9424)
            want[n:] = 0
            padded += 30 - n
            torch.testing.assert_close(mixed[i].double(), want, atol=1e-4, rtol=0)
            want[:, d["f0"][i] : d["f1"][i]] = 0
            want[d["t0"][i] : d["t1"][i]] = 0
            noise = x[i].double().roll(-int(d["shift"][i]), 0) - (want - data.mean) / (2 * data.std)
            assert noise.min() > -1e-5
            if d["noise"][i] > 0.02:
                units.append((noise / float(d["noise"][i])).float())
            hot = torch.zeros(3)
            for own, share in ((data.labels[clip], lam), (data.labels[partner], 1 - lam)):
                hot += share * torch.tensor([0.9 if c in own else 0.1 / 3 for c in range(3)])
            torch.testing.assert_close(y[i], hot)
        assert (d["lam"] < 1).sum() == {0: 0, 1: 12}.get(mixup, (d["lam"] < 1).sum())
    units = torch.stack(units).flatten(1)  # U(0, 1), another in every cell of every clip
    assert padded and units.max() < 1.001 and abs(units.mean() - 0.5) < 0.01 and abs(units.std() - 12**-0.5) < 0.01
    assert torch.corrcoef(units).fill_diagonal_(0).abs().max() < 0.08
    assert abs(torch.corrcoef(torch.stack([units[:, :-1].flatten(), units[:, 1:].flatten()]))[0, 1]) < 0.01


def test_the_last_short_batch_is_dropped_unless_it_is_the_only_one(multi):
    data = dataset.FbankDataset(multi, "train")
    for size, steps, shape in ((20, 2, 20), (48, 1, 48), (100, 1, 48)):
        args = settings(data, "--batch-size", size)
        every = list(dataset.batches(data, args, 1, CPU))
        assert len(every) == steps == dataset.steps_in_epoch(data, args) and every[0][0].shape[0] == shape


def test_patches_are_drawn_anew_each_step_and_uniformly(multi, toy):
    data = dataset.FbankDataset(multi, "train")
    args = settings(data, "--batch-size", 8)
    args.model, args.patchout = AST, [5, 1]
    grid, drawn = np.arange(24).reshape(12, 2), []
    for epoch in range(1, 25):
        drawn += [keep.tolist() for _, _, _, keep in dataset.batches(data, args, epoch, CPU)]
    for keep in drawn:
        columns = [c for c in range(2) if set(keep) <= set(grid[:, c])]
        assert len(columns) == 1 and len(keep) == 7 and keep == sorted(keep)  # 7 of 12 rows, 1 of 2 columns
    assert len(set(map(tuple, drawn))) > 0.9 * len(drawn)
    share = np.bincount(np.concatenate(drawn), minlength=24) / len(drawn)
    assert np.abs(share - 7 / 24).max() < 0.12


# ---------------------------------------------------------------------------------------------- data as people have it


def sound(path, seconds=0.5, rate=16000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * RNG.standard_normal((int(seconds * rate), channels)), rate)


def prep(root, out, *flags):
    return inside("prep_data.py", "csv", "--root", root, "--out", out, "--clip-seconds", 0.5, "--workers", 1, *flags)


def columns(path):
    rows = [line.split(",") for line in path.read_text().splitlines()]
    return {name: [r[i] for r in rows[1:]] for i, name in enumerate(rows[0])}


def audioset(root):
    root.mkdir()
    (root / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/a,"Speech, loud"\n1,/t/b,"Dog"\n2,/m/c,"Cat"\n'
    )
    head = "# Segments csv created\n# num_ytids=5\n# YTID, start_seconds, end_seconds, positive_labels\n"
    lists = {
        "balanced_train": ["-abcdefghij", "_bcdefghijk", "Ycdefghijkl", "cdefg_12345", "missing_aaa"],
        "unbalanced_train": ["defghijklmn", "missing_bbb"],
        "eval": ["efghijklmno", "fghijklmnop"],
    }
    for name, ids in lists.items():
        lines = [f'{k}, 30.000, 40.000, "{"/m/a,/t/b" if i % 2 else "/m/c"}"\n' for i, k in enumerate(ids)]
        (root / f"{name}_segments.csv").write_text(head + "".join(lines))
    for file in (
        "a/-abcdefghij.wav", "a/b/Y_bcdefghijk.flac", "a/Ycdefghijkl_30.000.wav", "cdefg_12345_30000_40000.wav",
        "x/defghijklmn_30.wav", "Yefghijklmno.wav", "fghijklmnop_30.0-40.0.WAV", "zzzzzzzzzzz.wav",
    ):  # fmt: skip
        sound(root / "audio" / file)


def test_audioset_lists_and_file_names(tmp_path):
    audioset(tmp_path / "AudioSet")
    said = inside(
        "prep_data.py", "audioset", "--root", tmp_path / "AudioSet", "--out", tmp_path / "out", "--workers", 1
    )
    assert "train-balanced: 4 of 5" in said and "train-unbalanced: 1 of 2" in said and "eval: 2 of 2" in said
    clips = columns(tmp_path / "out" / "clips.csv")
    assert clips["id"] == [
        "-abcdefghij",
        "_bcdefghijk",
        "Ycdefghijkl",
        "cdefg_12345",
        "defghijklmn",
        "efghijklmno",
        "fghijklmnop",
    ]
    assert clips["labels"] == ["2", "0;1", "2", "0;1", "2", "2", "0;1"]
    assert sorted(columns(tmp_path / "out" / "skipped.csv")["id"]) == ["missing_aaa", "missing_bbb"]
    both = dataset.FbankDataset(tmp_path / "out", "train")
    assert len(both) == 5 and both.classes == ["Speech, loud", "Dog", "Cat"] and not both.has_val
    assert len(dataset.FbankDataset(tmp_path / "out", "train-balanced")) == 4
    assert (
        len(dataset.FbankDataset(tmp_path / "out", "eval")) == 2 and both.source == "audioset" and both.n_frames == 1000
    )


def test_audioset_lists_are_checked(tmp_path):
    audioset(tmp_path / "a")
    table = tmp_path / "a" / "balanced_train_segments.csv"
    good = table.read_text()
    for bad, words in (
        (good.replace("/m/c", "/m/unknown"), "line 4"),
        (good + good.splitlines()[-1] + "\n", "listed already"),
        (good.replace(', "/m', "")[:-9], "line 4"),
    ):
        table.write_text(bad)
        said = inside("prep_data.py", "audioset", "--root", tmp_path / "a", "--out", tmp_path / "out")
        assert said.startswith("error: ") and words in said and table.name in said
    table.unlink()
    assert table.name in inside("prep_data.py", "audioset", "--root", tmp_path / "a", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not META.exists(), reason=f"no AudioSet lists at {META}")
def test_the_official_audioset_lists(tmp_path, capsys):
    for name in ("balanced_train_segments.csv", "eval_segments.csv", "class_labels_indices.csv"):
        (tmp_path / name).symlink_to(META / f"audioset_{name}")
    for name in ("--4gqARaEJE.wav", "deep/Y--BfvyPmVMo_20.000.flac", "deep/er/-0RWZT-miFs_410000_420000.mp3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    classes, clips = prep_data.audioset(tmp_path)
    assert len(classes) == 527 and [c[2] for c in clips].count("eval") == 20371 and len(clips) == 20371 + 22160
    assert "eval: 3 of 20,371 listed clips found" in capsys.readouterr().out
    assert {c[0] for c in clips if c[1]} == {"--4gqARaEJE", "--BfvyPmVMo", "-0RWZT-miFs"}


def test_class_folders(tmp_path):
    for i in range(10):
        sound(tmp_path / "in" / "a dog's bark" / f"{i}.wav")
        sound(tmp_path / "in" / "Küche" / "deeper" / f"-{i}.flac")
    (tmp_path / "in" / "Küche" / "notes.txt").write_text("no audio")
    said = prep(tmp_path / "in", tmp_path / "out")
    assert "csv: 20 clips of" in said and "80/10/10" in said
    data = {s: dataset.FbankDataset(tmp_path / "out", s) for s in ("train", "val", "eval")}
    assert {s: len(d) for s, d in data.items()} == {"train": 16, "val": 2, "eval": 2}
    assert data["train"].classes == ["Küche", "a dog's bark"] and data["train"].task == "single-label"
    assert all((label == 1) == ("bark" in name) for d in data.values() for name, label in zip(d.ids, d.labels[:, 0]))


def test_class_folders_below_folders_of_splits(tmp_path):
    for split in ("train", "test"):
        for kind in ("a", "b"):
            sound(tmp_path / "in" / split / kind / "1.wav")
    said = prep(tmp_path / "in", tmp_path / "out")
    assert "80/10/10" not in said and "eval 2, train 2" in said
    (tmp_path / "in" / "docs").mkdir()
    assert "2 classes (a, b), single-label" in prep(tmp_path / "in", tmp_path / "o1")
    sound(tmp_path / "in" / "other" / "1.wav")
    assert "beside others" in inside("prep_data.py", "csv", "--root", tmp_path / "in", "--out", tmp_path / "o2")
    (tmp_path / "empty").mkdir()
    assert "no class folders" in inside("prep_data.py", "csv", "--root", tmp_path / "empty", "--out", tmp_path / "o3")


def test_odd_rates_and_channels_stay_small_and_right(tmp_path):
    t = np.arange(44101) / 44101
    x = 0.3 * np.sin(2 * np.pi * 1000 * t)
    want = prep_data.fbank(0.3 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000))
    for rate, channels in ((44101, 1), (11127, 8), (192000, 2), (47999, 1)):
        t = np.arange(rate) / rate
        x = np.repeat(0.3 * np.sin(2 * np.pi * 1000 * t)[:, None], channels, 1)
        soundfile.write(tmp_path / "x.wav", x, rate, subtype="FLOAT")
        got = prep_data.fbank(prep_data.load_audio(tmp_path / "x.wav", 1))
        loud = want > want.max() - 5  # the tone itself
        assert (got - want)[loud].abs().max() < 0.1


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 32000, 44100, 48000, 96000, 192000])
def test_resampling_equals_torchaudio(rate):
    x = torch.randn(rate + 17, generator=torch.Generator().manual_seed(rate))
    want = torchaudio.transforms.Resample(rate, 16000)(x)
    torch.testing.assert_close(prep_data.resampler(rate)(x), want, atol=1e-6, rtol=0)


def test_long_clips_with_many_channels_take_the_memory_of_what_is_kept(tmp_path):
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 96000, 8) as f:
        for _ in range(60):
            f.write(np.zeros((96000, 8), np.int16))
    tracemalloc.start()
    assert len(prep_data.load_audio(tmp_path / "long.flac", 1)) == 16000
    assert tracemalloc.get_traced_memory()[1] < 2 * 1.1 * 96000 * 8 * 4  # bytes; the whole minute is 184 million
    tracemalloc.stop()


def test_clips_that_are_shorter_than_they_say_or_very_short(tmp_path):
    x = 0.1 * np.random.default_rng(0).standard_normal(16000 * 4)
    for ending in ("mp3", "wav", "ogg"):
        path = tmp_path / f"half.{ending}"
        soundfile.write(path, x, 16000)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # the header still says 4 s
        assert 10000 < len(prep_data.load_audio(path, 10)) < 40000
    soundfile.write(tmp_path / "short.wav", x[:480], 16000)
    soundfile.write(tmp_path / "absurd.wav", x, 2**31 - 1)
    assert len(prep_data.fbank(prep_data.load_audio(tmp_path / "short.wav", 10))) == 1
    with pytest.raises(ValueError, match="sample rate of 2147483647 Hz"):
        prep_data.load_audio(tmp_path / "absurd.wav", 10)
    soundfile.write(tmp_path / "pipe.flac", x, 16000)
    whole, content = prep_data.load_audio(tmp_path / "pipe.flac", 10), bytearray((tmp_path / "pipe.flac").read_bytes())
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])  # the number of samples, which ffmpeg leaves 0 in a pipe
    (tmp_path / "pipe.flac").write_bytes(content)
    assert torch.equal(prep_data.load_audio(tmp_path / "pipe.flac", 10), whole) and len(whole) == 64000
    assert torch.equal(torch.cat([y for _, y in evaluate.stream_audio(tmp_path / "pipe.flac", 1, 1)]), whole)
    silence = prep_data.fbank(np.zeros(1600))
    assert silence.shape == (8, 128) and (silence == dataset.FLOOR).all()


def test_check_finds_what_is_wrong(tmp_path):
    for kind in ("a", "b"):
        for i in range(12):
            sound(tmp_path / "in" / kind / f"{i}.wav", 0.4)
    prep(tmp_path / "in", sound_folder := tmp_path / "out")
    assert "is sound: 24 clips, 1 shards" in inside("prep_data.py", "--check", sound_folder)
    shard, table = sound_folder / "fbank-00000.npy", sound_folder / "clips.csv"
    good = {p: p.read_bytes() for p in (shard, table, sound_folder / "stats.json")}
    row = table.read_text().splitlines()[1]

    def faulty(path, content):
        path.write_bytes(content)
        error = inside("prep_data.py", "--check", sound_folder)
        path.write_bytes(good[path])
        assert error.startswith("error: "), error
        return error

    flipped = bytearray(good[shard])
    flipped[5000] ^= 1
    assert "fbank-00000.npy is damaged" in faulty(shard, bytes(flipped))
    assert "fbank-00000.npy is damaged" in faulty(shard, good[shard][:-100])
    stats = json.loads(good[sound_folder / "stats.json"])
    assert "version" in faulty(sound_folder / "stats.json", json.dumps(stats | {"version": 0}).encode())
    assert "task 'MULTI'" in faulty(sound_folder / "stats.json", json.dumps(stats | {"task": "MULTI"}).encode())
    cells = row.split(",")
    for place, value in ((0, "600"), (5, "7"), (6, "60")):  # a row, a class, a frame that is not there
        bad = ",".join([*cells[:place], value, *cells[place + 1 :]])
        assert "clips.csv" in faulty(table, good[table].replace(row.encode(), bad.encode()))
    table.write_bytes(good[table].replace(row.encode() + b"\n", b""))  # an ablation
    said = inside("prep_data.py", "--check", sound_folder)
    assert "clips.csv was edited" in said and "is sound: 23 clips" in said
    shard.unlink()
    assert "missing" in inside("prep_data.py", "--check", sound_folder)
    (sound_folder / "stats.json").unlink()
    assert "is not a prepared folder: run prep_data.py" in inside("prep_data.py", "--check", sound_folder)


@pytest.mark.parametrize("flags", [[], ["csv", "--check", "x"]])
def test_a_dataset_or_check(flags, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["prep_data.py", *flags])
    with pytest.raises(SystemExit, match="2"):
        prep_data.main()
    assert "name a dataset" in capsys.readouterr().err
