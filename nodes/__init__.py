"""Everything that knows ComfyUI: our names in its sampler lists, the SAMPLER nodes, and the
nodes that measure and keep what a solver needs to know of a model."""
import logging

from comfy_api.latest import ComfyExtension, io

from . import folder
from .compare import CompareSamplers
from .guiding import ClassifierGuiderNode
from .knowledge import NODES as LEARNING
from .loading import LoadCalibration
from .sampling import SamplerOptions, register, sampler_nodes
from .scheduling import LambdaScheduler


class LambdaSolvers(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*sampler_nodes(), *LEARNING, LoadCalibration, LambdaScheduler,
                SamplerOptions, ClassifierGuiderNode, CompareSamplers]


folder.register()
register()
try:  # what shows, predicts and records needs more of ComfyUI than samplers and nodes, which work without it
    from . import status
    status.register()
except Exception as fault:
    logging.warning("Lambda Solvers: this ComfyUI lacks something that the panel on nodes, progress texts "
                    "and the images' metadata need (%r). Samplers and nodes work without them", fault,
                    exc_info=True)


def comfy_entrypoint() -> ComfyExtension:
    return LambdaSolvers()
