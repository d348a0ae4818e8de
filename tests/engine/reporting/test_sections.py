"""The suggested threshold in plain words, the heat map of cameras, and queries without a match."""

import pytest

from fusionreid.engine.evaluation.names import cosine_text
from fusionreid.engine.reporting.run_record import CameraPair, Metrics, Pairs, Result, Threshold
from fusionreid.engine.reporting.sections import (
    SHOWN_CAMERAS,
    camera_sections,
    confusion_sections,
    explained,
    pair_sections,
    result_sections,
    suggested,
)

RESULT = {"mAP": 0.5, "mINP": 0.25, "cmc": [0.75, 1.0], "valid_queries": 15}
NBSP = "\N{NO-BREAK SPACE}"


def pairs(same: int, other: int, measure: str = "cosine") -> Pairs:
    counts = [0, same, 0], [0, other, 0]
    edges = [-1.0, 0.0, 0.5, 1.0]
    return Pairs(
        measure=measure, same_person=same, other_person=other, edges=edges, same_counts=counts[0],
        other_counts=counts[1], roc=[(1 / other, 0.1), (1.0, 1.0)],
    )  # fmt: skip


def points(*rates: float, cosine: float | None = 0.61) -> list[Threshold]:
    return [
        Threshold(false_positive_rate=rate, true_positive_rate=0.58, distance=0.78, cosine=cosine) for rate in rates
    ]


@pytest.mark.parametrize(
    ("same", "other", "rates", "text"),
    [
        (
            500,
            40_000,
            (1e-4, 1e-3, 1e-2),
            "Cosine ≥ 0.610 finds 58.0 % of true pairs and accepts 1 in 1,000 false ones.",
        ),
        (500, 29_999, (1e-4, 1e-3, 1e-2), "Cosine ≥ 0.610 finds 58.0 % of true pairs and accepts 1 in 100 false ones."),
        (
            *(12, 150, (1e-2,)),
            "Cosine ≥ 0.610 finds 58.0 % of true pairs and accepts 1 in 100 false ones. Too few pairs to trust: it "
            "rests on 1 false pairs of 150 and there are only 12 true pairs; 30 are the least.",
        ),
        (12, 99, (), "99 pairs of two persons are too few to suggest a threshold; 100 are the least."),
    ],
)
def test_the_suggestion_is_in_plain_words(same: int, other: int, rates: tuple[float, ...], text: str) -> None:
    counted, thresholds = pairs(same, other), points(*rates)
    said = explained(counted, suggested(counted, thresholds))
    assert said.replace(NBSP, " ") == text
    first, second = pair_sections(Metrics(pairs=counted, thresholds=thresholds))
    assert first.lead == said
    assert (first.table is None) == (not rates)
    assert second.chart is not None


def test_features_of_any_length_have_a_distance() -> None:
    counted, (point,) = pairs(500, 40_000, "distance"), points(1e-3, cosine=None)
    assert explained(counted, point).replace(NBSP, " ").startswith("Distance ≤ 0.883 finds")


@pytest.mark.parametrize(
    ("cosine", "text"),
    [
        (0.61, "0.610"),
        (-0.2, "-0.200"),
        (0.9, "0.900"),
        (0.99493, "0.99493"),
        (1.0, "1.0000000"),
        (1.0000001, "1.0000001"),
    ],
)
def test_cosines_near_one_are_told_apart(cosine: float, text: str) -> None:
    assert cosine_text(cosine) == text


def test_cameras_have_their_names_and_a_heat() -> None:
    found = [
        CameraPair(query="front door", gallery="hall", num_valid=1234, mAP=0.75),
        CameraPair(query="hall", gallery="garden", num_valid=3, mAP=0.25),
    ]
    (section,) = camera_sections(found)
    assert section.table is not None
    assert list(section.table.head)[1:] == ["front door", "hall", "garden"]
    texts = [[(cell.text, cell.note) for cell in row] for row in section.table.rows]
    none = ("\N{EN DASH}", "")
    assert texts == [
        [("front door", ""), none, ("75.0", "1,234"), none],
        [("hall", ""), none, none, ("25.0", "3")],
        [("garden", ""), none, none, none],
    ]
    heats = [cell.heat for row in section.table.rows for cell in row if cell.heat is not None]
    assert heats == sorted(heats, reverse=True)
    assert len(heats) == 2


def test_of_many_cameras_those_with_the_most_queries_are_shown() -> None:
    names = [f"cam {i}" for i in range(SHOWN_CAMERAS + 10)]
    found = [CameraPair(query=a, gallery=b, num_valid=i, mAP=0.5) for i, a in enumerate(names) for b in names if a != b]
    (section,) = camera_sections(found)
    assert section.table is not None
    assert list(section.table.head)[1:] == names[10:]
    assert f"most queries of {len(names)}" in section.text


def test_unmatched_queries_are_counted_and_explained() -> None:
    (section,) = result_sections({"FusionReID": Result.model_validate(RESULT | {"unmatched_queries": 3})})
    assert section.text.startswith("3 of 18 queries have no match")
    assert section.figures[-1] == ("Queries", "15", "3 without a match left out")
    assert section.table is not None
    assert section.table.rows[0][-1].text == "3"
    (section,) = result_sections({"FusionReID": Result.model_validate(RESULT)})
    assert (section.text, section.figures[-1].note) == ("", "all with a match")


def test_nobody_confused_is_said() -> None:
    assert confusion_sections(None) == []
    (section,) = confusion_sections([])
    assert section.text == "Each query finds its own person first."
