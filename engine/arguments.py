"""Command lines: what a command is, its parser and help, and what to write instead of an option that it lacks."""

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from fusionreid import __version__
from fusionreid.engine.config_hints import instead_of

PATHS = "Relative paths, of keys too, start where the command runs; ~ is your home folder."


@dataclass(frozen=True)
class Ending:
    """What a command says last: the files it wrote, and the command that usually comes next."""

    wrote: Sequence[Path | str] = ()
    following: str = ""  # name of a command, or a sentence


@dataclass(frozen=True)
class Command:
    """A command: the function behind it, called as `work(cfg, <option>=value, ...)`, and what its help says."""

    work: Callable[..., int | None]
    summary: str  # one line of the overview
    description: str
    examples: Sequence[str]  # what follows the command's name
    options: Callable[[argparse.ArgumentParser], None] = lambda _: None
    needs_config: bool = True
    takes_data: bool = False  # own data by their path, in place of a configuration
    examines: bool = False  # these data: `work` gets them as they were read, as `own`
    ending: Callable[..., Ending] = lambda cfg, **options: Ending()  # called as `work` is, after it
    interrupted: str = ""  # what to do after a stop

    @property
    def name(self) -> str:
        """Name of the command."""
        return self.work.__name__


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that fits the terminal, keeps the line breaks that are meant, and breaks no command in two."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines: list[str] = []
        for part in text.splitlines():
            lines += [part] if "fusionreid " in part else super()._split_lines(part, width)
        return lines


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line that names the remedy, and end with exit code 2."""

    def __init__(self, **options: Any) -> None:
        options = {"formatter_class": Help, "allow_abbrev": False, **options}
        super().__init__(**options)

    @property
    def known(self) -> list[str]:
        """The options that it has."""
        return list(self._option_string_actions)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options, in any order with the KEY VALUE pairs."""
        known, words = self.known, list(argv)
        file = next((after for word, after in pairwise(words) if word == "--config_file"), "FILE")
        for word, following in zip(words, [*words[1:], None]):
            name = word.partition("=")[0]
            if word == "--":
                break
            if name not in known and (name.startswith("--") or (name[:1] == "-" and name[1:].isalpha())):
                from fusionreid.engine.config import KEYS

                command = f"{self.prog} --config_file {shlex.quote(file)}"
                self.error(f"unknown option {name}: {instead_of(word, following, command, known, KEYS)}")
        return self.parse_intermixed_args(words)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line that names the remedy."""
        self.exit(2, f"error: {message}\nSee {self.prog} --help\n")


class _ShowVersion(argparse.Action):
    """Print the versions that a report of a problem needs, and end."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"fusionreid {__version__} ({', '.join(_versions())})")
        parser.exit()


VERSION: dict[str, Any] = {"action": _ShowVersion, "nargs": 0, "dest": argparse.SUPPRESS,
                           "help": "print the versions in use and exit"}  # fmt: skip


def command_parser(command: Command) -> Parser:
    """The parser of one command that runs as a script."""
    parser = Parser(prog=command_line(command.name))
    fill(parser, command)
    return parser


def fill(parser: Parser, command: Command) -> None:
    """Give a parser the options and the help of a command."""
    examples = "\n".join(f"  {parser.prog} {example}" for example in command.examples)
    parser.description = command.description
    parser.epilog = f"{'examples' if len(command.examples) > 1 else 'example'}:\n{examples}\n\n{PATHS}"
    command.options(parser)
    needed = "" if command.needs_config else ", needed only where a model is"
    file = f"YAML file with the configuration{needed}, or the name of a shipped one, as in synthetic/tiny"
    if command.takes_data:
        source = parser.add_mutually_exclusive_group(required=True)
        source.add_argument("--config_file", metavar="FILE", help=file)
        what = "your own images, a folder or a list in any layout, as in crops/; persons are split, settings fitted"
        source.add_argument("--data", type=path, metavar="PATH", help=what)
        name = "name of the run on --data, whose folder is log/RUN; as in shop (default: that of PATH)"
        parser.add_argument("--name", type=_folder_name, metavar="RUN", help=name)
    else:
        parser.add_argument("--config_file", required=command.needs_config, metavar="FILE", help=file)
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and exit")
    parser.add_argument("--version", **VERSION)
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE",
                        help="settings that override the file, as in SOLVER.BASE_LR 0.01; also KEY=VALUE")  # fmt: skip


def path(text: str) -> Path:
    """A path as people type it."""
    return Path(text).expanduser()


def place(text: str) -> str:
    """A path as people type it, or the URI of object storage, as in s3://bucket/crops."""
    return text if "://" in text else str(path(text))


def time(text: str) -> datetime:
    """A time as people type it, in the zone of this machine if it names none."""
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be a time, as in 2026-03-01 or 2026-03-01T18:30+01:00, got {text}"
        ) from error


def file_to_write(text: str) -> Path:
    """A file that can be written, as people type it."""
    file = path(text)
    if file.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: name a file in a folder that is there")
    return file


def _folder_name(text: str) -> str:
    """The name of one folder."""
    if text in ("", ".", "..") or "/" in text or "\0" in text:
        raise argparse.ArgumentTypeError(
            f"must be the name of a folder in log, got {text!r}; OUTPUT_DIR sets another place"
        )
    return text


def command_line(name: str) -> str:
    """How the user starts a command: in the way this one was started."""
    script = Path(sys.argv[0])
    return f"python {script.with_name(f'{name}.py')}" if script.parent.name == "engine" else f"fusionreid {name}"


def search_in(embeddings: Path | str) -> str:
    """How to find a person in a folder of embeddings."""
    gallery = shlex.quote(str(embeddings))
    return f"find a person: {command_line('search')} --query IMAGE --gallery {gallery} --config_file FILE"


def evaluate_run(folder: Path) -> str:
    """How to evaluate the newest checkpoint of a run."""
    settings = folder / "config.yml"  # of a run on own data
    file = shlex.quote(str(settings)) if settings.is_file() else f"FILE OUTPUT_DIR {shlex.quote(str(folder))}"
    return f"{command_line('evaluate')} --config_file {file}"


def _versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "triton", "timm"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return found
