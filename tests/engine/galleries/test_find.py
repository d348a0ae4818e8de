"""Searching: the exact answer whatever the pieces, filters in the database, an index, and nobody as an answer."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="LanceDB is not installed: pip install 'fusionreid[gallery]'")
pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install 'fusionreid[gallery]'")
from fusionreid.engine import cli  # noqa: E402
from fusionreid.engine.galleries import find  # noqa: E402
from fusionreid.engine.galleries.table import Gallery, GalleryError, condition  # noqa: E402

ITSELF = r"(?:1\.000000|0\.999999)\d"  # the cosine of an image, in fp16, and itself
ROWS, WIDTH, NOON = 600, 16, datetime(2026, 3, 1, 12, tzinfo=UTC)


def unit(count: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def fill(gallery: Gallery, vectors: np.ndarray, **columns: list[Any]) -> None:
    columns = {name: [None] * len(vectors) for name in gallery.table.schema.names} | columns
    columns |= {"id": [f"{i:04}" for i in range(len(vectors))], "vector": list(vectors.astype(np.float16))}
    gallery.add(pa.table(columns, schema=gallery.table.schema))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """A gallery of 600 images, a minute apart, by three cameras in turn; every tenth is of O'Hara."""
    gallery = Gallery.create(tmp_path_factory.mktemp("find") / "shop", "model", WIDTH)
    fill(gallery, unit(ROWS, 0), path=[f"{i}.jpg" for i in range(ROWS)], camera=[f"c{i % 3}" for i in range(ROWS)],
         person=[None if i % 10 else "O'Hara" for i in range(ROWS)],
         time=[NOON + timedelta(minutes=i) for i in range(ROWS)])  # fmt: skip
    return gallery


def ids(found: find.Found) -> list[list[str]]:
    return [[found.rows["id"][i].as_py() for i in row] for row in found.positions.tolist()]


@pytest.mark.parametrize("num_bytes", [1, 2**28])
def test_the_exact_search_is_that_of_all_pairs(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    monkeypatch.setattr(find, "BYTES", num_bytes)
    monkeypatch.setattr(find, "FEWEST_AT_ONCE", 37)
    rows, vectors = find.rows_of(gallery)
    queries = unit(5, 1)
    stored = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    cosines = queries.astype(np.float64) @ stored.T
    best = np.argsort(-cosines, axis=1, kind="stable")[:, :10]
    found = find.exact(gallery, queries, 10)
    assert ids(found) == [[rows[i]["id"] for i in row] for row in best.tolist()]
    np.testing.assert_allclose(found.cosines, np.take_along_axis(cosines, best, 1), atol=1e-6)


def test_filters_hold_in_both_searches(gallery: Gallery) -> None:
    after = NOON + timedelta(minutes=300)
    where = condition(person="O'Hara", since=after, camera=["c0", "c1"], seen=("c0", after + timedelta(minutes=30)))
    times = [row["time"] for row in find.exact(gallery, unit(1, 2), ROWS, where).rows.to_pylist()]
    expected = {NOON + timedelta(minutes=i) for i in range(300, ROWS, 10) if i % 3 != 2 and i != 330}
    assert set(times) == expected
    assert len(times) == len(expected)
    find.build_index(gallery, "ivf_pq")
    near = find.indexed(gallery, unit(1, 2), ROWS, where)
    assert {row["time"] for row in near.rows.to_pylist()} <= expected


@pytest.mark.parametrize("kind", ["ivf_pq", "hnsw"])
def test_an_index_tells_its_recall_and_its_cosines_are_exact(gallery: Gallery, kind: str) -> None:
    assert 0.5 < find.build_index(gallery, kind) <= 1
    queries = unit(4, 3)
    right, near = find.exact(gallery, queries, ROWS), find.indexed(gallery, queries, 3)
    for row in range(4):
        exact = dict(zip(ids(right)[row], right.cosines[row]))
        np.testing.assert_allclose(near.cosines[row], [exact[id] for id in ids(near)[row]], atol=2e-3)


def test_a_search_without_an_index_or_of_another_width_says_so(tmp_path: Path, gallery: Gallery) -> None:
    small = Gallery.create(tmp_path / "small", "model", WIDTH)
    with pytest.raises(GalleryError, match="has no index: fusionreid gallery index"):
        find.indexed(small, unit(1, 0), 1)
    with pytest.raises(GalleryError, match="an index needs 256"):
        find.build_index(small)
    with pytest.raises(GalleryError, match=r"queries must be \(Q, 16\)"):
        find.exact(gallery, np.ones((1, 3)), 1)
    assert find.matches(find.exact(small, unit(2, 0), 5)) == [[], []]


def test_images_of_a_track_are_one_match_and_nobody_is_an_answer(tmp_path: Path) -> None:
    gallery = Gallery.create(tmp_path / "shop", "model", WIDTH)
    fill(gallery, np.eye(WIDTH, dtype=np.float32)[[0, 1, 2, 3]] + 0.1 * np.eye(WIDTH, dtype=np.float32)[4],
         track=["t", "t", None, "t"], camera=["c", "c", "c", "d"], path=["a", "b", "e", "f"])  # fmt: skip
    query = np.array([[4, 3, 2, 1, *[0] * 12]], np.float32)
    (matches,) = find.matches(find.exact(gallery, query / np.linalg.norm(query), 4))
    assert [(match["path"], match.get("track"), match.get("images")) for match in matches] == [
        ("a", "t", 2), ("e", None, None), ("f", "t", 1)]  # fmt: skip
    assert find.matches(find.exact(gallery, query, 4), at_least=0.99) == [[]]


def test_the_command_finds_an_image_in_its_gallery_and_refuses_another_model(
    run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop, query, config = str(tmp_path / "shop"), str(run.crops / "03.png"), ["--config_file", str(run.file)]
    assert cli.main(["embed", *config, "--images", str(run.crops), "--to", shop, "--camera", "hall"]) == 0
    search = ["search", *config, "--query", query, "--gallery", shop, "--top", "2"]
    assert cli.main([*search, "--seen", "hall", "2020-01-01"]) == 0
    assert re.search(rf"^     1  {ITSELF}  {re.escape(query)}  hall", capsys.readouterr().out, re.MULTILINE)
    assert cli.main([*search, "--since", "2100-01-01"]) == 0
    assert "nobody" in capsys.readouterr().out
    assert cli.main([*search, "--picture", f"{tmp_path}/found.html"]) == 0
    assert (tmp_path / "found.html").stat().st_size > 1000
    assert cli.main(["search", "--query", shop, "--gallery", shop, "--top", "1"]) == 0
    assert len(re.findall(rf"^     1  {ITSELF}  ", capsys.readouterr().out, re.MULTILINE)) == len(
        [*run.crops.iterdir()]
    )
    assert cli.main([*search, "TEST.NECK_FEAT=after"]) == 2
    assert "another model" in capsys.readouterr().err
    assert cli.main([*search, "--tracks"]) == 2
    assert cli.main(["search", *config, "--query", query, "--gallery", str(run.crops), "--person", "a"]) == 2
    assert "--person is for a gallery" in capsys.readouterr().err
