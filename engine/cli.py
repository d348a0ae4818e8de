"""The installed command `fusionreid`: an overview, and the commands that `python engine/<command>.py` runs as well."""

import difflib
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module

from fusionreid.engine import command, completion
from fusionreid.engine.arguments import VERSION, Command, Parser, fill

COMMANDS = "train", "evaluate", "embed", "search", "gallery", "export", "report", "doctor"
MEANT = {  # what other programs call it
    "test": "evaluate", "eval": "evaluate", "val": "evaluate", "resume": "train", "fit": "train", "extract": "embed",
    "predict": "embed", "infer": "embed", "inference": "embed", "query": "search", "find": "search",
    "convert": "export", "onnx": "export", "compare": "report", "visualize": "report", "check": "doctor",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    overview, commands = build()
    first = words[0] if words else "--help"
    if first in commands:
        about, parser = commands[first]
        return command.run(about, words[1:], parser)
    if not first.startswith("-"):
        close = [MEANT[first]] if first in MEANT else difflib.get_close_matches(first, commands, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(commands)}"
        overview.error(f"unknown command {first}: {hint}")
    if first.partition("=")[0] not in overview.known:
        overview.error(f"a command comes before {first}, as in: fusionreid train {shlex.join(words)}")
    options = overview.parse_args(words or ["--help"])
    from fusionreid.engine.config import KEYS

    print(completion.script(options.print_completion, {name: p.known for name, (_, p) in commands.items()}, KEYS))
    return 0


def build() -> tuple[Parser, dict[str, tuple[Command, Parser]]]:
    """The parser of `fusionreid` itself, and each command with its own."""
    overview = Parser(
        prog="fusionreid",
        usage="fusionreid COMMAND [options] [KEY VALUE ...]",
        description="Person re-identification: train a FusionReID model, evaluate it, search with it.",
        epilog="fusionreid COMMAND --help explains a command. The first example needs no data and no GPU.",
        add_help=False,
    )
    subparsers = overview.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    commands = {}
    for name in COMMANDS:
        about: Command = import_module(f"fusionreid.engine.{name}").COMMAND
        example = f"fusionreid {name} {about.examples[0]}"
        parser = subparsers.add_parser(name, prog=f"fusionreid {name}", help=f"{about.summary}\n{example}")
        fill(parser, about)
        commands[name] = about, parser
    options = overview.add_argument_group("options")
    options.add_argument("-h", "--help", action="help", help="print this overview and exit")
    options.add_argument("--version", **VERSION)
    eval_it = 'print a completion script, as in\neval "$(fusionreid --print-completion bash)"'
    options.add_argument("--print-completion", choices=completion.SHELLS, metavar="SHELL", help=eval_it)
    return overview, commands
