"""Tiny Emoji: a 5 MB text-to-image checkpoint that the stock nodes of ComfyUI load. For development only.

Importing this package does three things: the family of the checkpoint joins the list that
CheckpointLoaderSimple looks through, `checkpoints/` and `classifiers/` join the folders of such models, and
the node `Tiny Emoji As Flow` is offered.
"""
from pathlib import Path

import comfy.supported_models
import folder_paths
from comfy_api.latest import ComfyExtension

from .family import NanoEmoji, TinyEmoji
from .flow import TinyEmojiAsFlow

comfy.supported_models.models += [TinyEmoji, NanoEmoji]
for folder in ("checkpoints", "classifiers"):
    folder_paths.add_model_folder_path(folder, str(Path(__file__).resolve().parent / folder))


class TinyEmojiExtension(ComfyExtension):
    async def get_node_list(self):
        return [TinyEmojiAsFlow]


async def comfy_entrypoint():
    return TinyEmojiExtension()
