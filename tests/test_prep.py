"""prep_data.py: fbank against torchaudio, decoding, the sources, tars, resumption; dataset.py: the reader, the augmentations."""

import csv
import errno
import io
import json
import math
import os
import pathlib
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import command, ended, forked, inside
from torchaudio.compliance import kaldi

import dataset
import evaluate
import prep_data

ROOT = pathlib.Path(prep_data.__file__).resolve().parent
DATA = ROOT.parent / "shared" / "data"
ESC = DATA / "ESC-50"
needs_esc = pytest.mark.skipif(not (ESC / "meta" / "esc50.csv").exists(), reason=f"no ESC-50 at {ESC}")
SHARD = 8  # of the small folders made here
PREP = ("prep_data.py", "csv", "--root")
torch.set_num_threads(1)  # tiny tensors: threads only wait for each other where other work keeps the cores busy


def reference(x, rate=16000):
    """torchaudio's fbank of (samples,) at any rate."""
    x = torchaudio.functional.resample(torch.as_tensor(x, dtype=torch.float32), rate, 16000)
    return kaldi.fbank(
        x[None],
        htk_compat=True,
        sample_frequency=16000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )


def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def main(monkeypatch, *args):
    """The command line in this process (its errors are exceptions here)."""
    monkeypatch.setattr(sys, "argv", ["prep_data.py", *map(str, args)])
    prep_data.main()


# --------------------------------------------------------------------------------------------------------------- fbank


def test_fbank_equals_torchaudio():
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(16000, generator=g) * 2 - 1
    offset = 0.3 + 0.1 * torch.sin(2 * math.pi * 440 * torch.arange(8000) / 16000)
    short = [noise[:400], noise[:559], noise[:560], noise[:561]]
    for x in (noise, 1e-3 * noise, offset, torch.zeros(4000), torch.full((4000,), 0.5), *short):
        ours, theirs = prep_data.fbank(x), reference(x)
        assert ours.shape == theirs.shape and ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
    assert prep_data.fbank(noise.repeat(10)).shape == (998, 128)
    assert torch.all(prep_data.fbank(torch.zeros(4000)) == dataset.FLOOR)
    assert prep_data.fbank(noise[:399]).shape == (0, 128) and prep_data.fbank(noise[:0]).shape == (0, 128)
    torch.testing.assert_close(prep_data.fbank(noise.numpy(), 44100), reference(noise, 44100), atol=2e-3, rtol=0)


@needs_esc
def test_esc10_cache_equals_torchaudio(tmp_path, monkeypatch):
    official = [r for r in read(ESC / "meta" / "esc50.csv") if r["esc10"] == "True"][::13]
    (tmp_path / "meta").mkdir()
    dataset.write_csv(tmp_path / "meta" / "esc50.csv", official[0], (r.values() for r in official))
    (tmp_path / "audio").symlink_to(ESC / "audio")
    main(monkeypatch, "esc10", "--root", tmp_path, "--out", tmp_path / "esc10", "--workers", 2)
    rows = read(tmp_path / "esc10" / "clips.csv")
    shard = np.load(tmp_path / "esc10" / "fbank-00000.npy")
    stats = json.loads((tmp_path / "esc10" / "stats.json").read_text())
    assert shard.dtype == np.float16 and shard.shape == (31, 500, 128) and len(official) == 31
    assert [int(r["row"]) for r in rows] == list(range(31))
    facts = {"task": "single-label", "n_frames": 500, "n_mels": 128, "sample_rate": 16000, "clips": 31, "skipped": 0}
    assert {k: stats[k] for k in facts} == facts and not {"checksum", "listed"} & stats.keys()
    names = [r["display_name"] for r in read(tmp_path / "esc10" / "classes.csv")]
    worst = 0.0
    for x, r, clip in zip(shard, rows, official):
        audio, rate = soundfile.read(ESC / "audio" / r["id"], dtype="float32")
        expected, n = reference(audio, rate), int(r["n_frames"])
        assert n == len(expected) and not x[n:].any()
        own = x[:n].astype(np.float64)
        worst = max(worst, np.abs(own - expected.numpy()).max())
        assert abs(own.mean() - float(r["mean"])) < 1e-6 and abs(own.var() - float(r["var"])) < 1e-6
        found = (r["id"], r["fold"], names[int(r["labels"])], r["split"])
        assert found == (clip["filename"], clip["fold"], clip["category"], "")
    assert worst < 0.008


# ------------------------------------------------------------------------------------------------------------ decoding


def partials(rate, seconds=1.0):
    """48 sines from 150 to 3000 Hz, the same sound at any rate: (samples,) with peak below 0.4."""
    rng = np.random.default_rng(3)
    t = np.arange(round(rate * seconds)) / rate
    return 0.02 * np.sin(2 * np.pi * rng.uniform(150, 3000, 48) * t[:, None] + rng.uniform(0, 6.28, 48)).sum(1)


@pytest.mark.parametrize(
    ("ending", "subtype", "rate", "gains", "tolerance"),
    [
        ("wav", "PCM_16", 16000, [1], 0.01),
        ("wav", "PCM_24", 48000, [0.4, 1.6], 0.01),
        ("wav", "FLOAT", 44100, [0.2, 0.8, 2.0], 0.01),
        ("wav", "PCM_U8", 22050, [1], 0.1),
        ("wav", "PCM_16", 8000, [1.5, 0.5], 0.03),
        ("wav", "PCM_16", 11025, [1], 0.03),
        ("flac", "PCM_16", 32000, [0.4, 1.6], 0.01),
        ("ogg", "VORBIS", 44100, [1.3, 0.7], 0.2),
        ("mp3", "MPEG_LAYER_III", 44100, [1.3, 0.7], 0.2),
        ("mp3", "MPEG_LAYER_III", 16000, [1], 0.2),
    ],
)
def test_every_format_gives_the_same_sound(tmp_path, ending, subtype, rate, gains, tolerance):
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, partials(rate)[:, None] * np.array(gains), rate, subtype=subtype)
    x = prep_data.load_audio(path, 1)
    assert x.dtype == torch.float32 and 15000 < len(x) <= 16000
    ours, expected = prep_data.fbank(x)[5:85], prep_data.fbank(partials(16000))[5:85]
    if ending == "mp3":  # some encoders shift the sound by a few ms: compare what does not depend on it
        ours, expected = ours.exp().mean(0, keepdim=True).log(), expected.exp().mean(0, keepdim=True).log()
    loud = expected > expected.max() - 6
    assert loud.float().mean() > 0.2 and (ours - expected)[loud].abs().mean() < tolerance


def test_only_the_first_seconds_are_kept_as_if_all_were_resampled(tmp_path):
    rng = np.random.default_rng(0)
    for rate in (8000, 16000, 44100):
        x = rng.uniform(-0.5, 0.5, 3 * rate).astype(np.float32)
        soundfile.write(tmp_path / "long.wav", x, rate, subtype="FLOAT")
        whole = torchaudio.functional.resample(torch.from_numpy(x), rate, 16000)
        cut = prep_data.load_audio(tmp_path / "long.wav", 1.25)
        assert cut.shape == (20000,)
        torch.testing.assert_close(cut, whole[:20000], atol=1e-5, rtol=0)
        assert len(prep_data.load_audio(tmp_path / "long.wav", 10)) == 48000


@pytest.mark.skipif(not (DATA / "ogg-44k").exists(), reason=f"no ogg files at {DATA / 'ogg-44k'}")
def test_published_ogg_files_through_the_csv_command(tmp_path):
    paths = sorted((DATA / "ogg-44k").glob("*.ogg"))[:20]
    table = write(tmp_path / "clips.csv", "path,labels", *(f"{p},{'ab'[i % 2]}" for i, p in enumerate(paths)))
    assert "80/10/10" in inside(*PREP, table, "--out", tmp_path / "out", "--clip-seconds", 3, "--workers", 2)
    rows, shard = read(tmp_path / "out" / "clips.csv"), np.load(tmp_path / "out" / "fbank-00000.npy")
    assert len(rows) == 20 and shard.shape == (20, 300, 128)
    assert sorted(r["split"] for r in rows) == ["eval"] * 2 + ["train"] * 16 + ["val"] * 2
    for x, r in zip(shard, rows):
        audio, rate = soundfile.read(r["path"], dtype="float32", always_2d=True)
        expected = reference(torchaudio.functional.resample(torch.from_numpy(audio.mean(1)), rate, 16000)[:48000])
        assert rate == 44100 and int(r["n_frames"]) == 298 and not x[298:].any()
        error = np.abs(x[:298] - expected.numpy())
        assert error.mean() < 0.004 and error.max() < 0.2  # the largest in cells next to silence


# ----------------------------------------------------------------------------------------------------- anybody's table


def test_table_labels_paths_and_splits(tmp_path):
    table = write(
        tmp_path / "t.csv",
        "path,labels,split,fold",
        "a.wav, dog ;cat,Train,",
        f"{tmp_path}/else/b.wav,dog;dog,valid,",
        "sub/c.wav,,validation,",
        "d.wav,zebra,TEST,",
        "e.wav,cat,eval,",
    )
    classes, clips = prep_data.own_table(table)
    assert classes == [("", "cat"), ("", "dog"), ("", "zebra")]
    assert [c[1:5] for c in clips] == [
        (f"{tmp_path}/a.wav", "train", "", [0, 1]),
        (f"{tmp_path}/else/b.wav", "val", "", [1]),
        (f"{tmp_path}/sub/c.wav", "val", "", []),
        (f"{tmp_path}/d.wav", "eval", "", [2]),
        (f"{tmp_path}/e.wav", "eval", "", [0]),
    ]


def test_task_is_detected_or_given(tmp_path, monkeypatch):
    for name in "abcd":
        soundfile.write(tmp_path / f"{name}.wav", partials(16000, 0.3), 16000)
    rows = ["b.wav,two,train", "c.wav,one,eval", "d.wav,two,eval"]
    one = write(tmp_path / "one.csv", "path,labels,split", "a.wav,one,train", *rows)
    several = write(tmp_path / "several.csv", "path,labels,split", "a.wav,one;two,train", *rows)

    def task(name, *args):
        main(monkeypatch, "csv", "--out", tmp_path / name, "--workers", 1, "--clip-seconds", 0.5, *args)
        ds = dataset.FbankDataset(tmp_path / name, "train")
        return ds.task, ds.n_frames, len(read(tmp_path / name / "clips.csv"))

    assert task("one", "--root", one) == ("single-label", 50, 4)
    assert task("several", "--root", several) == ("multi-label", 50, 4)
    assert task("asked", "--root", one, "--task", "multi-label") == ("multi-label", 50, 4)
    with pytest.raises(ValueError, match="single-label.*'a.wav' has 2 labels"):
        task("refused", "--root", several, "--task", "single-label")
    assert not (tmp_path / "refused").exists()


def test_made_split_is_stratified_and_reproducible(tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines = [f"{i}.wav,{';'.join(rng.choice(list('abcdefgh'), rng.integers(1, 4), replace=False))}" for i in range(400)]
    lines += [f"r{i}.wav,rare" for i in range(10)]
    table = write(tmp_path / "t.csv", "path,labels", *lines)
    classes, clips = prep_data.own_table(table)
    assert "80/10/10" in capsys.readouterr().out
    assert clips == prep_data.own_table(table)[1]
    splits = np.array([c.split for c in clips])
    has = np.array([[k in c.labels for k in range(len(classes))] for c in clips])
    for split, share in (("train", 0.8), ("val", 0.1), ("eval", 0.1)):
        assert abs((splits == split).mean() - share) < 0.02
        per_class = has[splits == split].sum(0)
        assert np.all(np.abs(per_class - share * has.sum(0)) < 2.5 + 0.02 * has.sum(0)), (split, per_class)
    assert [(splits[400:] == s).sum() for s in ("train", "val", "eval")] == [8, 1, 1]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["file,labels", "a.wav,x"], r"bad\.csv has no column 'path'"),
        (["path,tags", "a.wav,x"], r"bad\.csv has no column 'labels'"),
        (["path,labels"], r"bad\.csv has no rows"),
        (["path,labels,split", "a.wav,x,train", "b.wav,x,dev"], r"bad\.csv line 3: unknown split 'dev'"),
        (["path,labels,fold", "a.wav,x,1", "b.wav,x,2.5"], r"bad\.csv line 3: fold '2\.5'"),
        (["path,labels,fold", "a.wav,x,1", "b.wav,x,1"], r"fold 1"),
        (["path,labels", "a.wav,x", "b.wav,x", "a.wav,y"], r"clip '.*/a\.wav' is listed 2 times"),
        (["path,labels,split", "a.wav,x,train", "b.wav,x,eval", "c.wav,x,"], r"bad\.csv line 4: no split"),
        (["path,labels,fold", "a.wav,x,", "b.wav,x,1"], r"bad\.csv line 2: no fold"),
        (["path,labels", "a.wav,x", "b.wav"], r"bad\.csv line 3"),
        (["path,labels,split", "a.wav,x,val", "b.wav,x,eval"], "no clip has split 'train'"),
        (["path,labels,split", "a.wav,x,val", "b.wav,x,train"], "no clip has split 'eval'"),
        (["path,labels", *(f"{i}.wav,{'xyz'[i % 3]}" for i in range(9))], "no clip has split 'eval'"),  # made: too few
        (["path,split,labels", 'a.wav,train,"x', "b.wav,eval,x"], r"bad\.csv is not a table in UTF-8"),  # no end quote
        (["path,labels", "a.wav,x", ",y"], r"bad\.csv line 3 has no path"),
        (["path,labels,labels", "a.wav,x,y"], r"bad\.csv has 2 column 'labels'"),
        (["path,labels,fold,Fold", "a.wav,x,1,2"], r"bad\.csv has 2 column 'fold'"),
        (["path,labels,split", "a.wav,x,train", "./a.wav,x,eval"], r"clip .*a\.wav' is listed 2 times"),
        (["path,labels,split", "a.wav,x,train", "b.wav,,eval"], r"clip 'b\.wav' has no label, and none has two"),
        (["path,labels,split", "a.wav,x,train", '"b\r.wav",x,eval'], "or has a line break: rename it"),
    ],
)
def test_a_bad_table_is_refused_before_any_audio_is_read(tmp_path, monkeypatch, lines, says):
    pool = lambda *args, **kwargs: pytest.fail("audio was read")
    monkeypatch.setattr(prep_data.concurrent.futures, "ProcessPoolExecutor", pool)
    table = write(tmp_path / "bad.csv", *lines)
    with pytest.raises(ValueError, match=says) as error:
        main(monkeypatch, "csv", "--root", table, "--out", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_table_in_the_prepared_folder_is_not_overwritten(tmp_path):
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", partials(16000, 0.3), 16000)
    table = write(tmp_path / "clips.csv", "path,labels,split", "a.wav,x,train", "b.wav,y,eval")
    before = table.read_text()
    assert "holds a clips.csv without a stats.json: give another --out" in inside(*PREP, table, "--out", tmp_path)
    assert table.read_text() == before


def test_a_split_that_cannot_be_read_is_an_error(tmp_path):
    for i in range(20):
        soundfile.write(tmp_path / f"{i}.wav", partials(16000, 0.1), 16000)
    (tmp_path / "20.wav").write_bytes(b"")
    rows = (f"{i}.wav,{'xy'[i % 2]},{'train' if i < 20 else 'eval'}" for i in range(21))
    table = write(tmp_path / "t.csv", "path,labels,split", *rows)
    said = inside(*PREP, table, "--out", tmp_path / "out", "--clip-seconds", 0.5, "--workers", 1)
    assert "no clip has split 'eval'" in said and not (tmp_path / "out" / "stats.json").exists()


def test_folders_without_audio_are_no_classes_and_links_are_followed(tmp_path, capsys):
    for place in ("Training/cat", "Training/dog", "Training/none", "testing/cat", "testing/dog", "disk/deep"):
        (tmp_path / "in" / place if place[0] != "d" else tmp_path / place).mkdir(parents=True)
    for place in ("in/Training/cat", "in/Training/dog", "in/testing/cat", "in/testing/dog", "disk/deep"):
        soundfile.write(tmp_path / place / "1.WAV", partials(16000, 0.1), 16000, format="WAV")
    (tmp_path / "in" / "Training" / "dog" / "more").symlink_to(tmp_path / "disk")
    for name in ("Training/none/readme.txt", "Training/top.wav"):
        (tmp_path / "in" / name).touch()
    classes, clips = prep_data.class_folders(tmp_path / "in")
    assert f"2 files of {tmp_path / 'in'} are left out" in capsys.readouterr().out
    assert [name for _, name in classes] == ["cat", "dog"]
    assert [(c.id, c.split, c.labels) for c in clips] == [
        ("Training/cat/1.WAV", "train", [0]), ("Training/dog/1.WAV", "train", [1]),
        ("Training/dog/more/deep/1.WAV", "train", [1]), ("testing/cat/1.WAV", "eval", [0]), ("testing/dog/1.WAV", "eval", [1]),
    ]  # fmt: skip
    (tmp_path / "us8k" / "metadata").mkdir(parents=True)
    for fold in ("fold1", "fold10"):
        (tmp_path / "us8k" / "audio" / fold).mkdir(parents=True)
        soundfile.write(tmp_path / "us8k" / "audio" / fold / "a.wav", partials(16000, 0.1), 16000)
    for root in (tmp_path / "us8k", tmp_path / "us8k" / "audio"):
        with pytest.raises(ValueError, match=f"{root} holds no class folders with audio"):
            prep_data.class_folders(root)


def test_a_link_to_a_folder_that_holds_it_is_not_followed(tmp_path):
    for name in ("robin", "wren"):
        (tmp_path / "birds" / name).mkdir(parents=True)
        soundfile.write(tmp_path / "birds" / name / "1.wav", partials(16000, 0.1), 16000)
    for place, target in (
        ("birds", tmp_path / "birds"),
        ("wren/up", tmp_path),
        ("wren/here", tmp_path / "birds" / "wren"),
    ):
        (tmp_path / "birds" / place).symlink_to(target)
    (tmp_path / "link").symlink_to(tmp_path / "birds")
    for root in (tmp_path / "birds", tmp_path / "link"):
        classes, clips = prep_data.class_folders(root)
        assert [name for _, name in classes] == ["robin", "wren"]
        assert [c.id for c in clips] == ["robin/1.wav", "wren/1.wav"]


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path):
    forms = "Be\u0301cassine", "B\u00e9cassine"
    assert prep_data.one_form(" a\rb ") == "a b"  # Python's csv would not quote it
    table = write(tmp_path / "t.csv", "path,labels,Fold", f"a.wav,{forms[0]},1", f"b.wav,{forms[1]},2")
    classes, clips = prep_data.own_table(table)
    assert classes == [("", forms[1])] and [(c.labels, c.fold) for c in clips] == [([0], 1), ([0], 2)]
    for split, form in zip(("train", "eval"), forms):
        for name in (form, "other"):
            (tmp_path / "in" / split / name).mkdir(parents=True)
            soundfile.write(tmp_path / "in" / split / name / "1.wav", partials(16000, 0.1), 16000)
    classes, clips = prep_data.class_folders(tmp_path / "in")
    assert classes == [("", forms[1]), ("", "other")] and len(clips) == 4


def test_hidden_folders_are_no_classes(tmp_path):
    for place in ("train/cat", "train/dog", "train/dog/.cache", "train/.ipynb_checkpoints", "eval/cat", "eval/dog"):
        (tmp_path / place).mkdir(parents=True)
        soundfile.write(tmp_path / place / "1.wav", partials(16000, 0.1), 16000)
    classes, clips = prep_data.class_folders(tmp_path)
    assert [name for _, name in classes] == ["cat", "dog"] and len(clips) == 4


# ------------------------------------------------------------------------------------------------ ESC-50, FSD50K, flags


def test_esc_layout(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "audio").mkdir()
    lines = []
    for i, (target, name) in enumerate([(0, "dog"), (14, "birds"), (40, "helicopter"), (1, "rooster")] * 2):
        soundfile.write(tmp_path / "audio" / f"{i}.wav", partials(16000, 0.5 + i / 10), 16000)
        yes = "TRUE" if i % 2 else "True"  # TRUE: as Excel saves it
        lines.append(f"{i}.wav,{1 + i // 4},{target},{name},{'False' if name == 'birds' else yes},s,A")
    write(tmp_path / "meta" / "esc50.csv", "filename,fold,target,category,esc10,src_file,take", *lines)
    inside("prep_data.py", "esc10", "--root", tmp_path, "--out", tmp_path / "out", "--workers", 1)
    rows = read(tmp_path / "out" / "clips.csv")
    assert [r["display_name"] for r in read(tmp_path / "out" / "classes.csv")] == ["dog", "rooster", "helicopter"]
    assert [(r["id"], r["fold"], r["labels"], r["split"]) for r in rows] == [
        (f"{i}.wav", str(1 + i // 4), str(k), "") for i, k in [(0, 0), (2, 2), (3, 1), (4, 0), (6, 2), (7, 1)]
    ]
    assert [int(r["n_frames"]) for r in rows] == [48 + 10 * i for i in (0, 2, 3, 4, 6, 7)]
    train, test = (dataset.FbankDataset(tmp_path / "out", s, fold=2) for s in ("train", "eval"))
    assert (train.task, train.n_frames, train.has_val) == ("single-label", 500, False)
    assert train.ids == ("0.wav", "2.wav", "3.wav") and test.ids == ("4.wav", "6.wav", "7.wav")
    classes, clips = prep_data.esc(tmp_path, ten=False)
    assert [name for _, name in classes] == ["dog", "rooster", "birds", "helicopter"] and len(clips) == 8


def test_fsd50k_layout(tmp_path):
    truth = tmp_path / "FSD50K.ground_truth"
    for folder in ("FSD50K.dev_audio", "FSD50K.eval_audio", "FSD50K.ground_truth"):
        (tmp_path / folder).mkdir()
    for part, name in (("dev", 11), ("dev", 12), ("dev", 13), ("eval", 21), ("eval", 22)):
        soundfile.write(tmp_path / f"FSD50K.{part}_audio" / f"{name}.wav", partials(44100, 0.5), 44100)
    header = "index,name,mid"  # the official file has none
    write(truth / "vocabulary.csv", header, "0,Bark,/m/b", "1,Dog,/m/d", "2,Music,/m/m")
    write(
        truth / "dev.csv",
        "fname,labels,mids,split",
        '11,"Dog,Bark","/m/d,/m/b",train',
        "12,Music,/m/m,val",
        "13,Music,/m/m,train",
    )
    write(truth / "eval.csv", "fname,labels,mids", '21,"Bark,Dog","/m/b,/m/d"', "22,Music,/m/m")
    inside("prep_data.py", "fsd50k", "--root", tmp_path, "--out", tmp_path / "out", "--workers", 1)
    assert [(r["index"], r["mid"], r["display_name"]) for r in read(tmp_path / "out" / "classes.csv")] == [
        ("0", "/m/b", "Bark"),
        ("1", "/m/d", "Dog"),
        ("2", "/m/m", "Music"),
    ]
    rows = read(tmp_path / "out" / "clips.csv")
    assert [(r["id"], r["split"], r["fold"], r["labels"], r["n_frames"]) for r in rows] == [
        ("11", "train", "", "0;1", "48"),
        ("12", "val", "", "2", "48"),
        ("13", "train", "", "2", "48"),
        ("21", "eval", "", "0;1", "48"),
        ("22", "eval", "", "2", "48"),
    ]
    ds = dataset.FbankDataset(tmp_path / "out", "train")
    assert (ds.task, ds.n_frames, ds.has_val, ds.classes) == ("multi-label", 1000, True, ["Bark", "Dog", "Music"])
    write(truth / "eval.csv", "fname,labels,mids", "21,Bark,/m/b", "22,Owl,/m/owl")
    with pytest.raises(ValueError, match=r"eval\.csv line 3.*/m/owl.*vocabulary"):
        prep_data.fsd50k(tmp_path)


def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys):
    nowhere = tmp_path / "nowhere"
    monkeypatch.setattr(sys, "argv", ["prep_data.py", "esc50", "--root", str(nowhere), "--out", str(tmp_path / "out")])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=f"error: {nowhere}/meta/esc50.csv is missing: is --root right"):
        runpy.run_path(str(ROOT / "prep_data.py"), run_name="__main__")
    for args, says in (
        (["fsd50k", "--root", tmp_path], r"vocabulary\.csv is missing.*--root"),
        (["esc10", "--root", tmp_path], r"esc50\.csv is missing.*--root"),
        (["audioset"], "cannot be downloaded: it needs --root"),
        (["csv"], "needs --root"),
        (["demo", "--workers", 0], "--workers 0"),
        (["demo", "--clip-seconds", 0], r"--clip-seconds 0 is out of range \[0.16, 3600\]"),
    ):
        with pytest.raises((ValueError, OSError), match=says):
            main(monkeypatch, *args, "--out", tmp_path / "out")
    with pytest.raises(SystemExit) as leaves:
        main(monkeypatch, "esc51", "--root", tmp_path)
    assert leaves.value.code == 2 and "invalid choice: 'esc51'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- a small folder; bytes and interruption


def set_sizes(patch):
    """Shards of 8 clips, so that a few clips fill several."""
    for module, name, size in ((prep_data, "SHARD", SHARD), (dataset, "SHARD", SHARD), (prep_data, "CHUNK", 2)):
        patch.setattr(module, name, size)


@pytest.fixture
def small_shards(monkeypatch):
    set_sizes(monkeypatch)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(table, prepared folder, what was printed): 26 clips of 0.3 to 1.3 s, kept to 1 s, 3 folds, 4 shards, one broken."""
    root = tmp_path_factory.mktemp("small")
    rng, lines = np.random.default_rng(5), ["path,labels,fold"]
    for i in range(26):
        x = rng.normal(0, 10 ** rng.uniform(-3, -1), round(16000 * (0.3 + i / 25)))
        soundfile.write(root / f"{i:02d}.wav", x, 16000)
        lines.append(f"{i:02d}.wav,{['a', 'a;b', 'c', '', 'a;b;c'][i % 5]},{i % 3 + 1}")
    (root / "11.wav").write_bytes(b"RIFF no sound")
    table = write(root / "clips.csv", *lines)
    with pytest.MonkeyPatch.context() as patch:
        set_sizes(patch)
        main(patch, "csv", "--root", table, "--out", root / "prepared", "--clip-seconds", 1, "--workers", 2)
    return table, root / "prepared"


def resume(monkeypatch, table, out, workers):
    set_sizes(monkeypatch)
    main(monkeypatch, "csv", "--root", table, "--out", out, "--clip-seconds", 1, "--workers", workers)


def test_bytes_do_not_depend_on_the_workers(small, tmp_path, monkeypatch):
    table, out = small
    resume(monkeypatch, table, tmp_path / "one", 1)
    assert files(tmp_path / "one") == files(out)
    tables = ["classes.csv", "clips.csv", "skipped.csv", "stats.json"]
    assert sorted(files(out)) == sorted([*tables, *(f"fbank-{s:05d}.npy" for s in range(4))])


@pytest.fixture(scope="module")
def killed(small, tmp_path_factory):
    """(folder whose preparation was killed when its third shard was in place without its note, has it left workers)."""
    out, (reads, writes) = tmp_path_factory.mktemp("killed") / "prepared", os.pipe()
    rename = os.replace

    def rename_or_die(a, b):
        if str(b).endswith("fbank-00002.json"):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(a, b)

    def before():
        os.replace = rename_or_die
        set_sizes(pytest.MonkeyPatch())

    flags = ["--out", out, "--clip-seconds", 1, "--workers", 1]
    child, output = forked(*PREP, small[0], *flags, before=before, wait=False)
    os.close(writes)  # the pipe ends when none of them is left
    code, said = ended(child, output)
    assert code == -signal.SIGKILL, said
    left = not select.select([reads], [], [], 10)[0]
    if left:
        os.killpg(child, signal.SIGKILL)
    os.close(reads)
    return out, left


def test_a_killed_preparation_leaves_no_workers_behind(killed):
    assert not killed[1], "worker processes outlived the preparation"


def test_a_killed_preparation_resumes_to_the_same_bytes(small, killed, tmp_path, monkeypatch, capsys):
    (table, whole), out = small, tmp_path / "prepared"
    shutil.copytree(killed[0], out)
    done = [note.with_suffix(".npy") for note in out.glob("fbank-*.json")]
    assert done and (out / "fbank-00002.npy") not in done and (out / "fbank-00002.npy").exists()
    assert all(shard.read_bytes() == (whole / shard.name).read_bytes() for shard in done)
    assert not (out / "stats.json").exists()
    with pytest.raises(FileNotFoundError, match="not complete"):
        dataset.FbankDataset(out, "train", fold=1)
    other = write(table.with_name("other.csv"), *table.read_text().splitlines()[:-1])
    with pytest.raises(ValueError, match="holds other clips or other settings"):
        resume(monkeypatch, other, out, 1)
    before = {
        shard: os.stat(shard) for shard in done
    }  # that of fbank-00001.npy has a broken clip, which is tried again
    resume(monkeypatch, table, out, 2)
    assert files(out) == files(whole)
    for shard, was in before.items():  # kept, not made again
        assert (os.stat(shard).st_ino, os.stat(shard).st_mtime_ns) == (was.st_ino, was.st_mtime_ns)
    capsys.readouterr()
    (out / "fbank-00003.json").write_text("{}")  # as if killed between stats.json and the removal of the notes
    resume(monkeypatch, table, out, 1)
    assert "nothing to do" in capsys.readouterr().out and files(out) == files(whole)
    with pytest.raises(ValueError, match="holds other clips or other settings"):
        resume(monkeypatch, other, out, 1)
    assert files(out) == files(whole)


def test_a_shard_that_somebody_removed_is_made_again(small, killed, tmp_path, monkeypatch):
    shutil.copytree(killed[0], tmp_path / "prepared")
    for shard in (tmp_path / "prepared").glob("fbank-*.npy"):
        shard.unlink()
    resume(monkeypatch, small[0], tmp_path / "prepared", 1)
    assert files(tmp_path / "prepared") == files(small[1])


def test_a_killed_worker_is_one_sentence(small, tmp_path, monkeypatch):
    monkeypatch.setattr(prep_data, "load_audio", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ValueError, match="a worker process was killed: run the same command again"):
        resume(monkeypatch, small[0], tmp_path / "out", 2)
    assert not list((tmp_path / "out").iterdir()), "half a shard is left"
    monkeypatch.undo()
    resume(monkeypatch, small[0], tmp_path / "out", 2)
    assert files(tmp_path / "out") == files(small[1])


def test_a_full_disk_is_one_sentence(small, tmp_path, monkeypatch):
    def full(path, mode="r", **options):
        if mode == "rb+":
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(prep_data, "open", full, raising=False)
        with pytest.raises(
            OSError, match=r"fbank-00000\.npy could not be written \(No space left on device\): free some"
        ):
            resume(monkeypatch, small[0], tmp_path / "out", 1)
    assert not list((tmp_path / "out").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
        with pytest.raises(OSError, match=r"out has 0\.0 GB free, its shards need 0\.0: give --out on a larger disk"):
            resume(monkeypatch, small[0], tmp_path / "out", 1)
    resume(monkeypatch, small[0], tmp_path / "out", 1)
    assert files(tmp_path / "out") == files(small[1])


def test_a_folder_that_cannot_be_written_is_one_sentence(small):
    for out in ("/proc/self/out", "/proc/self"):
        said = inside(*PREP, small[0], "--out", out, "--clip-seconds", 1, "--workers", 1)
        assert said.startswith("error: ") and "/proc/self" in said and "\n" not in said


def test_one_broken_clip_is_named_and_left_out(small):
    table, out = small
    [skipped] = read(out / "skipped.csv")
    assert (skipped["id"], skipped["path"]) == ("11.wav", str(table.with_name("11.wav"))) and skipped["reason"]
    rows = read(out / "clips.csv")
    assert [int(r["row"]) for r in rows] == [i for i in range(26) if i != 11]
    stats = json.loads((out / "stats.json").read_text())
    assert (stats["clips"], stats["skipped"], len(stats["crc32"])) == (25, 1, 4)


def test_many_broken_clips_are_an_error_that_keeps_the_work(tmp_path, monkeypatch):
    good = partials(16000, 0.3)
    for i in range(12):
        soundfile.write(tmp_path / f"{i}.wav", good, 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan, np.float32), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", good[:399], 16000)
    soundfile.write(tmp_path / "nothing.wav", good[:0], 16000)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.mp3").write_text("not a sound\n" * 100)
    soundfile.write(tmp_path / "huge.wav", np.eye(1, 8000, dtype=np.float32)[0] * 1e25, 16000, subtype="FLOAT")
    names = [f"{i}.wav" for i in range(12)]
    names += ["nan.wav", "short.wav", "nothing.wav", "empty.wav", "text.mp3", "missing.wav", "huge.wav"]
    table = write(tmp_path / "t.csv", "path,labels,fold", *(f"{n},x,{i % 2}.0" for i, n in enumerate(names)))  # pandas
    for _ in range(2):  # the second run finds its shards and says the same
        with pytest.raises(
            ValueError,
            match="7 of 19 clips could not be read.*nan.wav.*finite.*skipped.csv.*same command reads them again",
        ):
            main(monkeypatch, "csv", "--root", table, "--out", tmp_path / "out", "--workers", 1, "--clip-seconds", 1)
        reasons = {r["id"]: r["reason"] for r in read(tmp_path / "out" / "skipped.csv")}
        assert list(reasons) == names[12:] and all(reasons.values())
        assert "absurd size" in reasons["huge.wav"]
        assert "25 ms" in reasons["short.wav"] and "no samples" in reasons["nothing.wav"]
        shard = np.load(tmp_path / "out" / "fbank-00000.npy")
        assert (shard[:12, :28] != 0).any((1, 2)).all() and not shard[12:].any()
    with pytest.raises(FileNotFoundError, match="not complete"):
        dataset.FbankDataset(tmp_path / "out", "train", fold=1)
    for name in names[12:]:  # fixed: the same command reads them, and the folder is as if nothing had been wrong
        soundfile.write(tmp_path / name, good, 16000)
    flags = ["--root", table, "--workers", 1, "--clip-seconds", 1]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # killed with the shard half-mended
        patch.setattr(prep_data, "crc32", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        main(patch, "csv", *flags, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").glob("fbank-*.json"))
    for out in ("out", "fresh"):
        main(monkeypatch, "csv", *flags, "--out", tmp_path / out)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    assert len(read(tmp_path / "out" / "clips.csv")) == 19


# ------------------------------------------------------------------------------------------------- long files, by windows


@pytest.mark.parametrize("rate", [8000, 16000, 16001, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_windows_of_a_long_file_equal_the_whole(tmp_path, rate, channels):
    rng = np.random.default_rng(rate)
    x = rng.uniform(-0.5, 0.5, (round(10.31 * rate), channels)).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", x, rate, subtype="FLOAT" if channels == 1 else "PCM_16")
    whole = prep_data.load_audio(tmp_path / "x.wav", 1000)
    for window, hop in ((2.0, 2.0), (3.0, 0.77), (0.5, 3.0), (10.0, 1.0), (20.0, 5.0)):
        found = list(evaluate.stream_audio(tmp_path / "x.wav", window, hop))
        for i, (start, samples) in enumerate(found):
            at = round(i * hop * 16000)
            assert start == at / 16000 and samples.dtype == torch.float32
            torch.testing.assert_close(samples, whole[at : at + round(window * 16000)], atol=1e-6, rtol=0)
        if hop <= window:
            assert at + len(samples) == len(whole) and all(len(s) == window * 16000 for _, s in found[:-1])
        assert len(found) == {2.0: 6, 3.0: 11, 0.5: 4, 10.0: 2, 20.0: 1}[window]


def test_raw_audio_is_named(tmp_path):
    (tmp_path / "bare.raw").write_bytes(bytes(8000))
    with pytest.raises(ValueError, match="audio without a header: convert it to WAV"):
        prep_data.load_audio(tmp_path / "bare.raw", 1)


def test_windows_of_odd_files(tmp_path):
    stream = lambda n, window=1.0, hop=1.0: list(evaluate.stream_audio(sound(n), window, hop))

    def sound(n):
        soundfile.write(tmp_path / "x.flac", np.full(n, 0.1), 16000)
        return tmp_path / "x.flac"

    assert [(s, len(x)) for s, x in stream(32000)] == [(0, 16000), (1, 16000)]  # it ends with the window
    assert [(s, len(x)) for s, x in stream(32399)] == [(0, 16000), (1, 16000)]  # less than a frame is left
    assert [(s, len(x)) for s, x in stream(32400)] == [(0, 16000), (1, 16000), (2, 400)]
    assert [len(x) for _, x in stream(400, 10.0, 10.0)] == [400]
    with pytest.raises(ValueError, match="shorter than one frame"):
        stream(399)
    with pytest.raises(FileNotFoundError):
        next(evaluate.stream_audio(tmp_path / "gone.wav", 1, 1))
    x = np.zeros(5 * 16000, np.float32)
    x[-1] = np.nan
    soundfile.write(tmp_path / "nan.wav", x, 16000, subtype="FLOAT")
    windows = evaluate.stream_audio(tmp_path / "nan.wav", 1, 1)
    assert next(windows)[0] == 0
    with pytest.raises(ValueError, match="not finite"):
        list(windows)


# ------------------------------------------------------------------------------------------------------ tables of people


def test_a_table_as_excel_saves_it(tmp_path):
    plain = write(
        tmp_path / "t.csv", "path,labels,split,fold", '"a,1.wav",dog;cat,train,', "ü.wav,,eval,", "c.wav,dog,val,"
    )
    rows = 'path;labels;split;fold\r\na,1.wav;"dog;cat";train;\r\nü.wav;;eval;\r\nc.wav;dog;val;\r\n;;;\r\n'
    (tmp_path / "excel.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    assert prep_data.own_table(tmp_path / "excel.csv") == prep_data.own_table(plain)
    (tmp_path / "excel.csv").write_bytes(rows.encode("cp1252"))  # 'CSV', not 'CSV UTF-8'
    with pytest.raises(ValueError, match=r"excel\.csv is not a table in UTF-8 .*save it as 'CSV UTF-8'"):
        prep_data.own_table(tmp_path / "excel.csv")
    (tmp_path / "excel.csv").write_bytes(rows.encode("utf-16"))  # 'Unicode text'
    with pytest.raises(ValueError, match=r"excel\.csv is not a table in UTF-8"):
        prep_data.own_table(tmp_path / "excel.csv")


def test_any_name_in_any_locale(tmp_path):
    """Commas, quotes, newlines and letters of other scripts in names of classes and files; the locale is plain ASCII."""
    names = ["dog, big", 'say "cat"', "two\nlines", "Küche 厨房"]
    rows = [[f"clip é{i}.wav", f"{names[i % 4]};{names[0]}", ("train", "eval")[i // 4]] for i in range(8)]
    for path, _, _ in rows:
        soundfile.write(tmp_path / path, partials(16000, 0.3), 16000)
    dataset.write_csv(tmp_path / "tâble.csv", ["path", "labels", "split"], rows)
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    flags = ["--workers", 1, "--clip-seconds", 0.5]
    said = command(*PREP, tmp_path / "tâble.csv", "--out", tmp_path / "öut", *flags, env=env)
    assert f"wrote {tmp_path / 'öut'}: train 4, eval 4" in said
    data = dataset.FbankDataset(tmp_path / "öut", "eval")
    assert data.classes == sorted(names) and data.ids == tuple(f"clip é{i}.wav" for i in range(4, 8))
    assert [r["path"] for r in read(tmp_path / "öut" / "clips.csv")] == [
        str(tmp_path / f"clip é{i}.wav") for i in range(8)
    ]
    assert not read(tmp_path / "öut" / "skipped.csv")


def test_a_file_name_that_is_not_utf8_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        soundfile.write(tmp_path / "in" / name / "1.wav", partials(16000, 0.3), 16000)
    os.rename(tmp_path / "in" / "b" / "1.wav", os.fsencode(tmp_path / "in" / "b") + b"/caf\xe9.wav")
    said = inside(*PREP, tmp_path / "in", "--out", tmp_path / "out")
    assert "caf\\udce9.wav' is not UTF-8, or has a line break: rename it" in said and not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- AudioSet in tar archives


def audioset_lists(root):
    """AudioSet's lists of 4 + 3 + 5 clips of two classes."""
    root.mkdir()
    write(root / "class_labels_indices.csv", "index,mid,display_name", "0,/m/a,Speech", "1,/m/b,Dog")
    for name, ids in (("balanced_train", "abcd"), ("unbalanced_train", "efg"), ("eval", "hijkl")):
        rows = [f'{k * 11}, 0.000, 10.000, "{"/m/a,/m/b" if i % 2 else "/m/b"}"' for i, k in enumerate(ids)]
        write(root / f"{name}_segments.csv", "# Segments csv created", "# num_ytids=5", *rows)


def tar(path, members, link=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)


def sounds_of(names):
    """{name: bytes} of sounds of about 0.4 s, each another."""
    found = {}
    for i, name in enumerate(names):
        file = io.BytesIO()
        noise = 0.1 * np.random.default_rng(i).standard_normal(6400 + 100 * i)
        soundfile.write(file, noise, 16000, format=name.rsplit(".")[-1].upper())
        found[name] = file.getvalue()
    return found


def audioset(root, out):
    flags = ["--out", out, "--workers", 1, "--clip-seconds", 0.5]
    return inside("prep_data.py", "audioset", "--root", root, *flags)


def test_audioset_in_tars_equals_audioset_in_files(tmp_path):
    members = ["a" * 11 + ".flac", "x/Y" + "b" * 11 + ".wav", "./" + "c" * 11 + "_30.000.ogg", "e" * 11 + "_30_40.mp3"]
    members += [k * 11 + ".flac" for k in "fhijz"]
    content = sounds_of(members)
    for kind in ("files", "tars"):
        audioset_lists(tmp_path / kind)
    for name, data in content.items():
        (tmp_path / "files" / "audio" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / "audio" / name).write_bytes(data)
    json_too = {"a" * 11 + ".json": b"{}", "g" * 11 + ".txt": b"no audio"}  # as in WebDataset
    first = tmp_path / "tars" / "train" / "00000.tar"
    tar(first, json_too | {name: content[name] for name in members[:4]}, link="d" * 11 + ".wav")
    tar(tmp_path / "tars" / "00001.TAR", {name: content[name] for name in members[4:]})
    said = {kind: audioset(tmp_path / kind, tmp_path / f"out {kind}") for kind in ("files", "tars")}
    for text in said.values():
        assert "train-balanced: 3 of 4 listed clips found" in text and "train-unbalanced: 2 of 3" in text
        assert "eval: 3 of 5 listed clips found" in text and "damaged" not in text
    ours, theirs = tmp_path / "out tars", tmp_path / "out files"
    assert (ours / "fbank-00000.npy").read_bytes() == (theirs / "fbank-00000.npy").read_bytes()
    rows = [read(out / "clips.csv") for out in (ours, theirs)]
    assert [r | {"path": ""} for r in rows[0]] == [r | {"path": ""} for r in rows[1]]
    assert rows[0][1]["path"] == f"{first}/x/Y{'b' * 11}.wav" and len(rows[0]) == 8
    listed = {"train": 7, "train-balanced": 4, "train-unbalanced": 3, "eval": 5}
    assert json.loads((ours / "stats.json").read_text())["listed"] == listed
    assert {split: dataset.FbankDataset(ours, split).listed for split in listed} == listed
    assert [r["reason"] for r in read(ours / "skipped.csv")].count("not there (eval)") == 2
    assert "nothing to do" in audioset(tmp_path / "tars", ours)


def test_audioset_on_another_disk_and_in_two_formats(tmp_path):
    audioset_lists(tmp_path / "in")
    (tmp_path / "disk").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "disk")
    for name in ("a" * 11 + ".wav", "a" * 11 + ".m4a"):
        (tmp_path / "disk" / name).write_bytes(b"")
    [path] = [c.path for c in prep_data.audioset(tmp_path / "in")[1] if c.path]
    assert path == str(tmp_path / "in" / "link" / ("a" * 11 + ".wav"))  # soundfile does not read m4a


def test_of_a_tar_that_was_cut_short_the_whole_files_are_used(tmp_path, capsys):
    content = sounds_of([k * 11 + ".wav" for k in "abehi"])
    audioset_lists(tmp_path / "in")
    path = tmp_path / "in" / "0.tar"
    tar(path, content)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    for size in (
        members[4].offset_data + 5000,
        members[4].offset + 100,
        members[4].offset,
    ):  # data, header, no end mark
        path.write_bytes(whole[:size])
        found = {c.id[0] for c in prep_data.audioset(tmp_path / "in")[1] if c.path}
        assert found == {"a", "b", "e", "h"}
    broken = bytearray(whole)
    broken[members[4].offset + 10] ^= 1  # a header in the middle
    path.write_bytes(broken)
    assert {c.id[0] for c in prep_data.audioset(tmp_path / "in")[1] if c.path} == {"a", "b", "e", "h"}
    assert "0.tar is damaged (a damaged header" in capsys.readouterr().out
    (tmp_path / "in" / "1.tar").write_bytes(b"not a tar" * 200)
    (tmp_path / "in" / "2.tar").write_bytes(b"")
    path.write_bytes(whole[: members[4].offset_data + 5000])
    said = audioset(tmp_path / "in", tmp_path / "out")
    assert (
        f"{path} is damaged (unexpected end of data): only its first 4 audio files are used; download it again" in said
    )
    assert "1.tar is damaged" in said and "2.tar is damaged" in said and "eval: 1 of 5 listed clips found" in said
    assert [r["id"][0] for r in read(tmp_path / "out" / "clips.csv")] == ["a", "b", "e", "h"]


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_a_tar_without_its_zeros_is_named(tmp_path, kind):
    audioset_lists(tmp_path / "in")
    with open(tmp_path / ("a" * 11 + ".wav"), "wb") as f:  # a hole, and then the sound
        f.seek(1 << 20)
        f.write(sounds_of(["a.wav"])["a.wav"])
    flags = ["-S", f"--format={kind}", "-C", tmp_path, "-cf", tmp_path / "in" / "0.tar"]
    subprocess.run(["tar", *flags, "a" * 11 + ".wav"], check=True)
    said = audioset(tmp_path / "in", tmp_path / "out")
    assert said.startswith("error: ") and "0.tar holds aaaaaaaaaaa.wav without its zeros: pack it" in said


# ---------------------------------------------------------------------------------------------------------- the reader


def test_dataset_folds_and_statistics(small, small_shards):
    out = small[1]
    shards = np.concatenate([np.load(out / f"fbank-{s:05d}.npy") for s in range(4)]).astype(np.float64)
    for fold in (1, 2, 3):
        train, held = (dataset.FbankDataset(out, s, fold=fold) for s in ("train", "eval"))
        assert list(held.ids) == [f"{i:02d}.wav" for i in range(26) if i % 3 + 1 == fold and i != 11]
        assert list(train.ids) == [f"{i:02d}.wav" for i in range(26) if i % 3 + 1 != fold and i != 11]
        for ds in (train, held):
            lengths = [min(98, (round(16000 * (0.3 + int(i[:2]) / 25)) - 400) // 160 + 1) for i in ds.ids]
            frames = np.concatenate([shards[int(i[:2]), :n] for i, n in zip(ds.ids, lengths)])
            assert abs(ds.mean - frames.mean()) < 1e-6 and abs(ds.std - frames.std()) < 1e-6
            assert isinstance(ds.mean, float) and isinstance(ds.std, float) and not ds.has_val
            assert ds.frames.tolist() == lengths
            assert (ds.task, ds.n_frames, ds.classes) == ("multi-label", 100, ["a", "b", "c"])


def test_dataset_items_and_batches(small, small_shards):
    out = small[1]
    ds = dataset.FbankDataset(out, "train", fold=1)
    order = [len(ds) - 1, 4, 7, 0, 4, 2]  # over three shards, not in their order, one clip twice
    x, n, labels = ds.batch(order)
    assert x.dtype == torch.float16 and x.shape == (6, 100, 128) and n.tolist() == [ds.frames[i] for i in order]
    y = {0: [1.0, 0, 0], 1: [1, 1, 0], 2: [0, 0, 1], 3: [0, 0, 0], 4: [1, 1, 1]}
    for k, i in enumerate(order):
        one, own = ds[i]
        number = int(ds.ids[i][:2])
        shard = np.load(out / f"fbank-{number // SHARD:05d}.npy")
        assert one.dtype == own.dtype == torch.float32 and own.tolist() == y[number % 5]
        assert sorted(v for v in labels[k].tolist() if v >= 0) == [c for c, on in enumerate(y[number % 5]) if on]
        assert torch.equal(one, x[k].float()) and np.array_equal(one.numpy(), shard[number % SHARD].astype(np.float32))
        assert not one[n[k] :].any() and one[: n[k]].any(1).all()


def test_weights_balance_the_classes(small, small_shards):
    ds = dataset.FbankDataset(small[1], "eval", fold=3)
    own = [["a", "ab", "c", "-", "abc"][int(i[:2]) % 5] for i in ds.ids]  # '-': no label, a class of its own
    count = {c: sum(c in o for o in own) for c in "abc-"}
    assert np.allclose(ds.weights(), [sum(1 / (count[c] + 0.01) for c in o) for o in own], rtol=1e-12)
    assert min(count.values()) > 0


def test_dataset_refuses_what_is_not_there(small, small_shards, tmp_path):
    out = small[1]
    for split, fold, says in (
        ("train", None, r"no split 'train': it has train and eval of --fold 1, 2, 3 \(run_all.sh: FOLDS='1 2 3'\)"),
        ("train", 4, "no split 'train' of --fold 4: it has train and eval of --fold 1, 2, 3"),
        ("val", 1, "no split 'val' of --fold 1: it has train and eval of"),
        ("test", 1, "no split 'test' of --fold 1: it has train and eval of"),
    ):
        with pytest.raises(ValueError, match=says):
            dataset.FbankDataset(out, split, fold=fold)
    with pytest.raises(FileNotFoundError, match="not a prepared folder"):
        dataset.FbankDataset(tmp_path, "train")
    shutil.copytree(out, tmp_path / "holes")
    shard = tmp_path / "holes" / "fbank-00001.npy"
    shard.write_bytes((whole := shard.read_bytes())[:-100])
    with pytest.raises(ValueError, match=r"fbank-00001\.npy is damaged"):
        dataset.FbankDataset(tmp_path / "holes", "train", fold=1)
    shard.write_bytes(whole)
    (tmp_path / "holes" / "fbank-00002.npy").unlink()
    with pytest.raises(ValueError, match="fbank-00002.npy is damaged or missing: remove"):
        dataset.FbankDataset(tmp_path / "holes", "train", fold=1)
    stats = json.loads((out / "stats.json").read_text())
    (tmp_path / "holes" / "stats.json").write_text(json.dumps(stats | {"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        dataset.FbankDataset(tmp_path / "holes", "train", fold=1)


def test_a_full_disk_is_one_sentence_for_the_demo_too(tmp_path):
    (tmp_path / "demo-audio" / "audio").mkdir(parents=True)
    (tmp_path / "demo-audio" / "audio" / "train-007.wav").symlink_to("/dev/full")
    output = inside("prep_data.py", "demo", "--out", tmp_path / "demo")
    assert output.startswith("error: [Errno 28]") and output.strip().endswith(
        "free some disk, the same command resumes"
    )


def test_demo_is_deterministic_and_as_described(tmp_path, monkeypatch):
    main(monkeypatch, "demo", "--out", tmp_path / "demo", "--workers", 2)
    here, again = tmp_path / "demo", tmp_path / "again"
    prep_data.demo(again)
    audio = [p.relative_to(again) for p in again.rglob("*") if p.is_file()]
    assert len(audio) == 421 and all(
        (tmp_path / "demo-audio" / p).read_bytes() == (again / p).read_bytes() for p in audio
    )
    seen = {}
    for split, size in (("train", 240), ("val", 60), ("eval", 120)):
        ds = dataset.FbankDataset(here, split)
        per_clip, per_class = (ds.labels >= 0).sum(1), np.bincount(ds.labels[ds.labels >= 0], minlength=10)
        assert (len(ds), len(ds.classes), ds.n_frames, ds.task, ds.has_val) == (size, 10, 100, "multi-label", True)
        assert set(per_clip) == {1, 2, 3} and per_class.min() >= 5
        x = ds.batch(range(size))[0]
        seen[split] = {row.numpy().tobytes() for row in x}
        assert len(seen[split]) == size and (ds.frames == 98).all()
    assert len(set.union(*seen.values())) == 420  # no clip in two splits
    with pytest.raises(ValueError, match="no split 'test': it has splits eval, train, val"):
        dataset.FbankDataset(here, "test")
    with pytest.raises(ValueError, match="no split 'train' of --fold 1: it has splits eval, train, val"):
        dataset.FbankDataset(here, "train", fold=1)


# --------------------------------------------------------------------------------------------------- the augmentations


def test_mix_equals_its_formula_cell_by_cell():
    g = torch.Generator().manual_seed(0)
    B, T, F = 5, 7, 3
    n_a, n_b = torch.tensor([7, 4, 7, 3, 5]), torch.tensor([7, 6, 2, 3, 7])
    lam = torch.tensor([0.5, 0.3, 0.9, 1.0, 0.02])
    a, b = (torch.rand(B, T, F, generator=g) * 24 - 18 for _ in range(2))
    a[4] = -15.9  # with lam = 0.02 the first clip falls below the floor
    a[4, :, 0], b[4, :, 0] = -15.9, -20.0
    for x, n in ((a, n_a), (b, n_b)):
        x[torch.arange(T)[None, :] >= n[:, None]] = 0.0
    mixed, floor = dataset.mix(a, b, lam, n_a, n_b), math.log(2**-23)
    assert abs(floor - -15.9424) < 1e-4 and mixed.shape == (B, T, F)
    for i in range(B):
        for t in range(T):
            for f in range(F):
                power = float(lam[i]) ** 2 * math.exp(a[i, t, f]) + (
                    (1 - float(lam[i])) ** 2 * math.exp(b[i, t, f]) if t < n_b[i] and lam[i] < 1 else 0
                )
                expected = 0.0 if t >= n_a[i] else max(math.log(power), floor)
                assert abs(mixed[i, t, f].item() - expected) < 1e-5, (i, t, f)
    assert (mixed[4, :5, 0] == dataset.FLOOR).all()
    same = dataset.mix(a, b, torch.ones(B), n_a, n_b)
    own = torch.arange(T)[None, :, None] < n_a[:, None, None]
    assert torch.equal(same, torch.where(own, a.clamp(min=dataset.FLOOR), 0.0))


@needs_esc
def test_mix_is_close_to_mixing_the_waveforms():
    rng = np.random.default_rng(0)
    names = sorted(r["filename"] for r in read(ESC / "meta" / "esc50.csv") if r["esc10"] == "True")

    def error(cut_a, cut_b):
        errors = []
        for _ in range(16):
            a, b = (prep_data.load_audio(ESC / "audio" / n, 5) for n in rng.choice(names, 2, replace=False))
            a, b = (x[: int(16000 * rng.uniform(1, 4))] if cut else x for x, cut in ((a, cut_a), (b, cut_b)))
            lam, silence = float(np.float32(rng.beta(10, 10))), torch.zeros(80000)
            waves = lam * a + (1 - lam) * torch.cat([b, silence])[: len(a)]
            real, (x, y) = prep_data.fbank(waves), (prep_data.fbank(torch.cat([w, silence])[:80000]) for w in (a, b))
            n = [(len(w) - 400) // 160 + 1 for w in (a, b)]
            x[n[0] :], y[n[1] :] = 0.0, 0.0  # as in a prepared folder
            mixed = dataset.mix(x[None], y[None], torch.tensor([lam]), torch.tensor(n[:1]), torch.tensor(n[1:]))[0]
            assert len(real) == n[0] and not mixed[n[0] :].any()
            errors.append((mixed[: n[0]] - real).abs().mean().item())
        return np.mean(errors)

    for cuts in ((False, False), (False, True), (True, False), (True, True)):
        assert error(*cuts) < 0.2, cuts


def test_draw_ranges_and_distributions():
    size = 100_000
    d = dataset.draw(np.random.default_rng(0), size, n_clips=37, freq_mask=24, time_mask=96, n_frames=500)
    assert all(v.shape == (size,) for v in d.values())
    for start, end, width, total in (("f0", "f1", 24, 128), ("t0", "t1", 96, 500)):
        w = d[end] - d[start]
        assert w.min() == 0 and w.max() == width - 1 and abs(w.mean() - (width - 1) / 2) < 0.02 * width
        assert d[start].min() == 0 and d[end].max() >= total - 1 and d[end].max() <= total
        assert abs((d[start] / (total - w)).mean() - 0.5) < 0.01
    assert set(d["partner"]) == set(range(37)) and set(d["shift"]) == set(range(-10, 11))
    assert d["noise"].min() >= 0 and d["noise"].max() < 0.1 and abs(d["noise"].mean() - 0.05) < 0.001
    mixed = d["lam"][d["lam"] < 1].astype(np.float64)
    assert abs(len(mixed) / size - 0.5) < 0.01 and set(d["lam"][d["lam"] >= 1]) == {1.0}
    assert abs(mixed.mean() - 0.5) < 0.003 and abs(mixed.var() - 1 / 84) < 0.0005  # of Beta(10, 10)
    assert (dataset.draw(np.random.default_rng(0), 500, 37, mixup=0.0)["lam"] == 1).all()
    wide = dataset.draw(np.random.default_rng(1), size, 37)  # the defaults: 48 bins, 192 of 1000 frames
    assert (wide["f1"] - wide["f0"]).max() == 47 and (wide["t1"] - wide["t0"]).max() == 191 and wide["t1"].max() > 990


def test_draw_depends_on_its_generator_only():
    one, again, other = (dataset.draw(np.random.default_rng([7, 1, s]), 64, 100) for s in (3, 3, 4))
    assert all(np.array_equal(one[k], again[k]) for k in one)
    assert all(not np.array_equal(one[k], other[k]) for k in one)


def test_augment_equals_a_loop_in_the_papers_order():
    B, T, F, mean, std = 6, 40, 128, -5.0, 4.0
    rng = np.random.default_rng(0)
    mixed = rng.normal(-5, 4, (B, T, F)).astype(np.float32)
    noise = rng.random((B, T, F), dtype=np.float32)
    d = dataset.draw(rng, B, 10, freq_mask=48, time_mask=12, n_frames=T)
    d["shift"][:3] = 10, -10, 0
    tensors = {k: torch.from_numpy(v) for k, v in d.items()}
    ours = dataset.augment(torch.from_numpy(mixed), tensors, torch.from_numpy(noise), mean, std)
    for i in range(B):
        x = mixed[i].copy()
        x[:, d["f0"][i] : d["f1"][i]] = 0.0
        x[d["t0"][i] : d["t1"][i], :] = 0.0
        x = (x - mean) / (2 * std)
        x = x + noise[i] * d["noise"][i]
        x = np.roll(x, d["shift"][i], axis=0)
        np.testing.assert_allclose(ours[i].numpy(), x, atol=1e-6)
    assert (d["f1"] > d["f0"]).any() and (d["t1"] > d["t0"]).any()


def test_targets_by_hand():
    labels = torch.tensor([[0, 2], [3, -1], [-1, -1]])
    assert dataset.targets(labels, 4, "multi-label").tolist() == [[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    smooth = torch.tensor([[0.9, 0.025, 0.9, 0.025], [0.025, 0.025, 0.025, 0.9], [0.025] * 4])
    torch.testing.assert_close(dataset.targets(labels, 4, "multi-label", 0.1), smooth)
    single = dataset.targets(torch.tensor([[3], [0]]), 4, "single-label", 0.1)
    torch.testing.assert_close(single, torch.tensor([[0.025, 0.025, 0.025, 0.925], [0.925, 0.025, 0.025, 0.025]]))
    torch.testing.assert_close(single.sum(1), torch.ones(2))
    assert dataset.targets(torch.tensor([[1], [0]]), 2, "single-label").tolist() == [[0, 1], [1, 0]]
