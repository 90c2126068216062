"""Qwen-Image-Edit-2509 and later through diffusers' QwenImageEditPlusPipeline: one to three pictures with a prompt."""

from __future__ import annotations

from typing import ClassVar

from flowrl.models.qwen_image_edit import QwenImageEdit


class QwenImageEditPlus(QwenImageEdit):
    """QwenImageEditPlusPipeline as a velocity in flow coordinates; its text encoder sees the pictures smaller."""

    pipelines: ClassVar[tuple[str, ...]] = ("QwenImageEditPlusPipeline",)
    num_sources: ClassVar[tuple[int, int]] = (1, 3)
    area_of_text: ClassVar[int] = 384 * 384
