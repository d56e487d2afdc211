"""A flow model that needs no download: the skeleton of SD3 in miniature, with random weights."""
import torch

import comfy.ops
import comfy.sd
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy_api.latest import io

DEPTH = 2           # SD3 has 64 channels and one head for each block of depth
HIDDEN = 64 * DEPTH
TEXT_DIM = 512
TOKENS = 8
# of the 128 frequencies of a timestep, those that make more than half a turn from 0 to 1000
FAST = 80


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Normal weights of variance 1 / fan-in, without biases.

    The network looks at the slow frequencies of the timestep only: with random weights the fast ones would
    make it oscillate in sigma, as no trained network does, and no solver could converge on it.
    """
    network = OpenAISignatureMMDITWrapper(
        input_size=None, in_channels=16, out_channels=16, depth=DEPTH, adm_in_channels=TEXT_DIM,
        context_embedder_config={"target": "torch.nn.Linear",
                                 "params": {"in_features": TEXT_DIM, "out_features": HIDDEN}},
        device="meta", operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape.shape, generator=generator) / shape[0].numel() ** 0.5
               if shape.ndim > 1 else torch.zeros(shape.shape)
               for name, shape in network.state_dict().items()}
    of_cosines_and_sines = tensors["t_embedder.mlp.0.weight"].view(HIDDEN, 2, -1)
    of_cosines_and_sines[:, :, :FAST] = 0
    return tensors


def conditioning(seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, TEXT_DIM, generator=generator)
    return [[torch.randn(1, TOKENS, TEXT_DIM, generator=generator), {"pooled_output": pooled}]]


class TestFlowModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestFlowModel",
            display_name="Test Flow Model",
            category="test",
            description="A random SD3 of depth 2, loaded by ComfyUI's own code, and conditioning for it.",
            outputs=[io.Model.Output(display_name="MODEL"),
                     io.Conditioning.Output("positive", display_name="positive"),
                     io.Conditioning.Output("negative", display_name="negative")],
        )

    @classmethod
    def execute(cls):
        model = comfy.sd.load_diffusion_model_state_dict(weights())
        return io.NodeOutput(model, conditioning(seed=1), conditioning(seed=2))
