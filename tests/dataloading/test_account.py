"""The account of a data set as JSON."""

import json

import pytest

from fusionreid.dataloading import DataError
from fusionreid.dataloading.account import account_as_json, refusal_as_json
from fusionreid.dataloading.config import DatasetsConfig
from tests.dataloading.test_folder import make, read

KEYS = {"name", "root", "found", "used", "left_out", "parts", "persons", "cameras", "warnings", "verdict"}


def test_an_account_has_names_and_every_file(tmp_path):
    make(tmp_path, "train/anna/hall/1.jpg", "train/Jörg/door/1.jpg", "query/3/hall/1.jpg", "gallery/3/door/\x1b.jpg")
    assert account_as_json(read("folder", tmp_path))["verdict"] == "ok"
    make(tmp_path, "train/loose.jpg", "gallery/-1/hall/1.jpg", "train/anna/hall/.1.jpg")
    account = json.loads(json.dumps(account_as_json(read("folder", tmp_path))))
    assert account.keys() == KEYS
    assert (account["found"], account["used"], account["verdict"]) == (7, 4, "warning")
    assert account["left_out"]["in no person's folder"] == [str(tmp_path / "train/loose.jpg")]
    assert account["found"] == account["used"] + sum(map(len, account["left_out"].values()))
    assert (account["persons"], account["cameras"]) == (["3", "Jörg", "anna"], ["door", "hall"])
    assert account["parts"] == {"train": 2, "query": 1, "gallery": 1}


def test_a_data_set_that_cannot_be_used_is_accounted_for_too(tmp_path):
    make(tmp_path, "train/a/c1.jpg", "query/b/1.jpg", "gallery/b/c2.jpg", "gallery/b/._c2.jpg")
    cfg = DatasetsConfig(NAMES="folder", ROOT_DIR=str(tmp_path))
    with pytest.raises(DataError) as caught:
        read("folder", tmp_path)
    account = json.loads(json.dumps(refusal_as_json(cfg, caught.value)))
    assert account.keys() == KEYS
    assert (account["found"], account["used"], account["verdict"]) == (4, 0, "wrong")
    assert len(account["left_out"][str(caught.value).splitlines()[0]]) == 3
    missing = refusal_as_json(DatasetsConfig(ROOT_DIR=str(tmp_path / "nowhere")), DataError("no folder"))
    assert (missing["found"], missing["left_out"], missing["warnings"]) == (0, {}, ["no folder"])
