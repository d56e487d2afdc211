"""Lambda Solvers: few-step samplers for diffusion and flow models, for ComfyUI."""
try:
    import comfy.samplers  # noqa: F401
except ModuleNotFoundError as fault:
    if fault.name != "comfy":
        raise  # inside ComfyUI, which then says IMPORT FAILED, and why
    # Outside: `import samplers` from this folder is all there is.
else:
    from .nodes import comfy_entrypoint  # noqa: F401

WEB_DIRECTORY = "./web"
