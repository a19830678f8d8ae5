"""`linfusion summary`: the self-attention layers of a model and what linear attention saves."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Argument

from linfusion.cli import check, load
from linfusion.cli.console import Json, emit_json, working


def summary(
    model: Annotated[
        str, Argument(help="Pipeline: a folder, a hub name, or zoo:<name>.")
    ] = load.DEFAULT_MODEL,
    weights: load.WeightsOption = None,
    method: load.MethodOption = None,
    layers: load.LayersOption = None,
    dtype: load.DtypeOption = "auto",
    variant: load.VariantOption = None,
    revision: load.RevisionOption = None,
    token: load.TokenOption = None,
    as_json: Json = False,
) -> None:
    """List the self-attention layers of a model.

    For each: learned parameters, bytes of state, and from how many tokens on linear is cheaper. The
    model is made linear first if there are --weights or a student in its folder, or if it was saved
    linear.
    """
    check.check_model(model)
    check.check_method(method)
    check.check_weights(weights)
    with working(f"loading {model}"):
        from linfusion.layers.find import model_of
        from linfusion.layers.record import MARKER
        from linfusion.linearize import linearize
        from linfusion.summary import summary as summarize

        pipe = load.load_pipeline(
            model, dtype=dtype, variant=variant, revision=revision, token=token, device="cpu"
        )
        if type(pipe).__name__ == "LinGenPipeline":
            raise ValueError(
                f"model: {model} is a {type(pipe.transformer).__name__}, linear itself: it has no"
                " softmax layers that a method could take"
            )
        weights = load.student_of(model, weights)
        config: Any = model_of(pipe).config
        if weights or MARKER in config:
            weights = load.put_student(pipe, model, weights, method=method, layers=layers)
        elif layers:
            linearize(pipe, method, layers=layers)
        found = summarize(pipe)
    if as_json:
        emit_json({"pipeline": model, "weights": weights, **found.to_dict()})
    else:
        print(found)
