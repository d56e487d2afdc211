"""A latent written down bit by bit."""
from pathlib import Path

from safetensors.torch import save_file

import folder_paths
from comfy_api.latest import io


class TestSaveLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestSaveLatent",
            display_name="Test Save Latent",
            category="test",
            description="Writes the samples to output/NAME.safetensors, as the tensor `samples`.",
            inputs=[io.Latent.Input("latent"), io.String.Input("name", default="latent")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latent, name):
        path = Path(folder_paths.get_output_directory(), f"{name}.safetensors")
        save_file({"samples": latent["samples"].contiguous().cpu()}, path)
        return io.NodeOutput()
