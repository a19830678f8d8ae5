"""`linfusion train`: distil a linear student from its softmax teacher."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Context, Option

from linfusion.cli.console import Json, emit_json, keeping, quiet, say, working
from linfusion.files.whole_files import writable_folder
from linfusion.training.config import LINGEN, TrainConfig, options_type, read_recipe, recipes
from linfusion.training.schema import accepted, from_text, hints_of


class Command(typer.core.TyperCommand):
    """`train`, whose help also lists the options of every method; they are asked for it here, so
    that the command line starts without torch."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from linfusion.attention import names

        for method in [*names(), LINGEN]:
            kind = options_type(method)
            helps, hints = helps_of(kind), hints_of(kind)
            with formatter.section(f"Options of --method {method}"):
                formatter.write_dl(
                    [(f"--{name}", f"{helps.get(name, '')} [{accepted(hints[name])}]")
                     for name in hints]
                )  # fmt: skip


def train(context: Context, recipe: str | None = None, as_json: bool = False, **flags: Any) -> None:
    """Distil a linear student from its teacher.

    Flags are named as in diffusers' train_text_to_image.py; those of a method are listed below. On
    several GPUs: accelerate launch -m linfusion train ...
    """
    # What was not given is as the recipe says.
    sources = {name: context.get_parameter_source(name) for name in flags}
    changes: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in flags.items()
        if (source := sources[name]) is not None and source.name != "DEFAULT"
    }
    published = {} if recipe is None else read_recipe(recipe)
    method = changes.get("method", published.get("method", TrainConfig.method))
    changes["options"] = _method_flags(context.args, method)
    config = (
        TrainConfig(**changes) if recipe is None else TrainConfig.from_recipe(recipe, **changes)
    )
    writable_folder("output_dir", Path(config.output_dir))
    with working(f"distilling {config.pretrained_model_name_or_path} into {config.output_dir}"):
        from linfusion.training.trainer import distill

        with keeping(lambda: _kept(config)), quiet():
            folder = distill(config)
    if as_json:
        emit_json({"weights": str(folder), "config": dataclasses.asdict(config)})
    else:
        say(f"try it: linfusion generate -m {config.pretrained_model_name_or_path} -w {folder} ...")
        print(folder)


def _kept(config: TrainConfig) -> str:
    """What there is of a run that was stopped, and how to go on."""
    from linfusion.training.checkpoints import checkpoints

    found = checkpoints(Path(config.output_dir))
    if not found:
        return f"no checkpoint was written yet; what is cached stays in {config.cache_path}"
    return f"{found[-1]} is kept: the same command with --resume latest goes on from it"


def _method_flags(arguments: list[str], method: str) -> dict[str, Any]:
    """Options of a method from the flags that are none of the trainer's."""
    if not arguments:
        return {}
    kind = options_type(method)
    hints, found = hints_of(kind), {}
    rest = list(arguments)
    while rest:
        flag, given, value = rest.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r}: unexpected; accepted are flags and their values")
        if name.startswith("no_") and hints.get(name[3:]) is bool and not given:
            name, given, value = name[3:], "=", "false"
        if name not in hints:
            raise ValueError(
                f"--{name}: no such flag, and method {method!r} has no such option; it has"
                f" {', '.join(f'--{hint}' for hint in hints)}"
            )
        if not given and hints[name] is bool:
            value = "true"
        elif not given:
            if not rest:
                raise ValueError(f"--{name}: got no value, accepted is {accepted(hints[name])}")
            value = rest.pop(0)
        found[name] = from_text(name, value, hints[name])
    return found


def helps_of(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass say of each field; several may share one entry."""
    helps: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        text = inspect.cleandoc(cls.__doc__ or "")
        section = re.split(r"^(?:Attributes|Args):\n", text, maxsplit=1, flags=re.MULTILINE)
        if cls is object or len(section) < 2:
            continue
        entries = re.split(r"\n\n", section[1])[0]
        entries = re.sub(r"\n(?:    ){2,}", " ", entries)  # continuation lines
        entries = re.sub(r",\n\s*", ", ", entries)
        for entry in entries.splitlines():
            names, _, said = entry.strip().partition(": ")
            helps |= dict.fromkeys(re.split(r",\s*", names), said)
    return helps


def _signature() -> inspect.Signature:
    """One option for every field of TrainConfig, of the same name."""
    hints = typing.get_type_hints(TrainConfig)
    helps = helps_of(TrainConfig)
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=Context)
    about = "A published run, or a .toml file, whose arguments are the defaults: "
    recipe = Option("--recipe", help=about + ", ".join(recipes()) + ".")
    parameters = [context, _keyword("recipe", Annotated[str | None, recipe], None)]
    for field in dataclasses.fields(TrainConfig):
        if field.name == "options":  # each is a flag of its own
            continue
        hint: Any = hints[field.name]
        default: Any = field.default
        names = [f"--{field.name}"]
        if hint is bool:
            names = [f"--{field.name}/--no_{field.name}"]
        elif field.name == "resume_from_checkpoint":
            names.insert(0, "--resume")
        text = helps[field.name]
        if typing.get_origin(hint) is tuple:
            hint = types.GenericAlias(list, typing.get_args(hint)[:1])
            default, text = list(default), f"{text} Repeat."
        option = Option(*names, help=text)
        parameters.append(_keyword(field.name, Annotated[hint, option], default))
    parameters.append(_keyword("as_json", Json, False))
    return inspect.Signature(parameters)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
    )


train.__signature__ = _signature()  # type: ignore[attr-defined]
train.__annotations__ = {p.name: p.annotation for p in _signature().parameters.values()}
