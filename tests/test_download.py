"""prep_data.py without --root: downloads from a server on 127.0.0.1 that cuts, lies and forgets; hostile archives; resumption."""

import collections
import csv
import errno
import hashlib
import http.server
import io
import os
import pathlib
import shutil
import stat
import subprocess
import threading
import zipfile

import numpy as np
import pytest
import soundfile
from conftest import inside

import dataset
import prep_data

needs_zip = pytest.mark.skipif(shutil.which("zip") is None, reason="no zip tool here to make a split archive with")


@pytest.fixture
def server(monkeypatch):
    """(files {name: bytes}, faults {name: {...}}, log of (method, name, first byte asked for)) of a running server.

    Faults: cuts [bytes after which each of the next replies breaks off], status [of the next replies], ignore_range,
    no_length, chunked (as GitHub's archives come), silent.
    """
    files, faults, log = {}, collections.defaultdict(dict), []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            name = self.path.rsplit("/", 1)[1]
            fault, content = faults[name], files.get(name)
            start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            log.append((self.command, name, start))
            self.close_connection = True
            status = fault["status"].pop(0) if body and fault.get("status") else 404 if content is None else 200
            if self.headers["User-Agent"].startswith("Python"):
                status = 403  # as Zenodo does
            if status == 200 and self.headers["Range"] and not fault.get("ignore_range"):
                status = 206 if start < len(content) else 416
            if fault.get("silent") and body:
                return stop.wait(5)
            if status >= 400:
                return self.send_error(status)
            if status == 206:
                content = content[start:]
            self.send_response(status)
            self.send_header("Connection", "close")
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(files[name]) - 1}/{len(files[name])}")
            if fault.get("chunked"):
                self.send_header("Transfer-Encoding", "chunked")
            elif not fault.get("no_length"):
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if not body:
                return None
            sent = content[: fault["cuts"].pop(0)] if fault.get("cuts") else content
            if not fault.get("chunked"):
                return self.wfile.write(sent)
            for i in range(0, len(sent), 10000):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(sent[i : i + 10000]), sent[i : i + 10000]))
            return self.wfile.write(b"0\r\n\r\n") if len(sent) == len(content) else None

        def log_message(self, *_):
            pass

    stop = threading.Event()
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prep_data, "WAITS", (0, 0, 0))
    monkeypatch.setattr(prep_data, "TIMEOUT", 5)
    files["url"] = f"http://127.0.0.1:{web.server_port}/archive/"
    yield files, faults, log
    stop.set()
    web.shutdown()
    web.server_close()


def wav(seed, seconds):
    sound = io.BytesIO()
    noise = np.random.default_rng(seed).normal(0, 0.1, round(44100 * seconds))
    soundfile.write(sound, noise, 44100, subtype="PCM_16", format="WAV")
    return sound.getvalue()


def zipped(members, link=None):
    """A zip archive of {name: bytes}, names taken as they are; `link` is the name of one that is a symbolic link."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items():
            info = zipfile.ZipInfo("x")
            info.filename = name
            info.external_attr = ((stat.S_IFLNK if name == link else stat.S_IFREG) | 0o644) << 16
            z.writestr(info, content)
    return out.getvalue()


def facts(monkeypatch, files, source, top, archives):
    """Point prep_data's tables at the server; {archive: endings of its parts}, with the sums of what it holds."""
    md5 = lambda name: hashlib.md5(files[name]).hexdigest() if source == "fsd50k" else None
    sums = {archive: {end: md5(f"{archive}.{end}") for end in endings} for archive, endings in archives.items()}
    monkeypatch.setitem(prep_data.DOWNLOADS, source, (files["url"], top, 0.0, 0.0, sums))


@pytest.fixture
def esc(server, monkeypatch):
    """An ESC-50 of ten clips on the server -> {path below the root: bytes}."""
    files = server[0]
    table = "filename,fold,target,category,esc10,src_file,take\n"
    table += "".join(f"{i}.wav,{i % 5 + 1},{i // 5},{'dog' if i < 5 else 'rain'},{i % 5 < 3},0,A\n" for i in range(10))
    content = {f"audio/{i}.wav": wav(i, 0.3) for i in range(10)} | {"meta/esc50.csv": table.encode()}
    members = {"ESC-50-master/": b"", "ESC-50-master/link": b"/etc/passwd", "ESC-50-master/audio/": b""}
    files["master.zip"] = zipped(members | {f"ESC-50-master/{k}": v for k, v in content.items()}, "ESC-50-master/link")
    facts(monkeypatch, files, "esc50", "ESC-50-master", {"master": ["zip"]})
    return content


@pytest.fixture
def fsd(server, monkeypatch, tmp_path):
    """An FSD50K of seven clips on the server, in archives that zip split -> {path below the root: bytes}."""
    files, folder, archives = server[0], tmp_path / "source", {}
    content = {f"FSD50K.dev_audio/{i}.wav": wav(i, 1) for i in range(4)}
    content |= {f"FSD50K.eval_audio/{i}.wav": wav(i, 0.7) for i in range(10, 13)}
    content["FSD50K.dev_audio/silence.txt"] = bytes(200_000)  # deflates; the sounds do not
    rows = "".join(f"{i},Dog,/m/d,{'val' if i == 3 else 'train'}\n" for i in range(4))
    truth = {
        "FSD50K.ground_truth/vocabulary.csv": b"0,Dog,/m/d\n1,Rain,/m/r\n",
        "FSD50K.ground_truth/dev.csv": b"fname,labels,mids,split\n" + rows.encode(),
        "FSD50K.ground_truth/eval.csv": b'fname,labels,mids\n10,Dog,/m/d\n11,Rain,/m/r\n12,"Dog,Rain","/m/d,/m/r"\n',
    }
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    files["FSD50K.ground_truth.zip"] = zipped(truth)
    archives["FSD50K.ground_truth"] = ["zip"]
    for part, level in (("FSD50K.dev_audio", "-6"), ("FSD50K.eval_audio", "-0")):
        subprocess.run(["zip", "-q", level, "-s", "64k", "-r", f"{part}.zip", part], cwd=folder, check=True)
        names = sorted(p.name for p in folder.glob(f"{part}.z*"))
        archives[part] = [name.rsplit(".", 1)[1] for name in names]
        files |= {name: (folder / name).read_bytes() for name in names}
        assert len(names) > 2 and names[-1].endswith(".zip") and files[names[0]].startswith(b"PK\7\10")
    facts(monkeypatch, files, "fsd50k", None, archives)
    return content | truth


def files_of(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file() or p.is_symlink()}


def run(dataset, tmp_path):
    return inside("prep_data.py", dataset, "--out", tmp_path / "data" / dataset, "--workers", 1, "--clip-seconds", 0.5)


def got(log):
    """Names and first bytes of what was fetched."""
    return [(name, start) for method, name, start in log if method == "GET"]


def rows(folder):
    with open(folder / "clips.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_esc50_and_esc10_share_one_download(server, esc, tmp_path):
    """GitHub sends its archive in chunks of unknown total, and ignores Range; it breaks off twice."""
    _, faults, log = server
    faults["master.zip"] = {"chunked": True, "ignore_range": True, "cuts": [90_000, 150_000]}
    said = run("esc50", tmp_path)
    root = tmp_path / "data" / "esc50-audio"
    assert "0.0 GB to download from http://127.0.0.1" in said and "the archive is removed" in said
    assert [name for name, _ in got(log)] == ["master.zip"] * 3 and [start > 0 for _, start in got(log)] == [
        False,
        True,
        True,
    ]
    there = files_of(root)
    assert there.pop("link") == b"/etc/passwd" and not (root / "link").is_symlink()
    assert there.pop("master.unpacked") == b"" and there == esc
    assert len(rows(tmp_path / "data" / "esc50")) == 10
    log.clear()
    run("esc10", tmp_path)
    assert "is complete" in run("esc50", tmp_path)
    assert not log and len(rows(tmp_path / "data" / "esc10")) == 6


@needs_zip
def test_fsd50k_over_a_bad_line(server, fsd, tmp_path):
    _, faults, log = server
    faults["FSD50K.dev_audio.z01"] = {"cuts": [20_000, 10_000, 5, 0, 3, 0], "status": [503, 429]}
    faults["FSD50K.dev_audio.z02"] = {"cuts": [30_000], "ignore_range": True}
    faults["FSD50K.eval_audio.zip"] = {"cuts": [1000], "no_length": True}  # such an end looks like the file's end:
    faults["FSD50K.eval_audio.z01"] = {"cuts": [1000], "chunked": True}
    error = run("fsd50k", tmp_path)
    assert "FSD50K.eval_audio.zip came with MD5" in error  # so the sum tells
    assert [s for n, s in got(log) if n.endswith("dev_audio.z01")] == [
        0,
        0,
        0,
        20000,
        30000,
        30005,
        30005,
        30008,
        30008,
    ]
    assert [s for n, s in got(log) if n.endswith("dev_audio.z02")] == [0, 30000]
    assert [s for n, s in got(log) if n.endswith("eval_audio.z01")] == [0, 0]
    log.clear()
    run("fsd50k", tmp_path)
    assert got(log) == [("FSD50K.eval_audio.zip", 0)]
    root = tmp_path / "data" / "fsd50k-audio"
    there = files_of(root)
    assert sorted(k for k in there if k.endswith(".unpacked")) == [
        f"FSD50K.{part}.unpacked" for part in ("dev_audio", "eval_audio", "ground_truth")
    ]
    assert {k: v for k, v in there.items() if not k.endswith(".unpacked")} == fsd
    clips = rows(tmp_path / "data" / "fsd50k")
    assert [(r["id"], r["split"]) for r in clips] == [
        *((str(i), "val" if i == 3 else "train") for i in range(4)),
        *((str(i), "eval") for i in range(10, 13)),
    ]
    log.clear()
    assert "is complete" in run("fsd50k", tmp_path) and not log


@needs_zip
def test_interrupted_anywhere_it_resumes(server, fsd, tmp_path, monkeypatch):
    """Stopped at a rename or a removal, again and again: what is in place is whole, and the last run finds all of it."""
    log, root = server[2], tmp_path / "fsd50k-audio"
    root.mkdir()
    left = [0]

    def countdown(action):
        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return action(*args, **kwargs)

        return counted

    monkeypatch.setattr(prep_data.os, "sync", lambda: None)
    monkeypatch.setattr(prep_data.os, "replace", countdown(os.replace))
    monkeypatch.setattr(pathlib.Path, "unlink", countdown(pathlib.Path.unlink))
    for n in range(200):
        left[0] = 4 + n % 9
        try:
            prep_data.download("fsd50k", root)
            break
        except KeyboardInterrupt:
            for name, content in files_of(root).items():  # whole or absent
                if name in fsd:
                    assert content == fsd[name], name
    assert n > 3, "never interrupted"
    assert max(collections.Counter(name for name, start in got(log) if start == 0).values()) == 1  # nothing comes twice
    there = files_of(root)
    assert {k: v for k, v in there.items() if not k.endswith(".unpacked")} == fsd


def test_interrupted_in_the_body_it_asks_for_the_rest(server, esc, tmp_path, monkeypatch):
    log, root = server[2], tmp_path / "esc50-audio"
    root.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(prep_data.tqdm, "update", lambda bar, n: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prep_data.download("esc50", root)
    half = (root / "master.zip.part").stat().st_size
    assert half == 1 << 16
    prep_data.download("esc50", root)
    assert got(log) == [("master.zip", 0), ("master.zip", half)]
    assert {k: v for k, v in files_of(root).items() if k in esc} == esc


@needs_zip
@pytest.mark.parametrize("ignore_range", [False, True])
def test_a_partial_file_may_be_whole_or_wrong(server, fsd, tmp_path, ignore_range):
    files, faults, log = server
    root = tmp_path / "data" / "fsd50k-audio"
    root.mkdir(parents=True)
    for name, content in files.items():
        if name.startswith("FSD50K.dev"):
            faults[name]["ignore_range"] = ignore_range
            (root / f"{name}.part").write_bytes(content)
    long = root / "FSD50K.dev_audio.z02.part"
    long.write_bytes(long.read_bytes() + b"more")
    said = run("fsd50k", tmp_path)
    if not ignore_range:  # 416, so it is checked: too long is wrong
        assert "FSD50K.dev_audio.z02 came with MD5" in said and "run the same command again" in said
        assert (root / "FSD50K.dev_audio.z01").exists() and not long.exists()
        log.clear()
        run("fsd50k", tmp_path)
        assert got(log)[0] == ("FSD50K.dev_audio.z02", 0)
    assert {k: v for k, v in files_of(root).items() if k in fsd} == fsd


@needs_zip
def test_a_wrong_sum_is_removed_and_said(server, fsd, tmp_path):
    files, _, _ = server
    right = files["FSD50K.dev_audio.z03"]
    files["FSD50K.dev_audio.z03"] = right[:5000] + b"!" + right[5001:]
    error = run("fsd50k", tmp_path)
    wrong = hashlib.md5(files["FSD50K.dev_audio.z03"]).hexdigest()
    assert f"FSD50K.dev_audio.z03 came with MD5 {wrong}, not {hashlib.md5(right).hexdigest()}" in error
    assert "was removed" in error and "--root" in error
    root = tmp_path / "data" / "fsd50k-audio"
    assert not list(root.glob("*.z03*")) and not (root / "FSD50K.dev_audio").exists()
    files["FSD50K.dev_audio.z03"] = right
    assert "wrote" in run("fsd50k", tmp_path)


HOSTILE = [
    "../evil",
    "a/../../evil",
    "/tmp/evil-abs",
    "C:/evil",
    "C:evil",
    "..\\evil",
    "\\evil",
    "//host/evil",
    "a/..",
    "",
]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", HOSTILE)
def test_no_member_leaves_the_folder(tmp_path, name, parts):
    root, archive = tmp_path / "in" / "root", zipped({"good": b"good", "top/fine": b"fine", f"{name}": b"evil"})
    root.mkdir(parents=True)
    cuts = np.linspace(0, len(archive), parts + 1).astype(int)
    paths = [root / f"a.z{i:02d}" for i in range(parts)]
    for path, a, b in zip(paths, cuts, cuts[1:]):
        path.write_bytes(archive[a:b])
    with pytest.raises(ValueError, match=r"would leave .*root"):
        prep_data.unpack(paths, root, "top")
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} <= {
        "in/root/good",
        "in/root/fine",
        *(p.relative_to(tmp_path).as_posix() for p in paths),
    }
    assert not pathlib.Path("/tmp/evil-abs").exists() and (root / "good").read_bytes() == b"good"


def test_a_hostile_download_is_one_sentence(server, esc, tmp_path):
    server[0]["master.zip"] = zipped({"ESC-50-master/ok": b"", "ESC-50-master/../../../evil": b"evil"})
    error = run("esc50", tmp_path)
    assert "master.zip holds 'ESC-50-master/../../../evil'" in error and not list(tmp_path.rglob("*evil*"))
    link = {
        "ESC-50-master/way": str(tmp_path).encode(),
        "ESC-50-master/way/evil": b"evil",
    }  # through a link: a plain file
    shutil.rmtree(tmp_path / "data")
    server[0]["master.zip"] = zipped(link, "ESC-50-master/way")
    assert run("esc50", tmp_path).startswith("error: ") and not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("fault", ["a bit", "the end"])
def test_a_damaged_archive_is_refused(tmp_path, fault, parts, method):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as z:
        z.writestr("first", b"first")
        z.writestr("sound", wav(0, 0.2))
    archive = bytearray(out.getvalue())
    if fault == "a bit":
        archive[9000] ^= 16
    else:
        del archive[9000:]
    paths = [tmp_path / "a.z01", tmp_path / "a.zip"][-parts:]
    for path, content in zip(paths, [archive] if parts == 1 else [archive[:5000], archive[5000:]]):
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip is damaged \(.+\): remove .*run the same command"):
        prep_data.unpack(paths, tmp_path, None)
    assert not (tmp_path / "sound").exists()


def test_one_process_downloads(server, esc, tmp_path):
    root = tmp_path / "data" / "esc50-audio"
    root.mkdir(parents=True)
    dataset.lock(root)
    assert f"{root} is in use by another process" in run("esc50", tmp_path)
    assert "wrote" in run("esc50", tmp_path)


def test_a_disk_that_fills_up_is_one_sentence(server, esc, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prep_data, "unpack", full)
        assert "No space left on device: free some disk, the same command resumes" in run("esc50", tmp_path)
    assert "wrote" in run("esc50", tmp_path)


def disk(monkeypatch, free):
    monkeypatch.setattr(prep_data.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, int(free)))


def test_the_disk_is_checked_once_before_the_download(server, esc, tmp_path, monkeypatch):
    files, _, log = server
    root = tmp_path / "data" / "esc50-audio"
    row = (files["url"], "ESC-50-master", 0.1, 3.8, {"master": {"zip": None}})
    monkeypatch.setitem(prep_data.DOWNLOADS, "esc50", row)
    disk(monkeypatch, 3.7e9)
    error = run("esc50", tmp_path)
    assert f"esc50 needs 3.8 GB of disk in {root}" in error and "free some, or give --out" in error and not got(log)
    (root / "master.zip.part").write_bytes(files["master.zip"][:1000])
    assert "wrote" in run("esc50", tmp_path)


def test_the_need_of_fsd50k(monkeypatch, tmp_path, capsys):
    """34.4 GB of audio and 51,197 clips of 1000 x 128 x 2 bytes; unpacking takes 43.9."""
    disk(monkeypatch, 1e9)
    with pytest.raises(OSError, match=r"needs 47\.5 GB of disk in .*has 1\.0 GB free: free some"):
        prep_data.download("fsd50k", tmp_path)
    assert "24.7 GB to download from https://zenodo.org/records/4060432/files/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "says", "requests"),
    [
        ({"status": [404] * 9}, "404", 1),
        ({"status": [403] * 9}, "403", 1),
        ({"status": [503] * 9}, "503", 4),
        ({"cuts": [0] * 9}, "cut after 0 of", 4),
        ({"cuts": [1000] * 9, "ignore_range": True}, "cut after 1000 of", 4),
        ({"silent": True}, "timed out", 4),
    ],
)
def test_a_server_that_does_not_give_it(server, esc, tmp_path, monkeypatch, fault, says, requests):
    files, faults, log = server
    faults["master.zip"] = fault
    monkeypatch.setattr(prep_data, "TIMEOUT", 0.2 if "silent" in fault else 5)
    error = run("esc50", tmp_path)
    assert f"{files['url']}master.zip could not be downloaded" in error and says in error and "--root" in error
    assert "\n" not in error and len(got(log)) == requests
    faults["master.zip"] = {}
    assert "wrote" in run("esc50", tmp_path)


def test_no_server_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prep_data, "WAITS", (0,))
    place = "http://127.0.0.1:9/"
    monkeypatch.setitem(prep_data.DOWNLOADS, "esc50", (place, None, 0, 0, {"master": {"zip": None}}))
    error = run("esc10", tmp_path)
    assert f"{place}master.zip could not be downloaded" in error and "refused" in error


def test_a_page_that_is_no_archive_is_one_sentence(server, esc, tmp_path):
    right = server[0]["master.zip"]
    for wrong in (b"<html>try again later</html>" * 100, right[:20_000], b""):
        server[0]["master.zip"] = wrong
        error = run("esc50", tmp_path)
        assert (
            error.startswith("error: ") and "master.zip is damaged" in error and "run the same command again" in error
        )
        (tmp_path / "data" / "esc50-audio" / "master.zip").unlink()  # as the message says
    server[0]["master.zip"] = right
    assert "wrote" in run("esc50", tmp_path)


def test_the_real_table_is_whole():
    """Every archive of the record has its sum, and a split one ends in its .zip."""
    for source, names in (("esc50", 1), ("fsd50k", 9)):
        url, *_, archives = prep_data.DOWNLOADS[source]
        assert url.startswith("https://") and url.endswith("/")
        assert sum(map(len, archives.values())) == names and all([*v] == sorted(v) for v in archives.values())
        for md5 in (md5 for sums in archives.values() for md5 in sums.values()):
            assert source == "esc50" or len(bytes.fromhex(md5)) == 16


def test_audioset_says_what_it_needs(tmp_path):
    error = run("audioset", tmp_path)
    assert "audioset cannot be downloaded: it needs --root" in error and not list(tmp_path.iterdir())
