"""`python -m fusionreid` shows the counts of the published models next to the paper's."""

import pytest

from fusionreid.__main__ import PUBLISHED, main


def test_counts_are_those_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    rows = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines()[-len(PUBLISHED) :]]
    assert [name for name, *_ in rows] == [name for name, *_ in PUBLISHED]
    assert [paper for *_, paper in rows] == ["153.8", "172.8", "188.5", "89.0"]
    for _, total, counted, paper in rows:
        assert float(counted) == pytest.approx(float(paper), abs=0.1)
        assert float(total) > float(counted) + 5  # classifiers of 1041 persons on six heads
