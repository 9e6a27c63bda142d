"""The command line, `castlora COMMAND`."""

import logging
import os
import re
import sys
import warnings
from argparse import Action
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from inspect import signature
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from castlora import __version__
from castlora.bench.commands import BENCHMARKS
from castlora.commands import COMMANDS
from castlora.config import RECIPES, Tuning
from castlora.errors import BAD_INPUT, UserError
from castlora.execution.launcher import is_launched, is_main, process_count, wait_for_turn

INTERRUPTED = 130
_REPEATED = {"transfer": "--target", "translate": "--adapter"}
"""The option of a command that can be given several times."""
_OPTION = re.compile(r"--[A-Za-z][\w.-]*\+?")
_OF_RECIPE = {"steps", "batch_size"} | {field.name for field in fields(Tuning)}
"""Settings that depart from a recipe; one that is left out has the recipe's value."""
_SHARED = ("transfer", "fit", "sketch")
"""Commands that several processes can run together, however these hold the models."""
_WITHOUT_OPTION: dict[str, dict[str, Any]] = {
    "runs": {"nargs": "+", "metavar": "RUN", "help": "folder that castlora transfer wrote"},
    "shards": {"nargs": "+", "metavar": "SHARD", "help": "folder that castlora fit --shard wrote"},
    "folder": {"metavar": "FOLDER", "type": str, "help": "folder of a PEFT LoRA"},
}
"""Parameters that take the words of a command that follow no option."""


class _Parser(ArgumentParser):
    """A parser whose complaints are one sentence, like those about any other bad input."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        program, complaint = _in_short(self.prog.replace(" [options]", ""), message)
        _end_with(f"{complaint}; see {program} --help.")

    def get_completion_script(self, completion_type: str, **options: Any) -> str:
        """A script for a shell, with options as people type them; or the schema of the settings, as files have them."""
        script = str(super().get_completion_script(completion_type, **options))
        return _OPTION.sub(_dashed, script) if completion_type.startswith("shtab-") else script


class _DashedHelp(DefaultHelpFormatter):
    """Help that shows options the way people type them: `--prompt-format`."""

    def _format_action_invocation(self, action: Action) -> str:
        return str(super()._format_action_invocation(action).replace("_", "-"))

    def _expand_help(self, action: Action) -> str:
        """The help of an option; where nothing is given the recipe decides, so the recipe's value is its default."""
        shown, setting = str(super()._expand_help(action)), action.dest.removeprefix("tuning.")
        return shown.replace("default: null", f"default: {_of_recipes(setting)}") if setting in _OF_RECIPE else shown

    def _format_usage(self, *arguments: Any) -> str:
        return _OPTION.sub(_dashed, str(super()._format_usage(*arguments)))


def _of_recipes(setting: str) -> str:
    usual, paper = (str(getattr(RECIPES[name], setting)).lower() for name in ("default", "paper"))
    return usual if usual == paper else f"{usual}; of the paper's recipe: {paper}"


def _dashed(option: re.Match[str]) -> str:
    return option[0].replace("_", "-")


def _in_short(program: str, message: str) -> tuple[str, str]:
    """What jsonargparse complains about as one sentence, with options as people type them, and whose help has more."""
    if rejected := re.search(r'key "(?P<key>\S+)":.*(Given|Got) value: (?P<value>.*)', message, flags=re.DOTALL):
        return program, f"--{rejected['key'].replace('_', '-')} does not accept {rejected['value']!r}"
    if missing := re.search(r"arguments are required: (?P<names>.+)", message):
        # They are named with their command: bench.quality.out.
        names = missing["names"].split(", ")
        command = names[0].split(".")[:-1]
        options = ", ".join(_as_typed(name.rsplit(".", 1)[-1]) for name in names)
        return " ".join([program, *command]), f"missing {options}"
    if unnamed := re.match(r'expected "(?P<key>\S+)" to be one of \{(?P<names>.*)\}', message):
        return " ".join([program, *unnamed["key"].split(".")[:-1]]), f"missing one of {unnamed['names']}"
    short = re.sub(r"argument (--\S+): expected one argument", r"\1 needs a value", " ".join(message.split()))
    short = re.sub(r'Parser key "(\S+)":', r"--\1:", short).rstrip(".")
    return program, _OPTION.sub(_dashed, short) if short.startswith(("unrecognized", "--")) else short


def _as_typed(parameter: str) -> str:
    given_as = _WITHOUT_OPTION.get(parameter)
    return str(given_as["metavar"]) if given_as else f"--{parameter.replace('_', '-')}"


def parser() -> ArgumentParser:
    """The parser of all commands, each with `--config` and `--print_config`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True, add_print_completion_argument=True)
    whole = _Parser(
        prog="castlora",
        description="Moves a LoRA adapter from one language model to another.",
        version=__version__,
        formatter_class=_DashedHelp,
    )
    _add_verbosity(whole)
    commands = whole.add_subcommands(required=True, dest="command")
    _add_commands(commands, COMMANDS)
    bench = _Parser(formatter_class=_DashedHelp)
    commands.add_subcommand("bench", bench, help="Runs a benchmark and writes its tables.")
    _add_commands(bench.add_subcommands(required=True, dest="benchmark"), BENCHMARKS)
    return whole


def _add_commands(place: Any, functions: Mapping[str, Callable[..., None]]) -> None:
    for name, function in functions.items():
        command = _Parser(formatter_class=_DashedHelp)
        command.add_argument("--config", action="config", help="YAML file with any of these settings")
        _add_verbosity(command)
        for parameter in _WITHOUT_OPTION.keys() & signature(function).parameters:
            command.add_argument(parameter, **_WITHOUT_OPTION[parameter])
        command.add_function_arguments(function, as_positional=False, skip=set(_WITHOUT_OPTION))
        place.add_subcommand(name, command, help=(function.__doc__ or "").splitlines()[0])


def _add_verbosity(place: ArgumentParser) -> None:
    place.add_argument("-q", "--quiet", action="store_true", help="show no progress, only warnings and errors")
    place.add_argument("-v", "--verbose", action="store_true", help="show every step and what libraries say, timed")


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; bad input ends with one sentence and exit code 2."""
    whole = parser()
    words = [_underscored(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    parsed = whole.parse_args(_gathered(words))
    chosen: str = parsed.command
    settings: Namespace = whole.instantiate(parsed)[chosen]
    run = COMMANDS.get(chosen)
    if run is None:
        run, settings = BENCHMARKS[settings.benchmark], settings[settings.benchmark]
    settings.pop("config", None)
    # Before the name of the command or after it.
    quiet, verbose = settings.pop("quiet") or parsed.quiet, settings.pop("verbose") or parsed.verbose
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        _set_verbosity(quiet, verbose)
        _check_launch(chosen, settings)
        run(**vars(settings))
        if is_launched():
            from castlora.execution.processes import leave

            leave()
    except UserError as error:
        _end_with(str(error))
    except KeyboardInterrupt:
        if is_main():
            print("castlora: interrupted; the same command continues transfer or teach where it was", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception:
        wait_for_turn(found_bad_input=False)
        raise


def _end_with(complaint: str) -> NoReturn:
    """Ends the command because of bad input; of several processes one says why."""
    wait_for_turn(found_bad_input=True)
    print(f"castlora: {complaint}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def _check_launch(command: str, settings: Namespace) -> None:
    """Raises a UserError if a launcher has started several processes of a command that is one."""
    if process_count() > 1 and command not in _SHARED and not settings.get("sharded"):
        instead = ", or give --sharded true" if "sharded" in settings else ""
        raise UserError(
            f"castlora {command} runs in one process; start it without torchrun or accelerate launch{instead}."
        )


def _set_verbosity(quiet: bool, verbose: bool) -> None:
    """Sets what is written to standard error; the variables are read by libraries that no command has imported yet."""
    if quiet and verbose:
        raise UserError("--quiet and --verbose contradict each other; give one of them.")
    if process_count() > 1 and not verbose:
        # PyTorch says in every process that the gradients could be laid out otherwise.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not is_main():
        _be_silent()
        return
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
        logging.getLogger("castlora").setLevel(logging.DEBUG)
        os.environ |= {"TRANSFORMERS_VERBOSITY": "info", "HF_HUB_VERBOSITY": "info"}
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("castlora").setLevel(logging.WARNING if quiet else logging.INFO)
    # It prints its warnings itself; handed on to the root they would come twice.
    logging.getLogger("huggingface_hub").propagate = False
    # PEFT imports it wherever it is installed, and on a processor it misses faster kernels aloud.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # What libraries will change among themselves is no concern of whoever types a command.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # PEFT says of every module of a GPT-2 that it reads the layout from the module.
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")


def _be_silent() -> None:
    """What several processes have to say, the main one says."""
    logging.basicConfig(level=logging.CRITICAL)
    warnings.filterwarnings("ignore")
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_VERBOSITY": "critical"}


def _underscored(word: str) -> str:
    """`--prompt-format` as the Python name `--prompt_format`; values stay as they are."""
    option, equals, value = word.partition("=")
    if not _OPTION.fullmatch(option):
        return word
    return "--" + option[2:].replace("-", "_") + equals + value


def _gathered(words: Sequence[str]) -> list[str]:
    """The words of a command; further values of an option that can be repeated are added, and do not replace it."""
    command = next((word for word in words if not word.startswith("-")), "")
    option = _REPEATED.get(command)
    given = [index for index, word in enumerate(words) if word.partition("=")[0] == option]
    return [re.sub(r"^--\w+", r"\g<0>+", word) if index in given[1:] else word for index, word in enumerate(words)]
