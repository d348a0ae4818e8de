"""The command line: an overview, help that lists every option, the nearest key or command for what people try."""

import subprocess
import sys
from pathlib import Path

import pytest

from fusionreid import __version__
from fusionreid.engine import cli, config_hints
from fusionreid.engine.config import KEYS
from tests import ROOT


def ask(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `fusionreid`."""
    try:
        code = cli.main(argv)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_alone_it_prints_an_overview(capsys) -> None:
    code, overview, _ = ask(capsys)
    assert code == 0
    assert ask(capsys, "--help") == (0, overview, "")
    for name in cli.COMMANDS:
        assert f"    {name} " in overview
        assert f" fusionreid {name} {cli.build()[1][name][0].examples[0]}" in overview


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_lists_every_option_with_its_meaning_and_an_example(capsys, name: str) -> None:
    code, text, _ = ask(capsys, name, "--help")
    about, parser = cli.build()[1][name]
    assert code == 0
    assert f"usage: fusionreid {name} " in text
    for action in parser._actions:
        assert action.help
        assert not action.option_strings or any(f"  {option}" in text for option in action.option_strings)
    assert f"  fusionreid {name} {about.examples[0]}" in text
    assert "Relative paths, of keys too, start where the command runs" in text


def test_only_search_and_own_data_do_without_a_configuration(capsys) -> None:
    _, text, _ = ask(capsys, "search", "--help")
    for option in (
        "--query PATH",
        "--gallery PATH",
        "--top N",
        "--at-least COSINE",
        "--json FILE",
        "[--config_file FILE]",
    ):
        assert option in text
    code, _, err = ask(capsys, "train")
    assert (code, "one of the arguments --config_file --data is required" in err) == (2, True)
    code, _, err = ask(capsys, "report", "--beside", "log")
    assert (code, "unknown option --beside" in err) == (2, True)


@pytest.mark.parametrize(("words", "answer"), [
    ("train --epochs 3", "key is SOLVER.MAX_EPOCHS, as in: fusionreid train --config_file FILE SOLVER.MAX_EPOCHS 3\n"),
    ("train --lr=0.01", "the key is SOLVER.BASE_LR, as in: fusionreid train --config_file FILE SOLVER.BASE_LR 0.01"),
    ("train --lr", "SOLVER.BASE_LR VALUE"),
    ("train --lr 0.1 --config_file my.yml", "as in: fusionreid train --config_file my.yml SOLVER.BASE_LR 0.1\n"),
    ("train --batch-size 64", "FILE SOLVER.IMS_PER_BATCH 64"),
    ("evaluate --batch_size 64", "FILE TEST.IMS_PER_BATCH 64"),
    ("train --resume log/x", "resuming is automatic"),
    ("train --device cuda", "MODEL.DEVICE cuda"),
    ("train --gpus 4", "torchrun --nproc-per-node 4"),
    ("train --local-rank=0", "torchrun --nproc-per-node 4"),
    ("train --workers 4", "DATALOADER.NUM_WORKERS 4"),
    ("train -j 4", "DATALOADER.NUM_WORKERS 4"),
    ("train --num-workers 4", "DATALOADER.NUM_WORKERS 4"),
    ("train --output log/x", "the key is OUTPUT_DIR"),
    ("train --eval-only", "fusionreid evaluate --config_file FILE"),
    ("train --amp SOLVER.BASE_LR 0.1", "FILE SOLVER.PRECISION bf16"),
    ("train --seed 3", "the key is SOLVER.SEED"),
    ("train --max_epochs 3", "SOLVER.MAX_EPOCHS 3"),
    ("train --SOLVER.MAX_EPOCHS 3", "SOLVER.MAX_EPOCHS 3"),
    ("train --eval_perid 3", "SOLVER.EVAL_PERIOD 3"),
    ("train --opts SOLVER.BASE_LR 1", "write KEY VALUE pairs without --opts"),
    ("train --config-file x.yml", "did you mean --config_file?"),
    ("search --querry x", "did you mean --query?"),
    ("train --frobnicate", "fusionreid train --config_file FILE --print-config lists the keys"),
])  # fmt: skip
def test_what_people_try_first_is_answered_with_what_works(capsys, words: str, answer: str) -> None:
    code, out, err = ask(capsys, *words.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"error: unknown option {words.split()[1].partition('=')[0]}: ")
    assert answer in err


@pytest.mark.parametrize(("words", "answer"), [
    ("trian", "did you mean train?"), ("eval", "did you mean evaluate?"), ("test", "did you mean evaluate?"),
    ("zzz", "the commands are train, evaluate"),
    ("--config_file my.yml", "as in: fusionreid train --config_file my.yml"),
])  # fmt: skip
def test_the_nearest_command(capsys, words: str, answer: str) -> None:
    code, _, err = ask(capsys, *words.split())
    assert (code, answer in err) == (2, True)


def test_every_key_of_the_hints_is_one() -> None:
    for option, key in config_hints.TRIED.items():
        assert config_hints.keys_like(option, KEYS)[0].endswith(key.partition(" ")[0])
        assert option not in config_hints.OTHERWISE


def test_version_says_what_a_report_of_a_problem_needs(capsys) -> None:
    for words in (["--version"], ["train", "--version"]):
        code, out, _ = ask(capsys, *words)
        assert code == 0
        assert out.startswith(f"fusionreid {__version__} (Python 3.")
        assert "torch 2." in out


@pytest.mark.parametrize(("line", "found"), [
    ("fusionreid ev", "evaluate"), ("fusionreid search --qu", "--query"), ("fusionreid --ver", "--version"),
    ("fusionreid train --config_file a.yml SOLVER.MAX_E", "SOLVER.MAX_EPOCHS"), ("fusionreid train confi", ""),
])  # fmt: skip
def test_the_shell_completes_commands_options_and_keys(capsys, line: str, found: str) -> None:
    code, script, _ = ask(capsys, "--print-completion", "bash")
    words = f'COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _fusionreid; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{words}"], capture_output=True, text=True, check=True)
    assert (code, done.stdout.strip(), done.stderr) == (0, found, "")
    assert ask(capsys, "--print-completion", "zsh")[1].startswith("autoload -U +X bashcompinit && bashcompinit\n")
    assert ask(capsys, "--print-completion", "fish")[0] == 2


def test_script_and_command_are_the_same_code(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "engine/report.py", "--help"], cwd=ROOT, capture_output=True, text=True,
                          check=True, env={"PATH": "", "COLUMNS": "120"})  # fmt: skip
    assert "usage: python engine/report.py [-h] [--compare FOLDER] --config_file FILE" in done.stdout
    assert "  python engine/report.py --config_file my.yml" in done.stdout


def test_help_loads_neither_torch_nor_the_configuration() -> None:
    absent = "{'torch', 'numpy', 'PIL', 'pydantic', 'yaml'}"
    script = (
        f"import sys; from fusionreid.engine.cli import build; build(); sys.exit(bool({absent} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
