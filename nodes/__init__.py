"""Everything that knows ComfyUI: the names in its sampler lists, a SAMPLER node for every family, and the
nodes that measure and keep what a solver needs to know of a model."""
from comfy_api.latest import ComfyExtension, io

from server import PromptServer

from . import first_steps, store, web
from .calibrating import NODES
from .compare import CompareSamplers
from .registry import register, sampler_nodes


class LambdaSolvers(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*sampler_nodes(), *first_steps.NODES, *NODES, CompareSamplers]


store.register()
register()
if hasattr(PromptServer, "instance"):  # not where the pack is imported without a server, for its definitions only
    web.register()


def comfy_entrypoint() -> ComfyExtension:
    return LambdaSolvers()
