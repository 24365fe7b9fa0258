"""The command ``rgap``."""

from __future__ import annotations

import importlib
import io
import re
import sys
from typing import Any

import click

from rgap.cli.console import say

# torch takes seconds to import: a command's module is imported when the command runs, not for --help.
COMMANDS = {
    "attack": "Reconstruct the input behind one update file.",
    "audit": "Attack a model on pictures and show what comes out.",
    "capture": "Write the update that a client with one picture would send.",
    "federation": "Attack what the server of a federation was sent, round by round.",
    "rank": "Count and measure which layer protects the input, before any update.",
    "sweep": "Run a plan of many attacks, and show what came out.",
    "reproduce": "Compute a table or figure of the paper again, beside the paper's numbers.",
}

EPILOG = """Exit codes: 0 the command did its work, whatever the attack found; 1 the input was refused, with the reason;
2 the command line was wrong; 3 the condition of --fail-if holds; 4 jobs of a sweep failed; 130 interrupted."""


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"rgap.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=_Lazy, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rgap")
def group() -> None:
    """Tell what a shared gradient gives away.

    `rgap audit` alone attacks a built-in network on built-in photographs.
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; refusals become one message and exit code 1."""
    try:
        code = group.main(args=arguments, prog_name="rgap", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        say(shown.getvalue().rstrip(), err=True)
        sys.exit(error.exit_code)
    except (ValueError, OSError) as error:
        # One line, and one for each obstacle of a model.
        say("rgap: " + re.sub(r"\n(?!  - )", " ", str(error)), err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
