"""metrics.json: what an evaluation leaves of the one before."""

import json
from pathlib import Path

import torch

from fusionreid.engine.evaluation.names import Names
from fusionreid.engine.evaluation.retrieval import rank
from fusionreid.engine.reporting.summary import add_details, write_results

NONE = {"camera_pairs": []}


def test_a_second_evaluation_keeps_the_details_of_the_same_vectors_alone(tmp_path: Path) -> None:
    ones = torch.ones(2, dtype=torch.int64)
    ranking = rank(torch.eye(2), torch.eye(2), torch.arange(2), torch.arange(2), ones, 2 * ones)
    about = {"checkpoint": "/a", "split": {"digest": "x"}, "TEST": {"FEAT": 0, "FLIP": False, "RE_RANKING": False}}
    write_results(tmp_path, {"FusionReID": ranking}, about, quiet=True)
    add_details(
        tmp_path,
        {"thresholds": [{"distance": 1.0, "false_positive_rate": 0.1, "true_positive_rate": 0.5}], **NONE},
        Names(),
        quiet=True,
    )
    again = {**about, "TEST": {**about["TEST"], "RE_RANKING": True}}
    write_results(tmp_path, {"re-ranked": ranking}, again, quiet=True)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert (found["thresholds"][0]["distance"], found["TEST"]["RE_RANKING"]) == (1.0, True)
    assert found["results"].keys() == {"re-ranked"}
    for other in ({"checkpoint": "/b"}, {"split": {"digest": "y"}}, {"TEST": {**about["TEST"], "FLIP": True}}):
        write_results(tmp_path, {"FusionReID": ranking}, again | other, quiet=True)
        assert "thresholds" not in json.loads((tmp_path / "metrics.json").read_text())
        add_details(tmp_path, {"thresholds": [], **NONE}, Names(), quiet=True)
    (tmp_path / "metrics.json").write_text("[]")
    write_results(tmp_path, {"FusionReID": ranking}, about, quiet=True)
