"""The lock of OUTPUT_DIR: one run at a time, whatever the file system answers."""

import errno
import fcntl
import logging
import os
import signal
from pathlib import Path

import pytest

from fusionreid.dataloading.bad_images import BadImages
from fusionreid.engine.storage import OutputFolderError, StorageError, lock
from fusionreid.files import locked
from tests.programs import start

BODY = "from pathlib import Path\nfrom fusionreid.engine.storage import lock\nheld = lock(Path(cfg.OUTPUT_DIR))\n"


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "run.yml").write_text("")
    argv = ["--config_file", str(tmp_path / "run.yml"), "OUTPUT_DIR", str(tmp_path / "out")]
    output = tmp_path / "out"
    first = start(argv, BODY + "worker = os.fork()\nif worker: print(worker, flush=True)\ntime.sleep(60)")
    first.stdout.readline()
    worker = int(first.stdout.readline())  # it outlives its run
    second = start(argv, BODY)
    err = second.communicate()[1]
    assert second.returncode == 2
    assert f"in use by process {first.pid} on {os.uname().nodename}: wait for it or set another OUTPUT_DIR" in err
    assert not (output / "exit.json").exists()  # that is the first run's to write
    first.kill()
    first.wait()
    lock(output).close()  # a dead owner's lock is free at once
    os.kill(worker, signal.SIGKILL)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match=r"OUTPUT_DIR .*file cannot be written: .*; set another one") as caught:
        lock(tmp_path / "file")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_matter_of_storage_from_the_start(tmp_path: Path, monkeypatch, code: int) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    for method in ("mkdir", "write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, full)
            with pytest.raises(StorageError, match="make room or set another OUTPUT_DIR"):
                lock(tmp_path / method)
    lock(tmp_path / "write_text").close()  # it was given back


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_reason_to_refuse(tmp_path: Path, monkeypatch, caplog, code: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    caplog.set_level(logging.WARNING)
    with lock(tmp_path / "out"), locked(tmp_path / "cache.lock"):
        assert (tmp_path / "out/.lock").read_text().startswith(f"process {os.getpid()} on ")
    lock(tmp_path / "out").close()
    assert len(caplog.records) == 3
    assert all("this file system has no locks" in record.getMessage() for record in caplog.records)
    BadImages("skip", tmp_path / "bad")._write([("train", "a.jpg", "empty file", None)])
    assert (tmp_path / "bad/bad_images.json").exists()


def test_other_errors_of_a_lock_are_told(tmp_path: Path, monkeypatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputFolderError, match=os.strerror(errno.EIO)):
        lock(tmp_path / "out")
