"""Models whose evaluations break, wait or are counted. They can be chained, in any order."""
import math
import time
from pathlib import Path

import folder_paths
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

SAME_MODEL = "torch.compile"  # a key of wrappers that leave the model what it is


class TestNaNModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestNaNModel", display_name="Test NaN Model", category="test", inputs=[
                io.Model.Input("model"),
                io.Int.Input("at_call", default=1, min=1,
                             tooltip="The first evaluation of a run that is NaN.")
            ], outputs=[io.Model.Output(display_name="MODEL")],
        )

    @classmethod
    def execute(cls, model, at_call):
        calls = 0

        def sample(executor, *args, **kwargs):
            nonlocal calls
            calls = 0
            return executor(*args, **kwargs)

        def predict(executor, *args, **kwargs):
            nonlocal calls
            calls += 1
            denoised = executor(*args, **kwargs)
            return denoised * math.nan if calls >= at_call else denoised

        patched = model.clone()
        patched.add_wrapper(WrappersMP.OUTER_SAMPLE, sample)
        patched.add_wrapper(WrappersMP.PREDICT_NOISE, predict)
        return io.NodeOutput(patched)


class TestSlowModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestSlowModel", display_name="Test Slow Model", category="test", inputs=[
                io.Model.Input("model"),
                io.Float.Input("seconds", default=0.5, min=0.0, max=60.0, step=0.01)
            ], outputs=[io.Model.Output(display_name="MODEL")],
        )

    @classmethod
    def execute(cls, model, seconds):
        def predict(executor, *args, **kwargs):
            time.sleep(seconds)
            return executor(*args, **kwargs)

        patched = model.clone()
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, SAME_MODEL, predict)
        return io.NodeOutput(patched)


class TestCounter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestCounter", display_name="Test Counter", category="test", description=
            "Appends a line to output/NAME.count at every evaluation: its sigma. Or at every call of the "
            "network, of which an evaluation takes two if its conds do not fit into one batch: its "
            "timestep.", inputs=[
                io.Model.Input("model"),
                io.String.Input("name", default="evaluations"),
                io.Boolean.Input("calls", default=False, optional=True)
            ], outputs=[io.Model.Output(display_name="MODEL")],
        )

    @classmethod
    def execute(cls, model, name, calls=False):
        path = Path(folder_paths.get_output_directory(), f"{name}.count")

        def predict(executor, x, timestep, *args, **kwargs):
            with path.open("a") as file:
                file.write(f"{float(timestep[0])!r}\n")
            return executor(x, timestep, *args, **kwargs)

        patched = model.clone()
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL if calls else WrappersMP.PREDICT_NOISE,
                                     SAME_MODEL, predict)
        return io.NodeOutput(patched)
