"""Videos as files: H.264 in MP4, which browsers and players read, through PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from torch import Tensor

from flowrl.models.pipeline import ModelError

_SMALLEST = 128
"""Pixels of the longer side below which a video is enlarged: compression and players blur what is tiny."""


def save_video(media: Tensor, path: str | Path, fps: float | None = None) -> None:
    """Writes a video [F,3,H,W] in [0,1] as MP4; `fps` frames per second, 8 where nobody knows.

    A video below 128 pixels is enlarged by a whole number, and sides that are odd, which the format cannot have, get
    one more row or column like their last. ModelError without PyAV.
    """
    try:
        import av
    except ImportError as error:
        raise ModelError('writing MP4 needs PyAV: pip install -e ".[video]". Or write a .png.') from error
    frames = _even(_enlarged(media.clamp(0, 1))).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(target), "w", format="mp4", options={"movflags": "faststart"}) as container:
        rate = Fraction(fps or 8.0).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "12"})  # 0 is lossless, 23 the usual
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _enlarged(media: Tensor) -> Tensor:
    times = -(-_SMALLEST // max(media.shape[-2:])) if max(media.shape[-2:]) < _SMALLEST else 1
    return media.repeat_interleave(times, dim=-1).repeat_interleave(times, dim=-2)


def _even(media: Tensor) -> Tensor:
    from torch.nn.functional import pad

    height, width = media.shape[-2:]
    return pad(media, (0, width % 2, 0, height % 2), mode="replicate")
