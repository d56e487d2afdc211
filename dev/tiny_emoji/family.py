"""The model families of the two checkpoints, as ComfyUI's loader asks for them."""
import comfy.ops
from comfy.latent_formats import LatentFormat
from comfy.supported_models_base import BASE, ClipTarget

from .network import (CONTEXT_DIM, HEAD_CHANNELS, IMAGE_CHANNELS, MODEL_CHANNELS, NANO_CHANNELS, narrow,
                      narrow_groups)
from .text import WordEncoder, WordTokenizer


class PixelLatent(LatentFormat):
    """A latent that is the RGB picture itself, in -1..1.

    ComfyUI counts eight pixels to a latent cell unless a format says otherwise. This one keeps that, so that
    EmptyLatentImage at 256 x 256 makes the 32 x 32 the network was trained on.
    """

    latent_channels = IMAGE_CHANNELS

    def __init__(self):
        self.latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]  # for previews


class TinyEmoji(BASE):
    """A small Stable Diffusion U-Net on pixels: eps-prediction, SD's betas, 1000 timesteps.

    The checkpoint's VAE is ComfyUI's `pixel_space_vae`, which only turns -1..1 into 0..1.
    """

    unet_config = {
        "in_channels": IMAGE_CHANNELS, "model_channels": MODEL_CHANNELS, "context_dim": CONTEXT_DIM
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": HEAD_CHANNELS}
    latent_format = PixelLatent

    def get_model(self, state_dict, prefix="", device=None):
        model = super().get_model(state_dict, prefix, device=device)
        narrow_groups(model.diffusion_model)
        return model

    def clip_target(self, state_dict={}):
        target = ClipTarget(WordTokenizer, WordEncoder)
        target.params["vocab_size"] = len(state_dict["cond_stage_model.token_embedding.weight"])
        return target


class NanoEmoji(TinyEmoji):
    """The same with fewer channels than ComfyUI's groups are; in full precision only."""

    unet_config = TinyEmoji.unet_config | {"model_channels": NANO_CHANNELS}
    unet_extra_config = TinyEmoji.unet_extra_config | {"num_head_channels": NANO_CHANNELS}

    def get_model(self, state_dict, prefix="", device=None):
        self.custom_operations = narrow(comfy.ops.disable_weight_init)
        return BASE.get_model(self, state_dict, prefix, device=device)
