"""What a streamed video has done so far, in a folder, so that it goes on to the same bits.

    parameters.json          everything that decides the video
    session.safetensors      after the last block: the past of each side, the decoder's memory
    block-00000.safetensors  latents of a block: the only files whose number grows

Every file is sealed (`linfusion.files.whole_files`), and the session is written last.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from linfusion.attention.grids.local import SHARED
from linfusion.pipelines.highres.record import digest_of, fingerprint
from linfusion.pipelines.lingen.denoise import Clip
from linfusion.pipelines.lingen.latents import first_frame
from linfusion.pipelines.lingen.streaming_vae import StreamingVAEDecoder
from linfusion.pipelines.state import State, pack_values, parameters_of, unpack

_SIDES = ("wanted", "unwanted")


class Session:
    """The folder of a streamed video; without one, nothing is kept and nothing found.

    Args:
        folder: made where it is missing; None keeps nothing.
        pipe: the pipeline.
        clip: to be drawn; the states of its sides are set where the session goes on.
        about: what else decides the video, as JSON values.
        resume: go on with what is there; without it, a folder that holds a video is refused.

    Attributes:
        done: blocks that are finished.
        writes: whether this process does; of ranks that share a pipeline, the first alone.

    Raises:
        ValueError: the folder holds a video and `resume` is not set, or that of another model,
            prompt, size or seed (all that differ are named), or its position is none of this clip.
    """

    def __init__(
        self,
        folder: str | Path | None,
        pipe: Any,
        clip: Clip,
        about: dict[str, Any],
        *,
        resume: bool,
    ) -> None:
        shared = pipe.__dict__.get(SHARED)
        self.writes = shared is None or shared.mesh.first  # of several ranks, one
        if not self.writes and not resume:
            folder = None
        parameters = {} if folder is None else _what_decides(pipe, clip, about)
        if resume and folder is not None:
            _refuse_other_length(folder, clip, pipe.vae)
        self.state = State(folder, parameters, resume=resume, read_only=not self.writes)
        self.clip, self.done = clip, 0
        self._decoder: dict[str, Any] | None = None
        try:
            if (found := self.state.read("session")) is not None:
                self._go_on(*found, pipe)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other runs into the folder."""
        self.state.close()

    def open_decoder(self, vae: Any) -> StreamingVAEDecoder:
        """A decoder that goes on after the blocks that are done."""
        decoder = StreamingVAEDecoder(vae, sum(self.clip.blocks))
        if self._decoder is not None:
            decoder.load_state_dict(self._decoder)
            self._decoder = None
        return decoder

    def blocks(self) -> Iterator[Tensor]:
        """Latents of the blocks that are done.

        Raises:
            ValueError: a file of them is missing.
        """
        for index in range(self.done):
            found = self.state.read(f"block-{index:05}")
            if found is None:
                raise ValueError(f"state: block-{index:05}.safetensors is not there any more")
            yield found[0]["latents"]

    def save(self, index: int, latents: Tensor, decoder: StreamingVAEDecoder) -> None:
        """Keep a finished block, and all that the next one depends on."""
        self.done = index + 1
        if self.state.folder is None or not self.writes:
            return
        self.state.save(f"block-{index:05}", {"latents": latents}, {})
        tensors: dict[str, Tensor] = {}
        packed = pack_values(decoder.state_dict(), tensors, "decoder")
        for name, side in zip(_SIDES, self.clip.sides, strict=False):
            tensors |= {f"{name}.{key}": t for key, t in side.state.state_dict().items()}
        self.state.save("session", tensors, {"done": self.done, "decoder": packed})

    def _go_on(self, tensors: dict[str, Tensor], about: dict[str, Any], pipe: Any) -> None:
        done, total = about["done"], len(self.clip.blocks)
        if not 0 <= done <= total:
            raise ValueError(f"state: {done} blocks are done, but this video has {total}")
        decoder = unpack(about["decoder"], tensors, pipe.vae.device)
        latents = sum(self.clip.blocks[:done])
        found = {"the decoder": decoder["taken"]}
        patch = pipe.transformer.config.patch_size[0]
        for name, side in zip(_SIDES, self.clip.sides, strict=False):
            prefix = f"{name}."
            own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            side.state.load_state_dict(own)
            side.state.to(pipe._execution_device)
            if done < total:  # the last block is followed by none, and so is not committed
                found[f"the state of what is {name}"] = side.state.frames * patch
        for what, position in found.items():
            if position != latents:
                raise ValueError(
                    f"state: {what} is at latent frame {position}; {done} blocks end at {latents}"
                )
        self.done, self._decoder = done, decoder


def _refuse_other_length(folder: str | Path, clip: Clip, vae: Any) -> None:
    """Say in frames what `State` would say in blocks.

    Raises:
        ValueError: the folder holds a video that is shorter or longer.
    """
    blocks = parameters_of(folder).get("blocks")
    if isinstance(blocks, list) and blocks != list(clip.blocks):
        there, wanted = (first_frame(vae, sum(b)) for b in (blocks, clip.blocks))
        raise ValueError(
            f"state: {folder} holds another video: its blocks make {there} frames, these {wanted};"
            " accepted is the same length, and a video that is finished can be the beginning of a"
            " longer one (video=, on the command line --continue)"
        )


def _what_decides(pipe: Any, clip: Clip, about: dict[str, Any]) -> dict[str, Any]:
    return {
        **about,
        "blocks": list(clip.blocks),
        "steps": clip.steps,
        "guidance_scale": clip.guidance_scale,
        "seed": clip.seeds[0],
        "text": [digest_of(side.texts) for side in clip.sides],
        "given": digest_of(clip.given),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        **{f"model.{name}": digest for name, digest in fingerprint(pipe).items()},
    }
