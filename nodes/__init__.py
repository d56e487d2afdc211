"""Everything that knows ComfyUI: the names in its sampler lists, a SAMPLER node for every family, and the
nodes that measure and keep what a solver needs to know of a model."""
from comfy_api.latest import ComfyExtension, io

from . import store
from .compare import CompareSamplers
from .registry import register, sampler_nodes
from .statistics import NODES


class LambdaSolvers(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*sampler_nodes(), *NODES, CompareSamplers]


store.register()
register()


def comfy_entrypoint() -> ComfyExtension:
    return LambdaSolvers()
