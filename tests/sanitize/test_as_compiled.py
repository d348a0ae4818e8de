"""Every kernel as compiled for sm_90, in every type, at sizes around its blocks: as accurate as plain torch."""

import pytest
import torch

from fusionreid import kernels
from fusionreid.kernels import _int8_products as int8
from fusionreid.kernels import augment, batch_hard_triplet, neighbours, rank_counts, ranking, reference, triplet
from fusionreid.kernels.augmentation import erase_rectangles
from tests.kernels.test_augmentation import SETTINGS, batch
from tests.kernels.test_class_attention import check_accuracy as check_class_attention
from tests.kernels.test_cross_entropy import check as check_cross_entropy
from tests.kernels.test_dual_attention import check_accuracy as check_self_attention
from tests.kernels.test_dual_attention import with_gradients
from tests.kernels.test_ranking import assert_equal, made_up, made_up_ids
from tests.kernels.test_triplet import assert_same
from tests.kernels.test_triplet_kernels import mined_and_gradients
from tests.numerics import assert_as_accurate

pytestmark = [pytest.mark.sanitize, pytest.mark.usefixtures("triton_path")]
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)  # torch's kernels take float32
types = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


# One below, at and above the blocks of queries and keys; 65, 129: the class token is taken apart.
@halves
@pytest.mark.parametrize(
    "shape",
    [
        *((2, 15, 2, 16), (2, 16, 2, 32), (1, 17, 3, 48), (1, 63, 2, 64), (2, 64, 1, 64), (1, 65, 2, 64)),
        *((1, 128, 2, 64), (1, 129, 2, 64), (1, 130, 2, 48), (1, 193, 2, 64), (1, 211, 2, 64), (1, 256, 2, 32)),
    ],
)
def test_self_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_self_attention(shape, dtype)


@halves
def test_self_attention_of_two_streams(dtype: torch.dtype) -> None:
    qkv = [torch.randn(2, n, 3, 2, 32).to(dtype) for n in (65, 40)]
    upstream = [torch.randn(2, n, 64).to(dtype) for n in (65, 40)]
    out, low = (with_gradients(op.dual_self_attention, qkv, upstream) for op in (kernels, reference))
    gold = with_gradients(reference.dual_self_attention, [x.double() for x in qkv], upstream)
    for name, *values in zip(("output a", "output b", "gradient a", "gradient b"), out, low, gold):
        assert_as_accurate(name, *values)


# Blocks of 16 tokens, 14 heads and 128 columns.
@types
@pytest.mark.parametrize("shape", [(2, 15, 13, 2, 127), (2, 16, 14, 2, 128), (2, 17, 15, 2, 129), (1, 33, 12, 64, 768)])
def test_class_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_class_attention(shape, dtype)


# True: in the tiles of a large batch.
@types
@pytest.mark.parametrize(
    ("images", "widths", "large"),
    [
        *((15, (31,), False), (16, (32, 7), False), (17, (33, 257), False), (49, (64,), False)),
        *((127, (15,), True), (128, (16, 3), True), (129, (17,), True), (257, (33,), True)),
    ],
)
def test_triplet(
    images: int, widths: tuple[int, ...], large: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triplet, "SMALL", 0 if large else 1024)
    margin = 0.3 if images % 2 else None
    persons, upstream = torch.randint(0, images // 4, (images,)), torch.randn(len(widths))
    x = [(3 + torch.randn(images, width + 5)).to(dtype)[:, :width] for width in widths]  # rows lie apart
    mined, out = mined_and_gradients(batch_hard_triplet, x, persons, upstream, margin=margin)
    _, low = mined_and_gradients(reference.batch_hard_triplet, x, persons, upstream, margin=margin)
    doubles = [t.double() for t in x]
    exact, gold = mined_and_gradients(reference.batch_hard_triplet, doubles, persons, upstream, margin=margin)
    for name, *values in zip(("losses", *("gradient" for _ in x)), out, low, gold):
        assert_as_accurate(name, *values)
    assert_same(mined, exact)


# Blocks of 128 to 4096 classes.
@types
@pytest.mark.parametrize(
    ("images", "classes", "heads"),
    [(2, 127, 2), (3, 128, 1), (2, 129, 3), (3, 751, 6), (2, 4095, 1), (2, 4096, 2), (2, 4097, 2)],
)
def test_cross_entropy(images: int, classes: int, heads: int, dtype: torch.dtype) -> None:
    check_cross_entropy(images, classes, heads, dtype, 0.1)


# Blocks of 32 rows and 128 values, three per pixel.
@types
@pytest.mark.parametrize(("height", "width"), [(31, 42), (32, 43), (33, 43), (64, 128), (7, 3)])
def test_augmentation(height: int, width: int, dtype: torch.dtype) -> None:
    inputs = batch(5, height, width, reach=min(height, width, 6))
    inputs["erase"][:3] = torch.tensor([[0, 0, height, width], [height // 2, 1, 1, 1], [1, width // 2, height - 2, 1]])
    out = augment(**inputs, dtype=dtype, **SETTINGS)
    low, gold = (reference.augment(**inputs, dtype=kind, **SETTINGS) for kind in (dtype, torch.float64))
    assert_as_accurate("images", out, low, gold)
    clean = augment(**inputs | {"erase": torch.zeros_like(inputs["erase"])}, dtype=dtype, **SETTINGS)
    place = {"seed": SETTINGS["seed"], "epoch": SETTINGS["epoch"]}
    assert torch.equal(erase_rectangles(clean, inputs["erase"], inputs["index"], **place), out)


@pytest.fixture
def several_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the gallery, and blocks of queries; and the plain path cannot help out."""
    monkeypatch.setattr(ranking, "QUERIES", 100)
    monkeypatch.setattr(neighbours, "QUERIES", 100)
    monkeypatch.setattr(int8, "SPAN", 256)
    monkeypatch.delattr(ranking, "_count_features")
    monkeypatch.delattr(neighbours, "_nearest_by_blocks")


# Tiles of 128 rows, parts of 64 columns.
RETRIEVAL = [(7, 127, 63, "near"), (3, 128, 64, "ties"), (129, 129, 65, "spread"), (2, 257, 130, "ties")]


@types
@pytest.mark.usefixtures("several_spans")
@pytest.mark.parametrize(("queries", "gallery", "width", "kind"), RETRIEVAL)
def test_rank_counts(queries: int, gallery: int, width: int, kind: str, dtype: torch.dtype) -> None:
    features = [x.to(dtype) for x in made_up(queries, gallery, width, kind, seed=width)]
    ids = made_up_ids(queries, gallery, 20, 3, seed=width)
    assert_equal(rank_counts(*features, *ids), reference.rank_counts(*features, *ids))


@types
@pytest.mark.usefixtures("several_spans")
@pytest.mark.parametrize(("queries", "gallery", "width", "kind"), RETRIEVAL)
def test_nearest_neighbours(queries: int, gallery: int, width: int, kind: str, dtype: torch.dtype) -> None:
    query, items = (x.to(dtype) for x in made_up(queries, gallery, width, kind, seed=width))
    found, expected = (op.nearest_neighbours(query, items, 20) for op in (kernels, reference))
    assert found.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(found.distances, expected.distances, rtol=1e-14, atol=1e-14)
