"""The command gallery: names, removal, versions, files for others; and what is said where an extra is missing."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fusionreid.engine import cli
from tests import ROOT
from tests.engine.galleries.conftest import CROPS


@pytest.fixture
def shop(run: SimpleNamespace, tmp_path: Path) -> str:
    shop = str(tmp_path / "shop")
    argv = ["embed", "--config_file", str(run.file), "--images", str(run.crops), "--to", shop]
    assert cli.main([*argv, "--track", "17", "--camera", "hall"]) == 0
    return shop


def ask(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """Exit code and output of `fusionreid gallery`."""
    capsys.readouterr()
    code = cli.main(["gallery", *map(str, argv)])
    return code, "".join(capsys.readouterr())


def test_names_are_given_and_every_change_is_undone(
    run: SimpleNamespace, shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "unknown" in ask(capsys, "list", shop)[1]
    assert f"{CROPS} images are now of anna" in ask(capsys, "rename", shop, "--track", 17, "--to", "anna")[1]
    assert "anna" in ask(capsys, "list", shop)[1]
    code, text = ask(capsys, "remove", shop, "--path", run.crops / "03.png")
    assert (code, "1 images removed; gallery checkout --to 3 brings them back" in text) == (0, True)
    assert f"{CROPS - 1} images" in ask(capsys, "stats", shop)[1]
    assert f"{CROPS} images" in ask(capsys, "checkout", shop, "--to", 3)[1]
    assert f"{CROPS} images" in ask(capsys, "checkout", shop, "--to", 2)[1]
    assert "unknown" in ask(capsys, "list", shop)[1]
    assert ask(capsys, "checkout", shop)[1].count(" images") == 6
    assert ask(capsys, "checkout", shop, "--to", 99)[0] == 2


def test_vacuum_deletes_for_good(run: SimpleNamespace, shop: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lance", reason="pylance is not installed: pip install 'fusionreid[gallery]'")
    gone = str(run.crops / "03.png").encode()

    def files() -> list[Path]:
        return [path for path in Path(f"{shop}.lance").rglob("*") if path.is_file() and gone in path.read_bytes()]

    assert ask(capsys, "remove", shop, "--path", run.crops / "03.png")[0] == 0
    assert files()
    with pytest.warns(UserWarning, match="removes every version except the latest"):
        assert ask(capsys, "vacuum", shop, "--keep-days", 0)[0] == 0
    assert not files()
    assert f"{CROPS - 1} images" in ask(capsys, "stats", shop)[1]
    assert ask(capsys, "checkout", shop, "--to", 2)[0] == 2


def test_another_gallery_is_merged_without_doubles(
    run: SimpleNamespace, shop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, config = str(tmp_path / "other"), ["--config_file", str(run.file)]
    assert cli.main(["embed", *config, "--images", str(run.crops / "03.png"), "--to", other]) == 0
    assert f"{CROPS - 1} images added" in ask(capsys, "merge", other, "--from", shop)[1]
    assert "0 images added" in ask(capsys, "merge", other, "--from", shop)[1]
    strange = str(tmp_path / "strange")
    one = ["--images", str(run.crops / "03.png"), "--to", strange, "TEST.NECK_FEAT=after"]
    assert cli.main(["embed", *config, *one]) == 0
    code, text = ask(capsys, "merge", shop, "--from", strange)
    assert (code, "another model" in text) == (2, True)


def test_files_for_other_programs(shop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet as pq

    for name in ("all.parquet", "all.npy", "none.npy"):
        person = ["--person", "nobody"] if name == "none.npy" else []
        assert ask(capsys, "export", shop, "--to", tmp_path / name, *person)[0] == 0
    table, vectors = pq.read_table(tmp_path / "all.parquet"), np.load(tmp_path / "all.npy")
    assert table["path"].to_pylist() == [
        line.split('"')[-2] for line in (tmp_path / "all.csv").read_text().splitlines()[1:]
    ]
    np.testing.assert_array_equal(vectors, np.stack(table["vector"].to_pylist()))
    assert len(np.load(tmp_path / "none.npy")) == 0
    assert "must end in .parquet" in ask(capsys, "export", shop, "--to", tmp_path / "all.txt")[1]
    faiss = pytest.importorskip("faiss", reason="faiss is not installed: pip install 'fusionreid[peers]'")
    assert ask(capsys, "export", shop, "--to", tmp_path / "all.faiss")[0] == 0
    index = faiss.read_index(str(tmp_path / "all.faiss"))
    np.testing.assert_array_equal(index.search(vectors, 1)[1][:, 0], np.arange(CROPS))


def test_a_gallery_without_images_is_searched_and_exported_and_is_no_query(
    run: SimpleNamespace, shop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, image = str(tmp_path / "empty"), str(run.crops / "03.png")
    other = ["embed", "--config_file", str(run.file), "--images", image, "--to", empty, "--track", "18"]
    assert cli.main(other) == 0
    assert ask(capsys, "remove", empty, "--track", "18")[0] == 0
    file = tmp_path / "all.parquet"
    for argv in ("list",), ("stats",), ("vacuum",), ("export", "--to", file), ("merge", "--from", empty):
        code, text = ask(capsys, argv[0], empty, *argv[1:])
        assert code == 0, text
    assert "an index needs 256" in ask(capsys, "index", empty)[1]
    search = ["search", "--config_file", str(run.file), "--query"]
    assert cli.main([*search, image, "--gallery", empty]) == 0
    assert "nobody" in capsys.readouterr().out
    assert cli.main([*search, empty, "--gallery", shop]) == 2
    assert "empty holds no images to search for" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "text"), [
    (["remove"], "gallery remove needs one of --person"), (["rename", "--track", "17"], "gallery rename needs --to"),
    (["list", "--to", "3"], "gallery list does not take --to"), (["merge"], "gallery merge needs --from"),
    (["checkout", "--to", "then"], "must be the number of a version"),
])  # fmt: skip
def test_what_an_action_lacks_or_does_not_take(
    shop: str, capsys: pytest.CaptureFixture[str], argv: list[str], text: str
) -> None:
    code, said = ask(capsys, argv[0], shop, *argv[1:])
    assert (code, text in said) == (2, True), said


def test_a_place_without_a_gallery(run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ask(capsys, "list", tmp_path / "none")
    assert (code, "there is no gallery" in text, "fusionreid embed --images" in text) == (2, True, True)


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("lancedb", "lance", "pyarrow", "ray")))  # None: as if not installed
from fusionreid.engine import cli
sys.exit(cli.main({argv!r}))
"""


@pytest.mark.parametrize("argv", [
    ["embed", "--config_file", "synthetic/tiny", "--images", ".", "--to", "shop"], ["gallery", "list", "shop"],
    ["search", "--query", "a.jpg", "--gallery", "s3://bucket/shop"],
])  # fmt: skip
def test_without_the_extra_the_error_says_what_to_install(argv: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT.format(argv=argv)], cwd=ROOT, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "pip install 'fusionreid[gallery]'" in done.stderr


def test_without_the_extra_files_are_embedded_and_searched_as_before(run: SimpleNamespace, tmp_path: Path) -> None:
    stored, config = str(tmp_path / "stored"), ["--config_file", str(run.file)]
    for argv in (["embed", *config, "--images", str(run.crops), "--output", stored],
                 ["search", "--query", stored, "--gallery", stored, "--top", "1"]):  # fmt: skip
        done = subprocess.run([sys.executable, "-c", WITHOUT.format(argv=argv)], cwd=ROOT, capture_output=True,
                              text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("1.000") == CROPS
