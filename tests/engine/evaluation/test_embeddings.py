"""Embeddings on disk: whole or not there, and no byte is believed that is not as it was written."""

import json
import os
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch

from fusionreid.dataloading.records import Record
from fusionreid.engine.command import OutputFolderError
from fusionreid.engine.evaluation import embeddings
from fusionreid.engine.evaluation.embeddings import EmbeddingsError
from fusionreid.engine.storage import StorageError

RECORDS = tuple(Record(f"image-{i}.jpg", i % 3, i % 2) for i in range(7))
FEATURES = torch.arange(28, dtype=torch.float32).view(7, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embeddings of two processes."""
    folder = tmp_path / "embeddings"
    embeddings.begin(folder)
    files = [
        embeddings.write_rows(folder, rows.split(2), rows.shape, (i, 2)) for i, rows in enumerate(FEATURES.split(4))
    ]
    embeddings.finish(folder, embeddings.index_of(files, 4, RECORDS, 3, {"data": "made up", "share": 0.1}))
    return folder


def test_rows_of_all_processes_are_read_in_order(folder: Path) -> None:
    found = embeddings.load(folder)
    assert torch.equal(found.features, FEATURES)
    assert (found.records, found.num_query, found.source) == (RECORDS, 3, {"data": "made up", "share": 0.1})
    arrays = [np.load(path) for path in sorted(folder.glob("features-*-of-00002.npy"))]
    np.testing.assert_array_equal(np.concatenate(arrays), FEATURES)


def test_every_flipped_bit_is_noticed(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        generator = torch.Generator().manual_seed(len(content))
        for bit in torch.randint(8 * len(content), (200,), generator=generator).tolist():
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(EmbeddingsError, match="embed again"):
                embeddings.load(folder)
        path.write_bytes(content)
    assert torch.equal(embeddings.load(folder).features, FEATURES)


@pytest.mark.parametrize("name", ["index.json", "features-00001-of-00002.npy"])
@pytest.mark.parametrize("change", ["truncated", "longer", "gone", "FIFO", "folder"])
def test_a_damaged_file_is_named_and_nothing_hangs(folder: Path, name: str, change: str) -> None:
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    match change:
        case "truncated":
            path.write_bytes(content[:-5])
        case "longer":
            path.write_bytes(content + b"0")
        case "FIFO":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
    with pytest.raises(EmbeddingsError, match="holds no whole embeddings"):
        embeddings.load(folder)


def test_a_file_that_shrinks_after_it_was_read_changes_nothing(folder: Path) -> None:
    """A mapped one would end the process with SIGBUS."""
    found = embeddings.load(folder)
    for path in folder.iterdir():
        os.truncate(path, 0)
    assert torch.equal(found.features, FEATURES)


@pytest.mark.parametrize(
    "wrong",
    [
        {"queries": -3}, {"queries": "3"}, {"queries": 8}, {"source": None}, {"source": {"data": 0.5}},
        {"persons": ["1"] * 7}, {"paths": [1] * 7},
        {"width": 2**60}, {"width": 0}, {"files": []}, {"files": [{"name": "../x.npy", "rows": 7, "digest": ""}]},
        {"more": 1}, {"cameras": [0.5] * 7},
    ],
)  # fmt: skip
def test_a_forged_index_is_refused(folder: Path, wrong: dict) -> None:
    """Even one with the right digest of itself."""
    index = {**json.loads((folder / "index.json").read_bytes()), **wrong}
    del index["digest"]
    digest = blake2b(json.dumps(index).encode(), digest_size=32).hexdigest()
    (folder / "index.json").write_text(json.dumps({**index, "digest": digest}, indent=2) + "\n")
    with pytest.raises(EmbeddingsError, match="holds no whole embeddings"):
        embeddings.load(folder)


@pytest.mark.parametrize("text", [b"[]", b"7", b"{", b"", b"[" * 100_000, b'{"format": 2}'])
def test_other_json_is_refused(folder: Path, text: bytes) -> None:
    (folder / "index.json").write_bytes(text)
    with pytest.raises(EmbeddingsError, match="embed again"):
        embeddings.load(folder)


def test_the_format_of_one_file_asks_to_embed_again(tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", FEATURES)
    index = {"format": 1, "rows": 7, "width": 4, "queries": 3, "source": {}, "persons": [0] * 7, "cameras": [0] * 7,
             "paths": ["x"] * 7}  # fmt: skip
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(EmbeddingsError, match="of format 1, this is 2: embed again"):
        embeddings.load(tmp_path)
    embeddings.check_place(tmp_path)  # and it may be replaced
    embeddings.save(tmp_path, FEATURES, RECORDS, 0, {})
    assert not (tmp_path / "features.npy").exists()


def test_embeddings_are_replaced_whole(folder: Path) -> None:
    embeddings.begin(folder)
    file = embeddings.write_rows(folder, [2 * FEATURES], (7, 4))
    assert torch.equal(embeddings.load(folder).features, FEATURES)
    embeddings.finish(folder, embeddings.index_of([file], 4, RECORDS, 3, {}))
    assert torch.equal(embeddings.load(folder).features, 2 * FEATURES)
    assert [path.name for path in folder.parent.iterdir()] == ["embeddings"]


def test_files_of_a_host_with_another_disk_are_missed(folder: Path) -> None:
    embeddings.begin(folder)
    here = embeddings.write_rows(folder, [FEATURES[:4]], (4, 4), (0, 2))
    there = embeddings.write_rows(folder, [FEATURES[4:]], (3, 4), (1, 2))
    (folder.with_name(f".{folder.name}.new") / there.name).unlink()
    with pytest.raises(
        OutputFolderError, match=r"disk that all hosts share, and is not.*does not see features-00001-of-00002"
    ):
        embeddings.finish(folder, embeddings.index_of([here, there], 4, RECORDS, 0, {}))
    assert torch.equal(embeddings.load(folder).features, FEATURES)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="make room or set another folder"):
        embeddings.save(tmp_path / "embeddings", FEATURES, RECORDS, 0, {})
    assert not (tmp_path / "embeddings").exists()
