"""Custom nodes for tests inside a real ComfyUI server: link this folder into its custom_nodes.

    Test Flow Model      a random SD3 of 1.2 million parameters, with conditioning for it
    Test Model Sampling  the same denoiser behind another prediction type
    Test NaN Model       a model that breaks at a given evaluation
    Test Slow Model      a model that takes its time, for interruptions
    Test Counter         writes a line for every evaluation
    Test Sigmas          a schedule written down
    Test KSampler Inside a node that makes the sampling one while it runs
    Test Save Latent     writes a latent so that tests can compare it exactly

An evaluation is one guided prediction: the whole conditioning batch at one sigma, however ComfyUI divides it.
"""
import gc

from comfy_api.latest import ComfyExtension

from .evaluations import TestCounter, TestNaNModel, TestSlowModel
from .flow_model import TestFlowModel
from .inside import TestKSamplerInside
from .model_sampling import TestModelSampling
from .save_latent import TestSaveLatent
from .sigmas import TestSigmas


class Doubles(ComfyExtension):
    async def get_node_list(self):
        return [TestFlowModel, TestModelSampling, TestNaNModel, TestSlowModel, TestCounter, TestSigmas,
                TestKSamplerInside, TestSaveLatent]


async def comfy_entrypoint():
    # ComfyUI collects all garbage whenever a changed copy of a model has gone: a quarter of a test's time,
    # and none of it is in the modules that were loaded until now
    gc.freeze()
    return Doubles()
