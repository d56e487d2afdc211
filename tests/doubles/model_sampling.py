"""One denoiser behind every prediction type of ComfyUI's discrete models."""
import torch

from comfy.model_sampling import EDM, EPS, IMG_TO_IMG, V_PREDICTION, X0, ModelSamplingDiscrete
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

KINDS = {kind.__name__: kind for kind in (EPS, V_PREDICTION, EDM, X0, IMG_TO_IMG)}


class TestModelSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestModelSampling", display_name="Test Model Sampling", category="test", description=
            "The model with another sampling class and a network to match: D(x, sigma) stays the same.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="A U-Net with its own sampling class, such as the tiny emoji: only "
                    "nodes that leave the sampling alone may follow."),
                io.Combo.Input("kind", options=list(KINDS))
            ], outputs=[io.Model.Output(display_name="MODEL")],
        )

    @classmethod
    def execute(cls, model, kind):
        class Sampling(ModelSamplingDiscrete, KINDS[kind]):
            pass

        original = model.get_model_object("model_sampling")
        sampling = Sampling(model.model.model_config)

        def network(executor, scaled, timesteps, context, y, control, transformer_options, **kwargs):
            """The F for which `sampling` finds the D of the original: both are linear in their F."""
            sigma = transformer_options["sigmas"][:1]
            x = scaled.float() / sampling.calculate_input(sigma, torch.ones_like(scaled))
            output = executor(
                original.calculate_input(sigma, x).to(scaled.dtype), timesteps, context, y, control,
                transformer_options, **kwargs)
            denoised = original.calculate_denoised(sigma, output.float(), x)
            at_0 = sampling.calculate_denoised(sigma, torch.zeros_like(x), x)
            at_1 = sampling.calculate_denoised(sigma, torch.ones_like(x), x)
            return (denoised - at_0) / (at_1 - at_0)

        patched = model.clone()
        patched.add_object_patch("model_sampling", sampling)
        patched.add_wrapper(WrappersMP.DIFFUSION_MODEL, network)
        return io.NodeOutput(patched)
