"""
Command lines: dataclass parsers, recipes in YAML, and errors of one line.

Nothing here imports torch, which takes seconds: a script reads its command line first, and a typo is answered at once.
"""

import argparse
import contextlib
import difflib
import functools
import reprlib
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import fields, make_dataclass
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

import yaml
from declared_fields import as_options, fields_of_script
from limits import check_numbers
from places import check_places
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool


class CommandLineError(Exception):
    """A command line or a recipe cannot be used; the message says what is wrong and what would work."""


class _OneSpelling:
    """Adds each option by one name: without the `--with-hyphens` and `--no_...` that `HfArgumentParser` adds."""

    def __init__(self, parser):
        self.parser = parser

    def add_argument(self, name: str, *aliases: str, **options):
        if options.get("action") == "store_false":
            return
        if options.get("type") is string_to_bool:
            options["metavar"] = "true|false"
        if options.get("type") == float | str:
            options["type"] = number_or_word
        self.parser.add_argument(name, **options)


class _HelpOnAll(argparse.Action):
    """`--help_all`: the help with the options that `--help` leaves out."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.on_demand = frozenset()
        parser.print_help()
        parser.exit()


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that names the type of a value, and its default if there is one."""

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "__name__", "value").removeprefix("<lambda>") or "value"

    def _get_help_string(self, action):
        silent = (None, False, argparse.SUPPRESS)  # compared by identity: a default of 0 is told
        is_said = any(action.default is value for value in silent) or not action.option_strings
        return (action.help or "") + ("" if is_said else " (default: %(default)s)")


class CommandLineParser(HfArgumentParser):
    r"""
    `HfArgumentParser` whose options have one spelling each, and whose errors are one line instead of a page of usage.
    `--config` names a recipe, a YAML file: its values replace the defaults, and its text is then in `recipe`. Use a
    parser for one command line only.

    Args:
        dataclass_types: As in `HfArgumentParser`.
        on_demand (collection of `str`, *optional*): Options that only `--help_all` shows.
        kwargs: As in `argparse`.
    """

    recipe: str | None = None

    def __init__(self, dataclass_types=None, on_demand: Collection[str] = (), **kwargs):
        if dataclass_types is not None:
            kwargs.setdefault("usage", "%(prog)s [--option value ...]")
        kwargs.setdefault("formatter_class", Help)
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.on_demand = on_demand
        if self.dataclass_types:
            text = "Recipe: a YAML file of values of these arguments, which the command line overrides."
            self.add_argument("--config", metavar="FILE", help=text)
        if on_demand:
            text = f"Show also {len(on_demand)} options that are seldom needed, and exit."
            self.add_argument("--help_all", action=_HelpOnAll, nargs=0, default=argparse.SUPPRESS, help=text)

    @staticmethod
    def _parse_dataclass_field(parser, field):
        HfArgumentParser._parse_dataclass_field(_OneSpelling(parser), field)

    def format_help(self) -> str:
        texts = {action: action.help for action in self._actions if action.dest in self.on_demand}
        for action in texts:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in texts.items():
                action.help = text

    def error(self, message: str):
        raise CommandLineError(message)

    def parse(self, arguments: list[str] | None = None) -> tuple:
        r"""
        Dataclass instances of a command line, and a namespace of any arguments that belong to none of them.

        Args:
            arguments (`list[str]`, *optional*): Words of the command line, `sys.argv[1:]` by default.

        Raises:
            CommandLineError: If an argument or a key of the recipe is unknown, or a value cannot be read.
        """
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(
                arguments, look_for_args_file=False, return_remaining_strings=True
            )
            for part in parsed:
                check_numbers(vars(part))
                check_places(vars(part))
        except (ValueError, TypeError, ImportError, RuntimeError) as error:  # what the dataclasses themselves refuse
            raise CommandLineError(str(error)) from error
        if unknown:
            raise self.unknown_argument(unknown[0])
        return tuple(parsed)

    def unknown_argument(self, word: str) -> CommandLineError:
        """The error of a word that is no option."""
        word, everything = word.split("=")[0], "--help_all" if self.on_demand else "--help"
        return CommandLineError(
            f"unknown argument {word!r}{nearest(word, self._option_string_actions)}; `{everything}` lists all."
        )

    def parse_known_args(self, args=None, namespace=None):
        """As in `argparse`, which also calls it for a sub-command; first refuses unknown options and reads a recipe."""
        words = sys.argv[1:] if args is None else list(args)
        if self.dataclass_types:
            for word in words:
                if word.startswith("--") and word.split("=")[0] not in self._option_string_actions:
                    raise self.unknown_argument(word)  # before argparse misses the one that was meant
            finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            finder.add_argument("--config", nargs="?", const="")
            path = finder.parse_known_args(words)[0].config
            if path is not None:
                self.set_defaults_from(path)
        namespace, unknown = super().parse_known_args(words, namespace)
        vars(namespace).pop("config", None)
        return namespace, unknown

    def set_defaults_from(self, path: str):
        """Make the values of a recipe the defaults of the arguments that its keys name; null keeps a default."""
        hints = {}
        for kind in self.dataclass_types:
            types = get_type_hints(kind)
            hints |= {field.name: types[field.name] for field in fields(kind) if field.init}
        actions = {action.dest: action for action in self._actions}
        for key, value in self.read_recipe(path).items():
            if key not in hints:
                near = nearest(str(key), hints)
                raise CommandLineError(
                    f"unknown key {key!r} in {path}{near}; keys are the names of arguments, see `--help`."
                )
            if key.endswith("_token"):
                raise CommandLineError(
                    f"`{key}` in {path}: a recipe is kept and published. Log in with `hf auth login`, or set HF_TOKEN."
                )
            if value is None:
                continue
            action, kinds = actions[key], types_in(hints[key])
            try:
                self.set_defaults(**{key: typed(value, action, kinds)})
            except (ValueError, TypeError, ArithmeticError, argparse.ArgumentTypeError) as error:
                wanted = described(action, kinds)
                raise CommandLineError(f"`{key}` in {path} must be {wanted}, got {shown(value)}.") from error
            action.required = False

    def read_recipe(self, path: str) -> dict:
        """The content of a recipe, whose text is kept."""
        if not path:
            raise CommandLineError("`--config` needs the path of a YAML file.")
        try:
            with open(path, encoding="utf-8") as file:
                self.recipe = file.read()
            recipe = yaml.safe_load(self.recipe) or {}
        except OSError as error:
            raise CommandLineError(f"cannot read the recipe {path}: {error.strerror}.") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # also of text that is not UTF-8, or too deep
            raise CommandLineError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(recipe, dict):
            raise CommandLineError(f"{path} must hold `key: value` pairs, got a {type(recipe).__name__}.")
        return recipe


def nearest(word: str, known: Iterable[str]) -> str:
    """Which known word is nearest, in words; nothing if none is near."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f", the nearest is {found[0]}" if found else ""


def shown(value: object) -> str:
    """A value from YAML in a message: short, whatever it holds."""
    try:
        return repr(value) if isinstance(value, str | float | bool) else reprlib.repr(value)
    except ValueError:
        return "an integer of thousands of digits"


def number_or_word(word: str) -> float | str:
    """An item of a list that may hold numbers and words."""
    try:
        return float(word)
    except ValueError:
        return word


def types_in(hint) -> list:
    """The types that a type hint allows, except `None`."""
    types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [kind for kind in types if kind is not NoneType]


def fits(value: object, kind) -> bool:
    """Whether a value from YAML already has a type; whole numbers also count as floats."""
    origin, of = get_origin(kind) or kind, get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(fits(item, of[0]) for item in value)
    if origin in (int, float):
        is_int = isinstance(value, int) and not isinstance(value, bool)
        return is_int or (origin is float and isinstance(value, float))
    return isinstance(origin, type) and isinstance(value, origin)


def typed(value: object, action: argparse.Action, kinds: list):
    r"""
    The value of an argument, from its value in YAML. Text is read as on the command line, so that `1e-3`, which YAML
    takes for text, is a number; any other value must already have a type that the argument allows.

    Raises:
        ValueError, TypeError or argparse.ArgumentTypeError: If the argument cannot have this value.
    """
    if action.nargs == "+":
        kinds = [kind for hint in kinds for item in get_args(hint) for kind in types_in(item)]  # those of the items
        return [typed_item(item, action, kinds) for item in (value if isinstance(value, list) else [value])]
    return typed_item(value, action, kinds)


def typed_item(value: object, action: argparse.Action, kinds: list):
    """As [`typed`], for a single value or one item of a list."""
    if isinstance(value, str):
        value = action.type(value)
        is_allowed = action.choices is None or value in action.choices
    else:
        is_allowed = any(fits(value, kind) for kind in kinds)
    if not is_allowed:
        raise ValueError(value)
    return float(value) if action.type is float else value


def described(action: argparse.Action, kinds: list) -> str:
    """The values that an argument allows, in words."""
    if action.choices is not None:
        text = f"one of {', '.join(map(str, action.choices))}"
    else:
        text = " or ".join(kind.__name__ if isinstance(kind, type) else str(kind) for kind in kinds)
    is_word = action.choices is not None or str in kinds
    return f"{text} (in quotes where YAML would read something else)" if is_word else text


def options_of(script: str) -> type:
    """A dataclass like the `...Arguments` of a script, made from its source: the script itself would import torch."""
    return make_dataclass("Options", as_options(fields_of_script(script)), kw_only=True)


def check_first(script: str, description: str):
    """
    Read the command line of a script by [`options_of`], before it imports what takes seconds; end on a mistake. Its
    help begins with the description.
    """
    one_line_errors(CommandLineParser([options_of(script)], description=description).parse)()


class Terminated(KeyboardInterrupt):
    """SIGTERM: the request to end, as `kill` and job schedulers send it."""


def say_interrupt(kind: type[BaseException], error: BaseException, trace):
    """Python's own words about an error that nothing has caught, but one line on Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = say_interrupt  # while a script imports torch, too


@contextlib.contextmanager
def ended_by_request() -> Iterator[None]:
    """Let SIGTERM end the main thread as Ctrl-C does, so that what is half done is undone."""

    def end(number, frame):
        raise Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_memory_error(error: BaseException) -> bool:
    """Whether memory ran out, which torch says on a CPU in a RuntimeError."""
    is_one = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # of torch
    return is_one or "can't allocate memory" in str(error)


def is_write_error(error: BaseException) -> bool:
    """Whether a file could not be written or read, also where safetensors or `torch.save` has an error of its own."""
    is_one = isinstance(error, OSError) or type(error).__name__ == "SafetensorError"
    return is_one or "PytorchStreamWriter" in str(error)


def is_about_input(error: BaseException) -> bool:
    """Whether an error is about what was asked for: of the command line, or of the package."""
    errors = sys.modules.get("hf_pixelcnn.training.errors")  # not imported: then none of its errors was raised
    return isinstance(error, CommandLineError) or (errors is not None and isinstance(error, errors.InputError))


@contextlib.contextmanager
def what_to_do(advice: Callable[[], str]) -> Iterator[None]:
    """Add to the line that an interrupt, a full disk or full memory ends with, how to go on."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or is_memory_error(error) or is_write_error(error):
            error.add_note(advice())
        raise


def line_of(error: BaseException) -> str | None:
    """What to say about an error whose cause lies outside the program; `None` for a fault of the program."""
    if isinstance(error, KeyboardInterrupt):
        line = "terminated." if isinstance(error, Terminated) else "interrupted."
    elif is_memory_error(error):
        line = f"error: out of memory: {error or 'there is not enough for this request'}"
    elif is_about_input(error) or is_write_error(error):
        line = f"error: {error}"
    else:
        return None
    for note in getattr(error, "__notes__", []):
        line = f"{line.rstrip('.')}. {note}"
    line = " ".join(line.split())  # what is not printable, a terminal would obey
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def one_line_errors(main: Callable) -> Callable:
    r"""
    Let `main` end with one line on stderr, and no traceback, where the cause lies outside the program: exit code 1 on
    an error about the input, on files that cannot be read or written and when memory runs out; 130 after Ctrl-C and
    143 after SIGTERM, as shells have it.
    """

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None):
        try:
            with ended_by_request():
                return main(arguments)
        except (Exception, KeyboardInterrupt) as error:
            if (line := line_of(error)) is None:
                raise
            if not isinstance(error, KeyboardInterrupt):
                sys.exit(line)
            print(line, file=sys.stderr)
            sys.exit(143 if isinstance(error, Terminated) else 130)

    return wrapped
