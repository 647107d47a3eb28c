"""prep_data.py on data as people have it: AudioSet's lists, class folders, odd files; and --check."""

import json
import pathlib
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import inside

import prep_data

META = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "meta"
RNG = np.random.default_rng(0)


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
        "x/defghijklmn_30.wav", "Yefghijklmno.wav", "fghijklmnop.WAV", "zzzzzzzzzzz.wav",
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
    both = prep_data.FbankDataset(tmp_path / "out", "train")
    assert len(both) == 5 and both.classes == ["Speech, loud", "Dog", "Cat"] and not both.has_val
    assert len(prep_data.FbankDataset(tmp_path / "out", "train-balanced")) == 4
    assert (
        len(prep_data.FbankDataset(tmp_path / "out", "eval")) == 2
        and both.source == "audioset"
        and both.n_frames == 1000
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
    assert "of 22160 listed" in capsys.readouterr().out
    assert {c[0] for c in clips if c[1]} == {"--4gqARaEJE", "--BfvyPmVMo", "-0RWZT-miFs"}


def test_class_folders(tmp_path):
    for i in range(10):
        sound(tmp_path / "in" / "a dog's bark" / f"{i}.wav")
        sound(tmp_path / "in" / "Küche" / "deeper" / f"-{i}.flac")
    (tmp_path / "in" / "Küche" / "notes.txt").write_text("no audio")
    said = prep(tmp_path / "in", tmp_path / "out")
    assert "20 clips in 2 class folders; 1 files are no audio" in said and "80/10/10" in said
    data = {s: prep_data.FbankDataset(tmp_path / "out", s) for s in ("train", "val", "eval")}
    assert {s: len(d) for s, d in data.items()} == {"train": 16, "val": 2, "eval": 2}
    assert data["train"].classes == ["Küche", "a dog's bark"] and data["train"].task == "single-label"
    assert all((label == 1) == ("bark" in name) for d in data.values() for name, label in zip(d.ids, d.labels[:, 0]))


def test_class_folders_below_folders_of_splits(tmp_path):
    for split in ("train", "test"):
        for kind in ("a", "b"):
            sound(tmp_path / "in" / split / kind / "1.wav")
    said = prep(tmp_path / "in", tmp_path / "out")
    assert "80/10/10" not in said and "eval 2, train 2" in said
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
    silence = prep_data.fbank(np.zeros(1600))
    assert silence.shape == (8, 128) and (silence == prep_data.FLOOR).all()


@pytest.fixture
def sound_folder(tmp_path):
    for kind in ("a", "b"):
        for i in range(12):
            sound(tmp_path / "in" / kind / f"{i}.wav", 0.4)
    prep(tmp_path / "in", tmp_path / "out")
    return tmp_path / "out"


def test_check_finds_what_is_wrong(sound_folder):
    assert "is sound: 24 clips, 1 shards" in inside("prep_data.py", "--check", sound_folder)
    shard, table = sound_folder / "fbank-00000.npy", sound_folder / "clips.csv"
    good = {p: p.read_bytes() for p in (shard, table, sound_folder / "stats.json")}
    row = table.read_text().splitlines()[1]

    def faulty(path, content):
        path.write_bytes(content)
        said = inside("prep_data.py", "--check", sound_folder)
        path.write_bytes(good[path])
        assert said.startswith("error: ") and "prepare it again" in said, said
        return said

    flipped = bytearray(good[shard])
    flipped[5000] ^= 1
    assert "fbank-00000.npy is damaged" in faulty(shard, bytes(flipped))
    assert "fbank-00000.npy is damaged" in faulty(shard, good[shard][:-100])
    edited = good[table].replace(b",38,", b",37,", 1)
    assert "clips.csv is damaged or was edited" in faulty(table, edited)
    stats = json.loads(good[sound_folder / "stats.json"])
    plain = {k: v for k, v in stats.items() if k not in ("tables", "checksum")}  # the way out that the message names
    (sound_folder / "stats.json").write_text(json.dumps(plain))
    assert "does not match" in faulty(table, good[table].replace(row.encode(), row.replace(",38,", ",60,").encode()))
    cells = row.split(",")
    for place, value in ((5, "7"), (7, "0.5")):
        bad = ",".join([*cells[:place], value, *cells[place + 1 :]])
        assert "wrong labels or a wrong mean" in faulty(table, good[table].replace(row.encode(), bad.encode()))
    assert "not there" in faulty(table, good[table].replace(row.encode(), ",".join(["600", *cells[1:]]).encode()))
    assert "version" in faulty(sound_folder / "stats.json", json.dumps(stats | {"version": 0}).encode())
    shard.unlink()
    assert "missing" in inside("prep_data.py", "--check", sound_folder)
    (sound_folder / "stats.json").unlink()
    assert "not complete" in inside("prep_data.py", "--check", sound_folder)


def test_training_refuses_a_truncated_shard(sound_folder):
    shard = sound_folder / "fbank-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"fbank-00000\.npy is damaged"):
        prep_data.FbankDataset(sound_folder, "train")


def test_strict_stops_at_one_unreadable_clip_and_the_rest_goes_on_without(tmp_path):
    for kind in ("a", "b"):
        for i in range(12):
            sound(tmp_path / "in" / kind / f"{i}.wav", 0.4)
    (tmp_path / "in" / "a" / "3.wav").write_bytes(b"RIFF")
    said = prep(tmp_path / "in", tmp_path / "strict", "--strict")
    assert said.startswith("error: ") and "3.wav could not be read" in said and "--strict" in said
    assert not list((tmp_path / "strict").glob("fbank-*"))
    good = (tmp_path / "in" / "a" / "4.wav").read_bytes()
    (tmp_path / "in" / "a" / "3.wav").write_bytes(good)
    assert "wrote" in prep(tmp_path / "in", tmp_path / "strict", "--strict")
    (tmp_path / "in" / "a" / "3.wav").write_bytes(b"RIFF")
    assert "skipped 1" in prep(tmp_path / "in", tmp_path / "loose")
    assert len(columns(tmp_path / "loose" / "clips.csv")["id"]) == 23


@pytest.mark.parametrize("flags", [[], ["csv", "--check", "x"]])
def test_a_dataset_or_check(flags, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["prep_data.py", *flags])
    with pytest.raises(SystemExit, match="2"):
        prep_data.main()
    assert "name a dataset" in capsys.readouterr().err
