"""`linfusion convert`: between our weights format and that of the original authors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from linfusion.cli import check, load
from linfusion.cli.console import Json, emit_json, working
from linfusion.files.whole_files import writable_folder

if TYPE_CHECKING:
    import torch

_LAYOUT = {"linfusion": "paths", "authors": "numbered"}


def convert(
    source: Annotated[str, Argument(help="Student weights: a folder or hub name.")],
    destination: Annotated[Path, Argument(help="Folder to write, which must not hold weights.")],
    to: Annotated[
        Literal["linfusion", "authors"],
        Option("--to", help="linfusion: named by layer path. authors: what their code reads."),
    ] = "linfusion",
    model: Annotated[
        str | None,
        Option("--model", "-m", help="Base model, if the weights lack the attention itself."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Change the format of student weights.

    The numbers stay as they are, and so does their dtype.
    """
    if model is not None:
        check.check_model(model)
    check.check_weights(source)
    if (destination / "config.json").exists():
        raise ValueError(f"destination: {str(destination)!r} already holds weights")
    with working(f"reading {source}"):
        from linfusion.students.saving import relaid, save
        from linfusion.students.student import LinFusion

        side = LinFusion.from_pretrained(source, dtype=stored_dtype(source))
        layers, before = len(side.entries), side.config.layout
        complete = side.config.attention_weights or _LAYOUT[to] == "paths"
        if not complete and model is None:
            raise ValueError(
                f"model: {source} has no to_q, to_k, to_v, to_out, which the authors' format "
                "needs; name the base model they come from with --model"
            )
        writable_folder("destination", destination)
        if complete:
            relaid(side, _LAYOUT[to]).save_pretrained(destination)
        else:
            from linfusion.linearize import linearize

            pipe = load.load_pipeline(model or "", device="cpu")
            linearize(pipe, side.config.method, weights=source)
            save(pipe, destination, layout=_LAYOUT[to])
    if as_json:
        emit_json(
            {
                "source": source,
                "destination": str(destination),
                "from": {layout: name for name, layout in _LAYOUT.items()}[before],
                "to": to,
                "layers": layers,
            }
        )
    else:
        print(destination)


def stored_dtype(source: str) -> torch.dtype | None:
    """The floating dtype of a folder's safetensors; None for a hub name, which reads as float32.

    Raises:
        ValueError: a file that is truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  safe_open is no mapping
                    if (dtype := tensors.get_tensor(name).dtype).is_floating_point:
                        return dtype
        except SafetensorError as error:
            raise ValueError(f"weights: cannot read {file}: {error}") from error
    return None
