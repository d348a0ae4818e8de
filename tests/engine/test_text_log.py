"""OUTPUT_DIR/log.txt: what stderr and stdout said, with time and level, over all starts of a run."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusionreid.engine import command
from fusionreid.engine.arguments import Command
from fusionreid.engine.storage import StorageError
from tests import ROOT
from tests.programs import program

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
log = logging.getLogger("fusionreid.of_a_test")


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    (tmp_path / "run.yml").write_text("SOLVER:\n  MARGIN: 0.5\n")  # worth a note
    return ["--config_file", str(tmp_path / "run.yml"), "OUTPUT_DIR", str(tmp_path / "out")]


def work(cfg) -> None:
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    print("a table\nof two", "lines")
    log.info("saved")
    log.warning("odd")
    logging.getLogger("other.library").info("not asked for")


def test_every_line_has_time_and_level(argv, capsys) -> None:
    assert command.run(Command(work, "", "", []), argv) == 0
    out, err = capsys.readouterr()
    assert out == "a table\nof two lines\n"
    note, *lines = err.splitlines()
    assert re.fullmatch(LINE + "INFO SOLVER.MARGIN: 0.5 has no effect: MODEL.NO_MARGIN is yes", note)
    assert [re.sub(LINE, "", line) for line in lines] == ["INFO saved", "WARNING odd"]
    text = (Path(argv[-1]) / "log.txt").read_text()
    written = [re.sub(f"^{LINE}", "", line) for line in text.splitlines()]
    assert written[0].startswith("INFO SOLVER.MARGIN")  # from before the folder was made
    assert written[1:] == ["INFO a table", "INFO of two lines", "INFO saved", "WARNING odd"]


def test_a_second_start_appends_and_a_failure_is_in_it(argv, capsys) -> None:
    assert command.run(Command(work, "", "", []), argv) == 0

    def fail(_cfg) -> None:
        raise StorageError("no room")

    def bug(_cfg) -> None:
        raise RuntimeError("a shape")

    assert command.run(Command(fail, "", "", []), argv) == 4
    assert command.run(Command(bug, "", "", []), argv) == 1
    text = (Path(argv[-1]) / "log.txt").read_text()
    assert "WARNING odd" in text
    assert "ERROR no room\n" in text
    assert "ERROR RuntimeError: a shape\nTraceback" in text
    assert text.count("no room") == text.count('raise RuntimeError("a shape")') == 1


def test_no_folder_is_made_for_it_and_a_full_disk_is_no_reason_to_stop(argv, tmp_path: Path, capsys) -> None:
    assert command.run(Command(lambda _cfg: print("fine"), "", "", []), argv) == 0
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.txt").symlink_to("/dev/full")
    assert command.run(Command(work, "", "", []), argv) == 0
    assert capsys.readouterr().out == "fine\na table\nof two lines\n"


def test_the_rank_is_named_where_there_are_several(tmp_path: Path, argv) -> None:
    body = (
        "import logging; logging.getLogger('fusionreid.x').warning('odd'); os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)"
    )
    for rank in "01":
        done = subprocess.run([sys.executable, "-c", program(body), *argv], cwd=ROOT, text=True, capture_output=True,
                              check=True, env={"RANK": rank, "WORLD_SIZE": "2"})  # fmt: skip
        assert re.search(rf"{LINE}WARNING \[rank {rank}\] odd\n", done.stderr)
    text = (tmp_path / "out/log.txt").read_text()
    assert "[rank 0] odd" in text
    assert "[rank 1]" not in text


def test_no_name_of_a_file_is_a_command_to_the_terminal(argv, capsys) -> None:
    """ESC could clear the screen, and a mark of direction show `gpj.exe` as `exe.jpg`."""
    name = "a\x1b[2J\u202egpj\x07\x9b.exe"

    def say(cfg) -> None:
        Path(cfg.OUTPUT_DIR).mkdir()
        print(name, "größe\t1")
        log.warning("odd %s", name)
        raise StorageError(name)

    assert command.run(Command(say, "", "", []), argv) == 4
    out, err = capsys.readouterr()
    for text in (out, err, (Path(argv[-1]) / "log.txt").read_text()):
        assert r"a\x1b[2J\u202egpj\x07\x9b.exe" in text
        assert not {"\x1b", "\u202e", "\x07", "\x9b"} & set(text)
    assert "größe\t1\n" in out
