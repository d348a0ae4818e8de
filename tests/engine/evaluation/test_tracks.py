"""Tracks: the mean of unit vectors, and what the images of a track agree on."""

import torch
import torch.nn.functional as F

from fusionreid.dataloading.records import Record
from fusionreid.engine.evaluation.embeddings import Embeddings
from fusionreid.engine.evaluation.tracks import pool, tracks_by_folder


def test_a_long_vector_counts_no_more_than_a_short_one_and_order_does_not_matter() -> None:
    features = torch.tensor([[1.0, 0], [0, 5], [3, 4], [2, 0]])
    records = tuple(Record(f"{i}.jpg", 1, i // 2) for i in range(4))
    tracks = pool(Embeddings(features, records, 0, {}), ["b", "a", "b", "a"], ["x", "y", "x", "y"])
    assert (tracks.tracks, tracks.sizes) == (("x", "y"), (2, 2))
    expected = F.normalize(torch.tensor([[1 + 0.6, 0.8], [1, 1]]))
    torch.testing.assert_close(tracks.features, expected)
    torch.testing.assert_close(tracks.features.norm(dim=1), torch.ones(2))
    assert [record.path for record in tracks.records] == ["0.jpg", "1.jpg"]
    assert [(record.person, record.camera) for record in tracks.records] == [(1, -1), (1, -1)]  # two cameras


def test_many_images_give_the_mean_whatever_the_blocks_and_show_the_one_most_like_it() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(9001, 5, generator=generator) + torch.tensor([2.0, 0, 0, 0, 0])
    records = tuple(Record(f"{i % 3}/{i}.jpg", 7, 1) for i in range(9001))
    tracks = tracks_by_folder(Embeddings(features, records, 0, {}))
    assert (tracks.tracks, tracks.sizes) == (("0", "1", "2"), (3001, 3000, 3000))
    unit = F.normalize(features.double())
    for i, record in enumerate(tracks.records):
        mean = F.normalize(unit[i::3].mean(0), dim=0)
        torch.testing.assert_close(tracks.features[i].double(), mean, rtol=0, atol=1e-7)
        assert record == Record(f"{i}/{i + 3 * int((unit[i::3] @ mean).argmax())}.jpg", 7, 1)


def test_the_tracks_of_a_folder_are_parted_by_person_and_camera_where_they_are_known() -> None:
    records = tuple(Record(f"gallery/{i}.jpg", i // 2, i % 2) for i in range(4))
    tracks = tracks_by_folder(Embeddings(torch.eye(4), records, 0, {}))
    assert tracks.sizes == (1, 1, 1, 1)
    assert tracks.records == records
