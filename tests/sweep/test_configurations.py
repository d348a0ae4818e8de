"""Configurations made at random: each is read and can be written again, or every mistake in it is named."""

import random
from pathlib import Path

import pytest

from fusionreid.engine.config import KEYS, load_config
from fusionreid.engine.config_files import shipped_configs
from tests import ROOT
from tests.promises import Tally
from tests.sweep import world

pytestmark = pytest.mark.sweep
CONFIGURATIONS = 500
WORDS = (
    *("yes", "no", "null", "0", "-1", "1e-4", "1e400", ".nan", "9" * 400, "('msmt17')", "(12, 12)", "[]", "{}", "''"),
    *(
        "x" * 3000,
        "!!python/object/apply:os.system [id]",
        "&a *a",
        "*a",
        "\x1b[2J",
        "\ud800",
        "\t",
        "# x",
        "- 1",
        "? a",
    ),
    *(
        "[" * 500,
        "{a: " * 300,
        "%YAML 9.9",
        "---",
        "<<: *a",
        "cuda",
        "fp16",
        "none",
        "published",
        "1_000",
        "0x10",
        "? a",
    ),
)


def random_text(draw: random.Random) -> str:
    """A shipped configuration with lines changed, lost, doubled, moved or made up."""
    name = draw.choice(sorted(shipped_configs()))
    lines = (ROOT / "configs" / f"{name}.yml").read_text().splitlines()
    for _ in range(draw.randint(1, 6)):
        at, key = draw.randrange(len(lines)), draw.choice(list(KEYS))
        section, _, last = key.rpartition(".")
        match draw.randrange(6):
            case 0:
                lines[at] = f"{lines[at].partition(':')[0]}: {draw.choice(WORDS)}"
            case 1:
                lines += [f"{section}:", f"  {last}: {draw.choice(WORDS)}"] if section else [f"{last}: 1"]
            case 2:
                del lines[at]
                lines = lines or ["MODEL:"]
            case 3:
                lines.insert(draw.randrange(len(lines)), lines[at])
            case 4:
                lines[at] = lines[at].replace(draw.choice("ABE_: "), draw.choice(["", "\0", "é", "  ", "\x85"]), 1)
            case _:
                lines[at] = draw.randbytes(draw.randint(1, 40)).decode("latin1")
    return "\n".join(lines)


@pytest.mark.promise("A configuration with any mistake is refused with its lines; one without reads back as written")
def test_random_configurations(tmp_path: Path, tally: Tally) -> None:
    path, again = tmp_path / "random.yml", tmp_path / "again.yml"
    for number in range(CONFIGURATIONS):
        draw = random.Random(number)
        path.write_text(random_text(draw), encoding="utf-8", errors="surrogatepass")
        override = [f"{draw.choice(list(KEYS))}={draw.choice(WORDS)}"] if draw.random() < 0.3 else []
        code, text = world.run(["train", "--config_file", str(path), "--print-config", *override])
        what = f"number {number}: exit {code}: {text[-500:]}"
        if code:
            named = f"{path}:" in text or "override: " in text
            told = code == 2 and named and "Traceback" not in text and "\x1b" not in text
            tally.add("refused" if told else "lost", what)
        else:
            again.write_text(text, encoding="utf-8")
            same = load_config(again) == load_config(path, override)
            tally.add("survived" if same else "silent", what)
