"""A command made for a test, in a process of its own."""

import subprocess
import sys

from tests import ROOT

PROGRAM = """
import os, sys, time
from fusionreid.engine import command
from fusionreid.engine.arguments import Command
def train(cfg):
    print("torch" in sys.modules, flush=True)
    BODY
sys.exit(command.run(Command(train, "", "", [])))
"""


def program(body: str) -> str:
    return PROGRAM.replace("BODY", body.strip().replace("\n", "\n    "))


def start(argv: list[str], body: str) -> subprocess.Popen[str]:
    """Start a command whose work is `body`; it prints first whether torch is loaded."""
    return subprocess.Popen([sys.executable, "-c", program(body), *argv], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
