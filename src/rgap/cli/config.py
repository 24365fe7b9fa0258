"""``--config FILE``: the options of a command from a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rgap.cli.options import F
from rgap.files import read_toml
from rgap.printable import line, listed


def config_option(command: F) -> F:
    """``--config FILE``: a TOML file with the command's own options, by the same names."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_configured,
        help="TOML file with these options by the same names, such as batch-size = 4; the command line wins.",
    )(command)


def _configured(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    if value is None:
        return
    if not value.is_file():
        raise click.BadParameter(line(f"{value}: no such file"), ctx, param)
    try:
        entries = read_toml(value)
    except ValueError as error:
        raise click.BadParameter(line(str(error)), ctx, param) from error
    known = {name.lstrip("-"): each for each in ctx.command.params for name in each.opts if name.startswith("--")}
    del known["config"]
    unknown = [name for name in entries if name not in known]
    if unknown:
        expected = ", ".join(sorted(known))
        raise click.BadParameter(line(f"{value}: unknown {listed(unknown)}; expected some of {expected}"), ctx, param)
    ctx.default_map = {}
    for name, entry in entries.items():
        try:
            ctx.default_map[str(known[name].name)] = _typed(known[name], entry)
        except ValueError as error:
            raise click.BadParameter(line(f"{value}: got --{name} {error}"), ctx, param) from error


def _typed(option: click.Parameter, entry: Any) -> Any:
    """What TOML has, as the command line would have it.

    Raises:
        ValueError: it is nothing that the option takes; says what.
    """
    several = isinstance(option, click.Option) and option.multiple
    flag = isinstance(option, click.Option) and option.is_flag
    kinds: tuple[type, ...] = (str, int, float)
    expected = "text or a number"
    if flag:
        kinds, expected = (bool,), "true or false"
    elif isinstance(option.type, click.types.IntParamType):
        kinds, expected = (str, int), "a whole number"
    entries = entry if several and isinstance(entry, list) else [entry]
    for each in entries:
        if not isinstance(each, kinds) or isinstance(each, bool) != flag:
            got = repr(each) if isinstance(each, (bool, int, float)) else f"a {type(each).__name__}"
            raise ValueError(f"{got}, expected {expected}")
    return entry if flag else [str(each) for each in entries] if several else str(entry)
