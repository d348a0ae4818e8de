"""Shards: every image of a sound one is added with what is known of it, and a damaged one is named and stops nobody."""

import io
import json
import os
import struct
import tarfile
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import pytest

pa = pytest.importorskip("pyarrow", reason="LanceDB is not installed: pip install 'fusionreid[gallery]'")
pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install 'fusionreid[gallery]'")
from fusionreid.engine.galleries import adding, shards, stages  # noqa: E402
from fusionreid.engine.galleries.find import rows_of  # noqa: E402
from fusionreid.engine.galleries.table import Gallery  # noqa: E402

ABOUT = {"person": 7, "camera": "hall", "track": "17", "time": "2026-03-01T12:00:00Z"}


def write(file: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(file, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return file


def entry(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def read(shard: Path) -> list[dict]:
    table = pa.table({"shard": pa.array([os.fsencode(shard)], pa.binary())})
    return [row for part in shards.unpacked(table) for row in part.to_pylist()]


def faults(shard: Path) -> dict[str, str]:
    """Faults by the name of what they are about."""
    return {Path(os.fsdecode(row["path"])).name: row["fault"] for row in read(shard) if row["fault"]}


@pytest.fixture
def crops(run: SimpleNamespace) -> list[bytes]:
    return [path.read_bytes() for path in sorted(run.crops.iterdir())]


def test_images_become_rows_with_what_their_json_says(
    run: SimpleNamespace, crops: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "READ_ROWS", 2)
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    write(folder / "a.tar", ("0001.png", crops[0]), ("0001.json", json.dumps(ABOUT).encode()), ("0001.cls", b"3"),
          ("x.y/0002.json", b'{"person": null}'), ("x.y/0002.png", crops[1]), ("0003.png", crops[2]))  # fmt: skip
    write(folder / "more/b.tar", ("0001.png", crops[3]), ("again.png", crops[0]))
    assert adding.add(run.cfg, str(folder), str(tmp_path / "shop"), given={"camera": "yard"}) == (4, 1, [])
    rows = {os.path.relpath(row["path"], folder): row for row in rows_of(Gallery.open(tmp_path / "shop"))[0]}
    assert rows.keys() == {"a.tar/0001.png", "a.tar/x.y/0002.png", "a.tar/0003.png", "more/b.tar/0001.png"}
    first = rows["a.tar/0001.png"]
    assert (first["person"], first["camera"], first["track"]) == ("7", "hall", "17")
    assert first["time"].isoformat() == "2026-03-01T12:00:00+00:00"
    other = rows["a.tar/x.y/0002.png"]
    assert (other["person"], other["camera"], other["time"]) == (None, "yard", None)
    assert first["id"] == blake2b(crops[0], digest_size=16).hexdigest()  # as of the file itself
    uri = (folder / "a.tar").as_uri()
    assert adding.add(run.cfg, uri, str(tmp_path / "shop")) == (0, 3, [])


def test_what_cannot_be_used_is_named(
    run: SimpleNamespace, crops: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(shards, "IMAGE_BYTES", 10_000)
    shard = write(tmp_path / "a.tar", ("good.png", crops[0]), entry("link.png", tarfile.SYMTYPE),
                  entry("hard.png", tarfile.LNKTYPE), entry("device.png", tarfile.CHRTYPE), ("/root.png", crops[1]),
                  ("../up.png", crops[1]), ("large.png", bytes(10_001)), ("text.png", b"no image"), ("empty.png", b""),
                  ("film.avif", b"?"), entry("folder", tarfile.DIRTYPE), ("naive.png", crops[2]),
                  ("naive.json", b'{"time": "2026-03-01"}'), ("deep.png", crops[3]), ("deep.json", b"[" * 99_999),
                  ("list.png", crops[4]), ("list.json", b"[1]"), ("odd.png", crops[5]),
                  ("odd.json", b'{"camera": {}}'), ("half.png", crops[6]),
                  ("half.json", b'{"person": "\\ud800"}'))  # fmt: skip
    done = adding.add(run.cfg, str(shard), str(tmp_path / "shop"))
    assert done[:2] == (1, 0)
    named = {Path(fault.partition(": ")[0]).name: fault.partition(": ")[2] for fault in done.faults}
    assert named.keys() == {
        *("link.png", "hard.png", "device.png", "root.png", "up.png", "large.png", "text.png", "empty.png"),
        *("naive.png", "deep.png", "list.png", "odd.png", "half.png"),
    }
    assert named["link.png"] == named["hard.png"] == named["device.png"] == "a link or a device"
    assert named["root.png"] == named["up.png"] == "its name leads out of the shard"
    assert "more than 10,000" in named["large.png"]
    assert "name its zone" in named["naive.png"]
    assert "1 members are no images and were left out, such as film.avif" in caplog.text


def cut(data: bytes) -> bytes:
    return data[:1600]


def without_end(data: bytes) -> bytes:
    return data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512)


def scratched(data: bytes) -> bytes:
    at = data.index(b"1.png\0")
    return data[:at] + b"!" + data[at + 1 :]


def huge(kind: bytes) -> Callable[[bytes], bytes]:
    """A header that announces far more than there is."""

    def damage(data: bytes) -> bytes:
        info = tarfile.TarInfo("1.json" if kind == tarfile.REGTYPE else "long.png")
        info.type, info.size = kind, 2**62
        return data[: data.index(b"1.png\0")] + info.tobuf(tarfile.GNU_FORMAT)

    return damage


def sparse(data: bytes) -> bytes:
    """A sparse file whose map never comes."""
    head = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(head)
    return data[: data.index(b"1.png\0")] + info.tobuf() + head.ljust(512, b"\0") + tarfile.TarInfo("1.png").tobuf()


@pytest.mark.parametrize("damage", [cut, without_end, scratched, huge(tarfile.REGTYPE), huge(tarfile.GNUTYPE_LONGNAME),
                                    huge(tarfile.XHDTYPE), sparse])  # fmt: skip
def test_a_damaged_shard_gives_what_is_before_the_damage_and_is_named(
    crops: list[bytes], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    whole = write(tmp_path / "whole.tar", ("0.png", bytes(500)), ("1.png", crops[1]), ("2.png", crops[2]))
    shard = tmp_path / "a.tar"
    shard.write_bytes(damage(whole.read_bytes()))
    first, *_ = read(shard)
    assert (first["path"], first["image"], first["fault"]) == (os.fsencode(shard / "0.png"), bytes(500), None)
    assert "not to its end" in faults(shard)["a.tar"]


@pytest.mark.parametrize("data", [b"", b"no tar" * 500, struct.pack("512s", b"\x1f\x8b")])
def test_what_is_no_shard_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    assert "cannot be read" in faults(tmp_path / "a.tar")["a.tar"]


def test_a_fifo_and_nothing_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    assert "not a regular file" in faults(tmp_path / "a.tar")["a.tar"]
    assert "No such file" in faults(tmp_path / "b.tar")["b.tar"]


def test_a_shard_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "TABLE_BYTES", 3_000)
    shard = write(tmp_path / "a.tar", *((f"{i}.png", bytes(1_000)) for i in range(9)))
    table = pa.table({"shard": pa.array([os.fsencode(shard)], pa.binary())})
    assert [len(part) for part in shards.unpacked(table)] == [3, 3, 3]


@pytest.mark.slow
def test_workers_of_a_cluster_read_shards_and_files(
    run: SimpleNamespace, crops: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'fusionreid[scale]'")
    import ray

    from tests import ROOT

    write(tmp_path / "a.tar", ("1.png", crops[0]), ("1.json", json.dumps(ABOUT).encode()), entry("2.png", b"2"))
    write(tmp_path / "b.tar", ("1.png", crops[1]))
    (tmp_path / "c.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:700])
    (tmp_path / "file.png").write_bytes(crops[2])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(adding, "unpacked", in_another_process(os.getpid()))
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        done = adding.add(run.cfg, str(tmp_path), str(tmp_path / "shop"), ray="auto")
    finally:
        ray.shutdown()
    assert done[:2] == (3, 0)
    assert [Path(fault.partition(": ")[0]).name for fault in sorted(done.faults)] == ["2.png", "c.tar"]
    rows = {Path(row["path"]).name: row for row in rows_of(Gallery.open(tmp_path / "shop"))[0]}
    assert rows["file.png"]["time"]


def in_another_process(process: int) -> Callable:
    def unpacked(table: "pa.Table") -> list["pa.Table"]:
        assert os.getpid() != process
        return list(shards.unpacked(table))

    return unpacked
