"""`linfusion train`: distil a linear student from its softmax teacher."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any

from typer import Context, Option

from linfusion.cli.console import Json, emit_json, say, working
from linfusion.files.whole_files import writable_folder
from linfusion.training.config import TrainConfig, recipes


def train(context: Context, recipe: str | None = None, as_json: bool = False, **flags: Any) -> None:
    """Distil a linear student from its teacher.

    Flags are named as in diffusers' train_text_to_image.py. On several GPUs:
    accelerate launch -m linfusion train ...
    """
    if recipe is not None:  # what was not given is as the recipe says
        sources = {name: context.get_parameter_source(name) for name in flags}
        flags = {
            name: value
            for name, value in flags.items()
            if (source := sources[name]) is not None and source.name != "DEFAULT"
        }
    changes = {name: _as_field(value) for name, value in flags.items()}
    config = (
        TrainConfig(**changes) if recipe is None else TrainConfig.from_recipe(recipe, **changes)
    )
    writable_folder("output_dir", Path(config.output_dir))
    with working(f"distilling {config.pretrained_model_name_or_path} into {config.output_dir}"):
        from linfusion.training.trainer import distill

        folder = distill(config)
    if as_json:
        emit_json({"weights": str(folder), "config": dataclasses.asdict(config)})
    else:
        say(f"try it: linfusion generate -m {config.pretrained_model_name_or_path} -w {folder} ...")
        print(folder)


def _as_field(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _helps() -> dict[str, str]:
    """What the docstring of TrainConfig says of each field; several may share one entry."""
    section = inspect.cleandoc(TrainConfig.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.sub(r"\n(?:    ){2,}", " ", section)  # continuation lines
    entries = re.sub(r",\n\s*", ", ", entries)
    helps: dict[str, str] = {}
    for entry in entries.splitlines():
        names, _, text = entry.strip().partition(": ")
        helps |= dict.fromkeys(re.split(r",\s*", names), text)
    return helps


def _signature() -> inspect.Signature:
    """One option for every field of TrainConfig, of the same name."""
    hints = typing.get_type_hints(TrainConfig)
    helps = _helps()
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=Context)
    about = "A published run, or a .toml file, whose arguments are the defaults: "
    recipe = Option("--recipe", help=about + ", ".join(recipes()) + ".")
    parameters = [context, _keyword("recipe", Annotated[str | None, recipe], None)]
    for field in dataclasses.fields(TrainConfig):
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
