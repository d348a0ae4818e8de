"""The index: every fault named from header and end, nothing read twice, nothing believed that may have changed."""

import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from fusionreid.dataloading import index
from fusionreid.dataloading.index import FILE, Entry, index_folder, inspect_file, mark_bad, scan
from tests import ROOT
from tests.dataloading.test_records import BAD, GOOD, JPEG, image_bytes


def write(root: Path, files: dict[str, bytes]) -> list[str]:
    for name, data in files.items():
        (root / name).write_bytes(data)
    return [str(root / name) for name in files]


def faults(entries: dict[str, Entry]) -> dict[str, str]:
    return {os.path.basename(path): entry.fault for path, entry in entries.items() if entry.fault}


def test_every_bad_file_is_named_with_its_fault(tmp_path):
    paths = write(tmp_path, {name: data for name, (data, _) in BAD.items()} | GOOD)
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    others = {"fifo.jpg": "not a regular", "folder.jpg": "directory", "missing.jpg": "No such file", "loop.jpg": "many"}
    found = faults(scan(str(tmp_path), [*paths, *(str(tmp_path / name) for name in others)]))
    expected = {name: fault for name, (_, fault) in BAD.items()} | others
    assert found.keys() == expected.keys()
    for name, fault in expected.items():
        assert fault in found[name], name


def test_what_an_entry_says(tmp_path):
    frames = io.BytesIO()
    Image.new("RGB", (6, 5)).save(frames, "GIF", save_all=True, append_images=[Image.new("RGB", (6, 5), "red")])
    jpeg, gif = write(tmp_path, {"a.jpg": JPEG, "b.jpg": frames.getvalue()})
    status = os.stat(jpeg)
    assert inspect_file(jpeg)[:6] == (len(JPEG), status.st_mtime_ns, "JPEG", 64, 128, False)
    assert inspect_file(gif)[2:6] == ("GIF", 6, 5, True)


def test_the_usual_formats_are_not_decoded(tmp_path, monkeypatch):
    files = {f"{kind}.x": image_bytes(kind) for kind in ("JPEG", "PNG", "WEBP")}
    files["progressive.x"] = image_bytes(progressive=True)
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.format))
    assert not faults(scan(str(tmp_path), write(tmp_path, files)))
    assert decoded == []
    scan(str(tmp_path), write(tmp_path, {"cut.x": JPEG[:-2]}))
    assert "JPEG" in decoded


def test_the_second_start_opens_nothing(tmp_path, monkeypatch):
    paths = write(tmp_path, GOOD | {name: data for name, (data, _) in BAD.items()})
    first = scan(str(tmp_path), paths)
    monkeypatch.setattr(index, "inspect_file", lambda path: pytest.fail(f"{path} was opened"))
    assert scan(str(tmp_path), paths) == first
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    assert [entry for _, entry in sorted(scan(str(moved), [str(moved / Path(p).name) for p in paths]).items())] == [
        entry for _, entry in sorted(first.items())
    ]


def test_what_changed_is_read_again_and_the_disks_word_is_not_kept(tmp_path, monkeypatch):
    good, later = write(tmp_path, {"good.jpg": JPEG, "later.jpg": JPEG})
    scan(str(tmp_path), [good, later])
    Path(later).write_bytes(JPEG[:-9])
    assert faults(scan(str(tmp_path), [good, later])).keys() == {"later.jpg"}
    Path(later).write_bytes(JPEG + b" ")
    os.utime(later, ns=(0, 7))
    monkeypatch.setattr(index, "open_image", lambda file: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert faults(scan(str(tmp_path), [good, later])) == {"later.jpg": "Input/output error"}
    monkeypatch.undo()
    assert not faults(scan(str(tmp_path), [good, later]))


def test_decoding_finds_more_and_the_next_start_knows(tmp_path):
    paths = write(tmp_path, {"a.jpg": JPEG, "b.jpg": JPEG, "c.jpg": JPEG})
    assert not faults(scan(str(tmp_path), paths))

    def decode(path: str) -> None:
        if path.endswith("b.jpg"):
            raise ValueError("wrong inside\nsecond line")

    assert faults(scan(str(tmp_path), paths, decode)) == {"b.jpg": "wrong inside"}
    mark_bad(str(tmp_path), paths[2], "wrong too")
    assert faults(scan(str(tmp_path), paths)) == {"b.jpg": "wrong inside", "c.jpg": "wrong too"}
    Path(paths[1]).write_bytes(JPEG + b"\xff\xd9")
    assert faults(scan(str(tmp_path), paths)) == {"c.jpg": "wrong too"}


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: b"", lambda data: data.replace(b"128", b"129")]
)
def test_a_damaged_index_is_made_anew(tmp_path, damage):
    paths = write(tmp_path, {"a.jpg": JPEG})
    first = scan(str(tmp_path), paths)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(damage(whole))
    assert scan(str(tmp_path), paths) == first
    assert (tmp_path / FILE).read_bytes() == whole
    assert json.loads(whole.split(b"\n")[1])["a.jpg"][:2] == [len(JPEG), os.stat(paths[0]).st_mtime_ns]


@pytest.mark.parametrize("content", [[], {"a.jpg": 1}, {"a.jpg": ["x"] * 10}, {"a.jpg": [2**80] * 3}, {"a.jpg": [[]]}])
def test_a_forged_index_is_made_anew(tmp_path, content):
    paths = write(tmp_path, {"a.jpg": JPEG})
    first = scan(str(tmp_path), paths)
    text = json.dumps(content).encode()
    (tmp_path / FILE).write_bytes(index._digest(text) + b"\n" + text)
    assert scan(str(tmp_path), paths) == first
    mark_bad(str(tmp_path), paths[0], "spoilt")
    assert scan(str(tmp_path), paths)[paths[0]].fault == "spoilt"


def test_an_index_that_cannot_be_written_harms_nothing(tmp_path, monkeypatch):
    paths = write(tmp_path, {"a.jpg": JPEG})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert not faults(scan(str(tmp_path), paths))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    scan(str(tmp_path), paths)
    assert (index_folder(str(tmp_path)) / FILE).is_relative_to(tmp_path / "cache")
    assert (index_folder(str(tmp_path)) / FILE).is_file()


DYING = """
import os, sys, time
from fusionreid.dataloading import index

inspect, left, index.SAVE_FILES, index.WAITING = index.inspect_file, 700, 100, 1000

def inspect_file(path):
    global left
    left -= 1
    time.sleep(0.002)
    return inspect(path) if left else os._exit(9)

index.inspect_file = inspect_file
index.scan(sys.argv[1], [os.path.join(sys.argv[1], name) for name in os.listdir(sys.argv[1])])
"""


def test_a_scan_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    paths = write(tmp_path, {f"{i:03}.jpg": JPEG for i in range(800)})
    assert subprocess.run([sys.executable, "-c", DYING, tmp_path], check=False, cwd=ROOT).returncode == 9
    opened = []
    monkeypatch.setattr(index, "inspect_file", lambda path: opened.append(path) or inspect_file(path))
    assert len(scan(str(tmp_path), paths)) == 800
    assert 100 <= len(opened) <= 500
    opened.clear()

    def stop(path: str) -> Entry:
        if len(opened) == 300:
            raise KeyboardInterrupt
        opened.append(path)
        return inspect_file(path)

    (tmp_path / FILE).unlink()
    monkeypatch.setattr(index, "inspect_file", stop)
    with pytest.raises(KeyboardInterrupt):
        scan(str(tmp_path), paths)
    monkeypatch.setattr(index, "inspect_file", inspect_file)
    assert len(json.loads((tmp_path / FILE).read_bytes().split(b"\n")[1])) >= 256


def test_many_threads_wait_for_a_slow_disk_and_one_reads_a_quick_one(tmp_path, monkeypatch):
    paths, threads = write(tmp_path, {f"{i:04}.jpg": JPEG for i in range(64 * 40)}), set()

    def slow(path: str) -> Entry:
        threads.add(threading.get_ident())
        time.sleep(0.001)
        return Entry()

    monkeypatch.setattr(index, "inspect_file", slow)
    start = time.monotonic()
    scan(str(tmp_path), paths)
    assert len(threads) > 16
    assert time.monotonic() - start < len(paths) * 0.001
    threads.clear()
    monkeypatch.setattr(index, "inspect_file", lambda path: threads.add(threading.get_ident()) or inspect_file(path))
    (tmp_path / FILE).unlink()
    monkeypatch.setattr(index, "WAITING", 1000)
    scan(str(tmp_path), paths[:640])
    assert len(threads) <= 2


def test_a_pipe_in_place_of_the_index_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / FILE)
    assert not faults(scan(str(tmp_path), write(tmp_path, {"a.jpg": JPEG})))
    assert (tmp_path / FILE).is_file()


def test_a_header_that_promises_more_than_the_file_can_hold_is_a_fault(tmp_path):
    place = JPEG.index(b"\xff\xc0") + 5
    data = JPEG[:place] + struct.pack(">HH", 4900, 4900) + JPEG[place + 4 :]
    flat = io.BytesIO()
    Image.new("RGB", (2000, 2000), "red").save(flat, "JPEG", quality=1, optimize=True)
    found = faults(scan(str(tmp_path), write(tmp_path, {"lies.jpg": data, "flat.jpg": flat.getvalue()})))
    assert found == {"lies.jpg": f"its header says 4900 x 4900 pixels, more than its {len(JPEG):,} bytes can hold"}


def test_it_is_quick(tmp_path):
    (tmp_path / "image.jpg").write_bytes(JPEG)
    paths = [str(tmp_path / f"{i}.jpg") for i in range(2000)]
    for path in paths:
        os.link(tmp_path / "image.jpg", path)
    times = []
    for _ in range(2):
        start = time.process_time()
        scan(str(tmp_path), paths)
        times.append((time.process_time() - start) / len(paths))
    assert times[0] < 250e-6  # alone 60 us
    assert times[1] < times[0] / 2
