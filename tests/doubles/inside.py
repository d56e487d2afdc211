"""A node that makes the node that samples, while it runs."""
from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder


class TestKSamplerInside(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestKSamplerInside", display_name="Test KSampler Inside", category="test",
            description="Is replaced by a KSampler with its inputs.", inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image"),
                io.Int.Input("seed"),
                io.String.Input("sampler_name")
            ], outputs=[io.Latent.Output(display_name="LATENT")], enable_expand=True,
        )

    @classmethod
    def execute(cls, **inputs):
        graph = GraphBuilder()
        made = graph.node("KSampler", **inputs, steps=8, cfg=3.0, scheduler="karras", denoise=1.0)
        return io.NodeOutput(made.out(0), expand=graph.finalize())
