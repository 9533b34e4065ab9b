"""Command lines: dataclass parsers, recipes in YAML, and errors of one line."""

import functools
import json
import sys
from collections.abc import Callable

import yaml
from transformers import HfArgumentParser

from hf_pixelcnn.training.errors import InputError


class CommandLineParser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line instead of a page of usage; `recipe` is the text of `--config`."""

    recipe: str | None = None

    def __init__(self, dataclass_types, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise InputError(message)

    def parse(self, arguments: list[str] | None = None) -> tuple:
        r"""
        Dataclass instances of a command line.

        Args:
            arguments (`list[str]`, *optional*):
                Words of the command line, `sys.argv[1:]` by default. `--config FILE` inserts the values of a recipe
                before all others, so that what is said on the command line wins.

        Raises:
            InputError: If an argument or a key of the recipe is unknown, or a value cannot be read.
        """
        words = sys.argv[1:] if arguments is None else list(arguments)
        for position, word in enumerate(words):
            if word == "--config" or word.startswith("--config="):
                value = word.partition("=")[2] if "=" in word else "".join(words[position + 1 : position + 2])
                del words[position : position + (1 if "=" in word else 2)]
                words = self.recipe_words(value) + words
                break
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(
                words, look_for_args_file=False, return_remaining_strings=True
            )
        except (ValueError, ImportError) as error:  # what the dataclasses themselves refuse
            raise InputError(str(error)) from error
        if unknown:
            raise InputError(f"unknown argument {unknown[0]!r}; `--help` lists all.")
        return tuple(parsed)

    def recipe_words(self, path: str) -> list[str]:
        """The `key: value` pairs of a YAML file as words of a command line; null means not given."""
        if not path:
            raise InputError("`--config` needs the path of a YAML file.")
        try:
            with open(path, encoding="utf-8") as file:
                self.recipe = file.read()
            recipe = yaml.safe_load(self.recipe) or {}
        except OSError as error:
            raise InputError(f"cannot read the recipe {path}: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(recipe, dict):
            raise InputError(f"{path} must hold `key: value` pairs, got a {type(recipe).__name__}.")
        known = {action.dest for action in self._actions}
        words = []
        for key, value in recipe.items():
            if key not in known:
                raise InputError(f"unknown key {key!r} in {path}; keys are the names of arguments, see `--help`.")
            if value is None:
                continue
            values = value if isinstance(value, list) else [value]
            words.append(f"--{key}")
            words.extend(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)
        return words


def one_line_errors(main: Callable) -> Callable:
    """Let `main` end with exit code 1 and one line on stderr on an [`InputError`] or `OSError`."""

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None):
        try:
            return main(arguments)
        except (InputError, OSError) as error:  # the latter: folders and files that cannot be written
            sys.exit("error: " + " ".join(str(error).split()))

    return wrapped
