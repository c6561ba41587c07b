"""click's commands and groups with one-line errors, examples and grouped options."""

import errno
import re
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

from medembed.cli.console import ENDINGS, QUIET, VERBOSE, exit_status, is_step, is_terminal, say
from medembed.core.errors import MedembedError
from medembed.core.text import printable

__all__ = ["Command", "Commands", "Entry", "Sections", "fold"]

Entry = tuple[str, str]
"""The module that holds a command, and a line that says what the command does."""


_LAST = ("jsonl", "json", QUIET, VERBOSE, "help")
_NO_LIMIT = re.compile(r"(\d+)<=x<=\d{6,}")
"""A range whose upper end only guards against nonsense."""
_HYPHEN = re.compile(r"(?<=\S)-(?=\w)")
_WHOLE = "\u2011"  # a hyphen that no line ends with


class _Formatter(click.HelpFormatter):
    """Help text whose lines never end within --no-augment or out-of-fold."""

    def write_text(self, text: str) -> None:
        super().write_text(_HYPHEN.sub(_WHOLE, text))

    def write_dl(
        self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2
    ) -> None:
        rows = [(name, _HYPHEN.sub(_WHOLE, words)) for name, words in rows]
        super().write_dl(rows, col_max, col_spacing)

    def write(self, string: str) -> None:
        super().write(string.replace(_WHOLE, "-"))


class _Context(click.Context):
    formatter_class = _Formatter


class Command(click.Command):
    """A command that takes -q and -v, sorts its options under headings and ends with examples.

    Parameters
    ----------
    examples : sequence of str
        Whole command lines, shown at the end of the help.
    sections : mapping of str to sequence of str
        Headings and, below each, the long names of options without their dashes. Options that no
        heading names come first, under "Options".
    starting : str
        What a terminal shows at once, because libraries take seconds to load.
    """

    context_class = _Context

    def __init__(
        self,
        *arguments: Any,
        examples: Sequence[str] = (),
        sections: Mapping[str, Sequence[str]] | None = None,
        starting: str = "",
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self.starting = starting
        self.examples, self.sections = tuple(examples), dict(sections or {})
        for parameter in self.params:
            if isinstance(parameter.type, click.IntRange | click.FloatRange):
                parameter.metavar = parameter.metavar or "N"
        self.params += [_flag(QUIET, "-q", "Print results and errors only."),
                        _flag(VERBOSE, "-v", "Show where an error was raised.")]  # fmt: skip

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; an option's variable is named as the option is written.

        click names it after the parameter: of `--patients` that would be `…_N_PATIENTS`.
        """
        for parameter in self.params:
            if ctx.auto_envvar_prefix and isinstance(parameter, click.Option):
                long = max(parameter.opts, key=len).removeprefix("--").replace("-", "_")
                parameter.envvar = f"{ctx.auto_envvar_prefix}_{long}".upper()
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, after showing on a terminal what it starts with."""
        if self.starting and is_terminal(sys.stderr) and not is_step():
            say(f"{self.starting} …")
        return super().invoke(ctx)

    def grouped_options(self, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
        """Return the options under each heading: how they are written and what they do."""
        heading_of = {name: heading for heading, names in self.sections.items() for name in names}
        groups: dict[str, list[tuple[str, str]]] = {
            heading: [] for heading in ("Options", *self.sections, "Output")
        }
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if isinstance(parameter, click.Option) and record is not None:
                long = max(parameter.opts, key=len).removeprefix("--")
                default = "Output" if self.sections and long in _LAST else "Options"
                name, words = record
                words = _NO_LIMIT.sub(r"x>=\1", words)
                groups[heading_of.get(long, default)].append((name, words))
        return {heading: records for heading, records in groups.items() if records}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, each under its heading."""
        for heading, records in self.grouped_options(ctx).items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, one line each unless the terminal is too narrow."""
        super().format_epilog(ctx, formatter)
        _write_examples(formatter, self.examples)


def _write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    if examples:
        with formatter.section("Examples"):
            for example in examples:
                for line in fold(example, formatter.width - 2 * formatter.indent_increment):
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def _flag(name: str, short: str, words: str) -> click.Option:
    def remember(context: click.Context, option: click.Parameter, value: bool) -> None:
        if value:  # a step of `run` inherits its quietness
            context.meta[f"medembed.{name}"] = True

    return click.Option(
        [short, f"--{name}", name], is_flag=True, is_eager=True, expose_value=False,
        callback=remember, help=words,
    )  # fmt: skip


def fold(command: str, width: int) -> list[str]:
    r"""Return a command line in lines of at most `width` columns; all but the last end with ``\``.

    An option stays beside its value.

    >>> fold("medembed sweep cache mura.csv -o runs/sweep --jobs 4", 44)
    ['medembed sweep cache mura.csv \\', '    -o runs/sweep --jobs 4']
    """
    lines = [""]
    for part in re.findall(r"-\S+ [^-\s]\S*|\S+", command):
        joined = f"{lines[-1]} {part}" if lines[-1].strip() else lines[-1] + part
        if len(joined) > width - 2 and lines[-1].strip():
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] = joined
    return lines


class Commands(click.Group):
    """A group that turns errors raised on purpose into `Error: …` and exit status 1.

    Parameters
    ----------
    examples : sequence of str
        Whole command lines, shown at the end of the help.
    """

    command_class = Command
    context_class = _Context

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, then the epilogue."""
        _write_examples(formatter, self.examples)
        super().format_epilog(ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; convert `MedembedError`, a full disk and the like in one place."""
        try:
            return super().invoke(ctx)
        except MedembedError as error:
            _show_traceback(ctx)
            raise click.ClickException(printable(str(error))) from error
        except KeyboardInterrupt as error:
            raise _end(error) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            ending = error.__context__
            if isinstance(ending, KeyboardInterrupt):  # the terminal is gone
                raise _end(ending) from None
            _show_traceback(ctx)
            raise click.ClickException(printable(_describe(error))) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown name is wrong usage, with the nearest names."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            name = args[0]
            near = get_close_matches(name, self.list_commands(ctx), cutoff=0.5)
            if name.startswith("-") or not near:
                raise
            ctx.fail(f"No such command {name!r}. Did you mean {' or '.join(near)}?")


class Sections(Commands):
    """A group of commands under headings, each imported from its module when it is called.

    Parameters
    ----------
    sections : mapping of str to mapping of str to (str, str)
        Headings; below each, by the name of a command, the module that holds it (its attribute
        is `<name>_command`) and one line that says what it does.
    """

    def __init__(
        self, *arguments: Any, sections: Mapping[str, Mapping[str, Entry]], **settings: Any
    ) -> None:
        super().__init__(*arguments, **settings)
        self.sections = sections
        self.entries = {k: v for entries in sections.values() for k, v in entries.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, as the help sorts them."""
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return the command."""
        if cmd_name not in self.entries:
            return None
        module, words = self.entries[cmd_name]
        command: click.Command = getattr(import_module(module), f"{cmd_name}_command")
        command.short_help = words
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their headings, without importing any."""
        width = max(map(len, self.entries))
        for heading, entries in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{name:<{width}}", e[1]) for name, e in entries.items()])


def _show_traceback(ctx: click.Context) -> None:
    if ctx.meta.get(f"medembed.{VERBOSE}"):
        import traceback

        say(traceback.format_exc())


def _end(error: KeyboardInterrupt) -> SystemExit:
    """Print what a command that a signal ended leaves behind; return how it exits."""
    status = exit_status(error)
    word = ENDINGS[signal.Signals(status - 128)]
    done = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    with suppress(OSError):  # after SIGHUP there may be no terminal
        say(f"{word}.{done} Nothing is half-written; the same command continues from here.")
    return SystemExit(status)


def _describe(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    remedy = "Check that the path is right, writable and not full."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Free some space there, or write to another disk, and run the command again."
    return f"{where}{error.strerror or error}. {remedy}"
