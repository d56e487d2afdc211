"""What stands in KSampler's list, and the catalogue's name of it. At most ten, and forever: workflows carry them."""

NAMES = {
    "lambda_2m": "dpmpp_2m",
    "lambda_3m": "dpmpp_3m",
    "lambda_2m_sde": "dpmpp_2m_sde",
    "lambda_3m_sde": "dpmpp_3m_sde",
    "dpm_solver_v3": "dpm_solver_v3",
    "amed": "amed",
    "amed_dpmpp_2m": "amed_dpmpp_2m",
    "lambda_fitted": "fitted_chosen",
}
