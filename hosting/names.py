"""What a user can choose, in every host: names in lists of samplers, and the families that have a node."""

NAMES = {
    "lambda_2m": "dpmpp_2m",
    "lambda_3m": "dpmpp_3m",
    "lambda_2m_sde": "dpmpp_2m_sde",
    "lambda_3m_sde": "dpmpp_3m_sde",
    "lambda_v3": "dpm_solver_v3",
    "lambda_amed": "amed",
    "lambda_amed_2m": "amed_dpmpp_2m",
    "lambda_fitted": "fitted_chosen",
}
"""Name in KSampler's list -> the catalogue's. At most ten; once published, forever."""

NODES = {
    "multistep": "Multistep",
    "singlestep": "Singlestep",
    "adaptive": "Adaptive",
    "sde": "SDE",
    "pc": "Predictor-Corrector",
    "v3": "DPM-Solver-v3",
    "fitted": "Fitted",
    "amed": "AMED",
}
"""Family -> its node's title. The other families are bases and teachers, and Analytic-DPM: SAMPLERS has
them, and Compare Samplers runs them, as lambda/analytic_dpm."""

EVERYDAY = ("multistep", "sde", "fitted")
"""Families for every model. The others seldom pay, or want many steps (docs/accuracy.md)."""


def node_id(family: str) -> str:
    return "LambdaSampler" + family.capitalize()
