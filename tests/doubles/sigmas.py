"""A schedule written down."""
import torch

from comfy_api.latest import io


class TestSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestSigmas",
            display_name="Test Sigmas",
            category="test",
            inputs=[io.String.Input("sigmas", default="1, 0", tooltip="Numbers between commas.")],
            outputs=[io.Sigmas.Output(display_name="SIGMAS")],
        )

    @classmethod
    def execute(cls, sigmas):
        return io.NodeOutput(torch.tensor([float(sigma) for sigma in sigmas.split(",")]))
