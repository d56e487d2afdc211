"""Everything that knows ComfyUI: the names in its sampler lists, and one SAMPLER node for every family."""
from comfy_api.latest import ComfyExtension, io

from .registry import register, sampler_nodes


class LambdaSolvers(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return sampler_nodes()


register()


def comfy_entrypoint() -> ComfyExtension:
    return LambdaSolvers()
