"""Adding images: never twice and none lost, whatever ends a writer and however many there are."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fusionreid.engine.embedder import Embedder
from fusionreid.errors import ReIDError, StorageError
from tests import ROOT
from tests.engine.galleries.conftest import CROPS

pa = pytest.importorskip("pyarrow", reason="LanceDB is not installed: pip install 'fusionreid[gallery]'")
pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install 'fusionreid[gallery]'")
from fusionreid.engine.galleries import adding, stages  # noqa: E402
from fusionreid.engine.galleries.find import rows_of  # noqa: E402
from fusionreid.engine.galleries.table import Gallery, GalleryError, is_gallery, schema  # noqa: E402


def content(place: Path) -> "pa.Table":
    return Gallery.open(place).table.to_arrow().sort_by("id")


def test_the_vectors_are_those_of_the_embedder_and_a_second_time_adds_nothing(
    run: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "READ_ROWS", 16)
    monkeypatch.setattr(stages, "COMMIT_ROWS", 20)
    place = tmp_path / "shop"
    assert adding.add(run.cfg, str(run.crops), str(place), dtype="fp32") == (CROPS, 0, [])
    assert is_gallery(place)
    assert is_gallery(f"{place}.lance")
    versions = Gallery.open(place).changes()
    rows, vectors = rows_of(Gallery.open(place))
    expected = Embedder(run.cfg, device="cpu")([row["path"] for row in rows])
    np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-6)
    assert sorted(row["path"] for row in rows) == sorted(map(str, run.crops.iterdir()))
    assert adding.add(run.cfg, str(run.crops), str(place)) == (0, CROPS, [])
    assert Gallery.open(place).changes() == versions


def test_commits_grow_with_the_gallery_during_one_run(
    run: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "READ_ROWS", 4)
    monkeypatch.setattr(stages, "commit_rows", lambda rows, width, dtype: max(4, rows))  # all of it, not a hundredth
    assert adding.add(run.cfg, str(run.crops), str(tmp_path / "shop")).added == CROPS
    assert [change.rows for change in Gallery.open(tmp_path / "shop").changes()] == [0, 4, 8, 16, 32, CROPS]


def test_a_list_names_persons_cameras_and_times_and_a_bad_or_equal_image_stops_nobody(
    run: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("00.png", "01.png"):
        shutil.copy(run.crops / name, tmp_path / name)
    shutil.copy(tmp_path / "00.png", tmp_path / "copy.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n and no more")
    lines = ["00.png,007,hall,2026-03-01T12:00:00Z", "01.png,,,", "copy.png,,,", "bad.png,,,", "gone.png,,,"]
    (tmp_path / "list.csv").write_text("path,person,camera,time\n" + "\n".join(lines))
    done = adding.add(run.cfg, str(tmp_path / "list.csv"), str(tmp_path / "shop"), given={"camera": "yard"})
    assert done[:2] == (2, 1)
    assert [Path(fault.split(": ")[0]).name for fault in done.faults] == ["bad.png", "gone.png"]
    assert "2 images cannot be used" in caplog.text
    rows = {Path(row["path"]).name: row for row in rows_of(Gallery.open(tmp_path / "shop"))[0]}
    assert (rows["00.png"]["person"], rows["00.png"]["camera"]) == ("007", "hall")
    assert rows["00.png"]["time"].isoformat() == "2026-03-01T12:00:00+00:00"
    assert (rows["01.png"]["person"], rows["01.png"]["camera"], rows["01.png"]["time"]) == (None, "yard", None)


def test_a_parquet_list_may_bring_the_bytes_of_its_images(run: SimpleNamespace, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    images = [path.read_bytes() for path in sorted(run.crops.iterdir())[:3]]
    pq.write_table(pa.table({"image": images, "person": ["a", "a", "b"]}), tmp_path / "list.parquet")
    assert adding.add(run.cfg, str(tmp_path / "list.parquet"), str(tmp_path / "shop")) == (3, 0, [])
    adding.add(run.cfg, str(run.crops), str(tmp_path / "other"))
    both = [{row["id"] for row in rows_of(Gallery.open(tmp_path / name))[0]} for name in ("shop", "other")]
    assert both[0] < both[1]


def test_vectors_of_another_model_or_setting_are_refused(run: SimpleNamespace, tmp_path: Path) -> None:
    adding.add(run.cfg, str(run.crops / "00.png"), str(tmp_path / "shop"))
    test = run.cfg.TEST.model_copy(update={"NECK_FEAT": "after"})
    with pytest.raises(GalleryError, match=r"another model .* embed its images again into a new gallery"):
        adding.add(run.cfg.model_copy(update={"TEST": test}), str(run.crops), str(tmp_path / "shop"))
    assert len(Gallery.open(tmp_path / "shop")) == 1


def test_a_folder_without_images_is_an_error(run: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ReIDError, match="holds no images"):
        adding.add(run.cfg, str(tmp_path), str(tmp_path / "shop"))


def test_a_name_that_is_no_text_is_embedded_and_shown(run: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copy(run.crops / "00.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    assert adding.add(run.cfg, str(tmp_path), str(tmp_path / "shop")) == (1, 0, [])
    assert rows_of(Gallery.open(tmp_path / "shop"))[0][0]["path"].endswith(r"caf\xe9.png")


@pytest.mark.parametrize(("name", "text", "message"), [
    ("list.csv", "path,time\n00.png,then\n", "time with its zone"),
    ("list.csv", "file\n00.png\n", "needs the column path"),
    ("list.csv", "", "cannot be read"), ("list.parquet", "no Parquet", "cannot be read"),
])  # fmt: skip
def test_a_list_that_cannot_be_read(run: SimpleNamespace, tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ReIDError, match=message):
        adding.add(run.cfg, str(tmp_path / name), str(tmp_path / "shop"))


@pytest.mark.parametrize("images", ["nothing", "nothing.csv", "nothing.parquet", "no://bucket/crops"])
def test_images_that_are_not_there(run: SimpleNamespace, tmp_path: Path, images: str) -> None:
    with pytest.raises(ReIDError, match=r"there is no|cannot be read"):
        adding.add(run.cfg, images, str(tmp_path / "shop"))


@pytest.mark.parametrize("place", ["", "/", "..", "a/my shop", "s3://bucket", "caf\u00e9"])
def test_a_place_that_cannot_be_a_gallery(run: SimpleNamespace, tmp_path: Path, place: str) -> None:
    with pytest.raises(ReIDError, match="cannot be a gallery: name it as in"):
        Gallery.create(place, "model", 8)


def test_kill_9_in_the_middle_loses_no_row_and_the_next_time_adds_the_rest(
    run: SimpleNamespace, tmp_path: Path
) -> None:
    place = tmp_path / "shop"
    script = f"""
import sys, time
from fusionreid.engine import cli
from fusionreid.engine.galleries import stages
stages.READ_ROWS, stages.COMMIT_ROWS = 4, 4
write = stages.write
def slowly(*args, **kwargs):
    time.sleep(0.2)
    return write(*args, **kwargs)
stages.write = slowly
sys.exit(cli.main(["embed", "--config_file", *{[str(run.file), "--images", str(run.crops), "--to", str(place)]!r}]))
"""
    writer = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while writer.poll() is None and (not is_gallery(place) or len(Gallery.open(place).changes()) < 4):
        time.sleep(0.02)
    os.kill(writer.pid, signal.SIGKILL)
    _, text = writer.communicate(timeout=60)
    assert writer.returncode == -signal.SIGKILL, text
    kept = content(place)["id"].to_pylist()
    assert 0 < len(kept) < CROPS
    done = adding.add(run.cfg, str(run.crops), str(place))
    assert done == (CROPS - len(kept), len(kept), [])
    ids = content(place)["id"].to_pylist()
    assert len(ids) == len(set(ids)) == CROPS
    assert set(kept) < set(ids)


def test_ids_are_indexed_while_a_gallery_grows(
    run: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, value in (stages, "READ_ROWS", 4), (stages, "COMMIT_ROWS", 8), (adding, "INDEXED_ROWS", 16):
        monkeypatch.setattr(module, name, value)
    assert adding.add(run.cfg, str(run.crops), str(tmp_path / "shop")).added == CROPS == 40
    index = Gallery.open(tmp_path / "shop").table.index_stats("id_idx")
    assert (index.num_indexed_rows, index.num_unindexed_rows) == (32, 8)


def merge_again_and_again(place: str, barrier: Any) -> None:
    gallery = Gallery.open(place)
    for start in range(0, 200, 25):
        rows = {"id": [str(i) for i in range(start, start + 25)], "vector": [[0.5] * 8] * 25}
        others = {name: [None] * 25 for name in gallery.table.schema.names if name not in rows}
        barrier.wait()
        gallery.add(pa.table({**rows, **others}, schema=gallery.table.schema))
        with suppress(StorageError):
            gallery.index_ids()


def test_writers_that_add_one_image_at_once_leave_one_row(tmp_path: Path) -> None:
    Gallery.create(tmp_path / "shop", "model", 8)
    start = multiprocessing.get_context("spawn")
    barrier = start.Barrier(2)
    writers = [start.Process(target=merge_again_and_again, args=(str(tmp_path / "shop"), barrier)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    ids = content(tmp_path / "shop")["id"].to_pylist()
    assert len(ids) == len(set(ids)) == 200


def test_two_writers_of_other_models_cannot_mix(tmp_path: Path) -> None:
    Gallery.create(tmp_path / "shop", "one", 8)
    with pytest.raises(GalleryError, match="another model"):
        Gallery.create(tmp_path / "shop", "two", 8)
    with pytest.raises(GalleryError, match="fp16, not in fp32"):
        Gallery.create(tmp_path / "shop", "one", 8, "fp32")
    assert schema("one", 8, "fp16") == Gallery.open(tmp_path / "shop").table.schema


@pytest.mark.slow
def test_a_ray_worker_that_is_killed_changes_nothing(
    run: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'fusionreid[scale]'")
    import ray

    killed, make = tmp_path / "killed", stages.Embed

    def dies_once(*args: Any) -> Any:
        def embed(table: "pa.Table") -> "pa.Table":
            if not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(table)

        whole = make(*args)
        return embed

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(stages, "READ_ROWS", 8)
    adding.add(run.cfg, str(run.crops), str(tmp_path / "here"))
    monkeypatch.setattr(stages, "Embed", dies_once)
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        assert adding.add(run.cfg, str(run.crops), str(tmp_path / "cluster"), ray="auto") == (CROPS, 0, [])
    finally:
        ray.shutdown()
    assert killed.exists()
    near = [content(tmp_path / name) for name in ("here", "cluster")]
    assert near[0].drop_columns(["vector"]).equals(near[1].drop_columns(["vector"]))
    np.testing.assert_allclose(*(stages_vectors(table) for table in near), atol=2e-3)


def stages_vectors(table: "pa.Table") -> np.ndarray:
    from fusionreid.engine.galleries.find import vectors_of

    return vectors_of(table).numpy()


def test_a_commit_grows_with_the_gallery_up_to_a_limit_of_memory() -> None:
    assert stages.commit_rows(0, 512, "fp16") == stages.commit_rows(400_000, 512, "fp16") == stages.COMMIT_ROWS
    assert stages.commit_rows(1_000_000, 512, "fp16") == 10_000
    assert stages.commit_rows(10**8, 512, "fp16") == 2 * stages.commit_rows(10**8, 512, "fp32") == 2**16
    assert stages.commit_rows(10**8, 5888, "fp16") == stages.COMMIT_BYTES // (2 * 5888)
