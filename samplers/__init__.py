"""Lambda Solvers: few-step solvers for diffusion and flow models, in half-log-SNR.

    from samplers import k_diffusion_sampler
    x = k_diffusion_sampler("dpmpp_2m")(model, x, sigmas)

Read in this order: schedule (noise levels and paths), phi (quadrature), integrand (what is interpolated),
solver (which evaluations a step uses; score_sde: predictor and corrector), sample (the loop), catalogue and
families (all by name), k_diffusion and model (the host's convention). Beside them stand clocks (where levels
fall), denoisers (around the model's: the first evaluation left out, answers bounded), classifier (guidance
that adds to them) and noise. The folder learning holds what is learned of a model: record and storage
(files), statistics (DPM-Solver-v3's own), fitted (nodes and weights from measured trajectories), hypersolver
(a network for what steps miss), amed and predictor (a learned inner evaluation); course (probed, counted,
resumable), gauss_newton, and on them measure, train_amed, train_hypersolver and refit.

Symbols, the same everywhere:

    x            state, x = alpha x0 + sigma eps
    D, denoised  the model's estimate of x0
    eps          (x - alpha D) / sigma
    m            what is interpolated: D or eps
    lam          log(alpha / sigma)
    s -> t       departure and arrival of a step, h = lam_t - lam_s
    r            a node's place in the step, in units of h
    z            argument of the phi-functions: h, -h, (1 + eta) h
    eta          share of noise, 0 the ODE, 1 the SDE
    xi           increment of the noise, of unit variance
    span         the stretch of its path: two levels
    nfe          number of model evaluations

The noise of image k of a batch is that of seed + k alone, whatever the batch, the device and the schedule.
"""
from .catalogue import nfe
from .families import FAMILIES, SAMPLERS
from .k_diffusion import k_diffusion_sampler
from .learning.amed import Amed
from .learning.fitted import Plan, fit_multistep, fitted_sigmas
from .learning.hypersolver import Hypersolver
from .learning.measure import estimate_statistics
from .learning.record import load_calibration
from .learning.refit import refit_multistep
from .learning.statistics import Statistics
from .learning.storage import CalibrationError
from .learning.train_amed import fit_amed
from .learning.train_hypersolver import fit_hypersolver, hypersolver_bytes, hypersolver_cost
from .model import UnsteadyModel
from .schedule import PATHS

__all__ = ["Amed", "FAMILIES", "Hypersolver", "PATHS", "Plan", "SAMPLERS", "Statistics", "CalibrationError",
           "UnsteadyModel", "estimate_statistics", "fit_amed", "fit_hypersolver", "fit_multistep",
           "fitted_sigmas", "hypersolver_bytes", "hypersolver_cost", "k_diffusion_sampler",
           "load_calibration", "nfe", "refit_multistep"]
