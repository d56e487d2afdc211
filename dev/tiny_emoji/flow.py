"""The same weights as a rectified-flow model: what samplers for SD3 or Flux can be tried on."""
import torch

from comfy.model_sampling import CONST, EPS, ModelSamplingDiscrete, reshape_sigma
from comfy_api.latest import io


class AsFlow(torch.nn.Module, CONST):
    """A variance-exploding model seen as a flow: x = (1 - s) x0 + s eps, 0 <= s <= 1.

    Its own state is x divided by 1 - s,

        y = x / (1 - s) = x0 + varsigma eps,    varsigma = s / (1 - s),

    so D(x, s) = D_ve(y, varsigma), with the timestep of varsigma. The network ends at varsigma_T (14.6, s =
    0.936). Above, it is asked at varsigma_T for the y of the same x / sqrt((1 - s)^2 + s^2), its actual
    input: this is x / (1 - s) again at s = s_T, and finite at s = 1.

    `ve` is the sampling object of the model (eps- or v-prediction on discrete timesteps).
    The levels offered to schedulers are those of SD3 without shift: s = 1/1000 .. 1.
    """

    def __init__(self, ve: ModelSamplingDiscrete):
        super().__init__()
        self.ve = ve
        self.varsigma_max = float(ve.sigma_max)
        self.register_buffer("sigmas", torch.arange(1, 1001) / 1000)

    @property
    def sigma_min(self):
        return self.sigmas[0]

    @property
    def sigma_max(self):
        return self.sigmas[-1]

    def percent_to_sigma(self, percent):
        return min(max(1.0 - percent, 0.0), 1.0)

    def varsigma(self, s):
        return (s / (1 - s)).clamp(max=self.varsigma_max)

    def y(self, s, x):
        s = reshape_sigma(s, x.ndim)
        return x * ((1 + self.varsigma(s) ** 2) / ((1 - s) ** 2 + s ** 2)) ** 0.5

    def timestep(self, sigma):
        return self.ve.timestep(self.varsigma(sigma))

    def sigma(self, timestep):
        """The level of a timestep; the last stands for all of s_T .. 1, of which schedules want the upper
        end."""
        varsigma = self.ve.sigma(timestep)
        return torch.where(timestep >= len(self.ve.sigmas) - 1, 1.0, varsigma / (1 + varsigma))

    def calculate_input(self, sigma, noise):
        return self.ve.calculate_input(self.varsigma(sigma), self.y(sigma, noise))

    def calculate_denoised(self, sigma, model_output, model_input):
        return self.ve.calculate_denoised(self.varsigma(sigma), model_output, self.y(sigma, model_input))


class TinyEmojiAsFlow(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinyEmojiAsFlow", display_name="Tiny Emoji As Flow", category="tiny emoji", description=
            "The same weights as a rectified-flow model, exactly: sigma runs from 1 to 0 as with SD3 "
            "and Flux, and D(x, s) is the original's at x / (1 - s).", inputs=[
                io.Model.Input("model", tooltip="An eps- or v-prediction model, such as the tiny emoji.")
            ], outputs=[io.Model.Output(display_name="MODEL")],
        )

    @classmethod
    def execute(cls, model):
        sampling = model.get_model_object("model_sampling")
        if not (isinstance(sampling, EPS) and isinstance(sampling, ModelSamplingDiscrete)):
            kinds = ", ".join(kind.__name__ for kind in type(sampling).__mro__[:-1])
            raise ValueError(f"Tiny Emoji As Flow takes an eps- or v-prediction model on discrete timesteps; "
                             f"the sampling of this model is a {kinds}.")
        flow = model.clone()
        flow.add_object_patch("model_sampling", AsFlow(sampling))
        return io.NodeOutput(flow)
