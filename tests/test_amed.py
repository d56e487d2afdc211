"""AMED and its plugins: what they are untrained, what training by forward evaluations achieves, its file,
its predictor."""
from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from problems import Counted, Gaussian, reference_mixture, starting_noise
from processes import EVERY_PLACE, IN_PLACE, KILLED, NEEDS_FORK, copy, ended, kill_within_write, slow
from samplers import PATHS, SAMPLERS, Amed, CalibrationError, Statistics, fit_amed, k_diffusion_sampler, nfe
from samplers.learning.amed import BASES, Inner, Insertion
from samplers import FAMILIES
from samplers.k_diffusion import k_diffusion_function
from samplers.learning.predictor import Predictor
from samplers.sample import sample
from samplers.schedule import levels
from samplers.tensors import per_image
from samplers.learning.train_amed import (BUDGET, FLOOR, Student, _teacher, predictor_loss, training_cost,
                                          watched)
from sealed import write_sealed

NAMES = {sampler.fixed["base"]: name for name, sampler in SAMPLERS.items() if "trained" in sampler.options}
SIGMAS = [60.0 * (0.02 / 60.0) ** (i / 4) for i in range(5)]


def noises(count: int, seed: int = 0, sigma: float = 60.0) -> torch.Tensor:
    shape = reference_mixture("ve")[1].shape[1:]
    return torch.randn(
        (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sigma


@pytest.mark.parametrize("path", PATHS)
def test_untrained_amed_is_dpm_solver_2(path: str) -> None:
    problem = Gaussian(path)
    sigmas = torch.tensor([0.9, 0.5, 0.2, 0.05, 0.0], dtype=torch.float64)
    x = starting_noise((2, 3, 4, 4), 0.9, path)
    theirs = k_diffusion_sampler("dpm_2s", path)(problem, x, sigmas, disable=True)
    for name in ("amed", "amed_dpm_2"):
        result = k_diffusion_sampler(name, path, trained=Amed.untrained())(problem, x, sigmas, disable=True)
        torch.testing.assert_close(result, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
def test_a_trained_run_is_the_same_on_every_path_after_division_by_alpha(base: str) -> None:
    """With every number away from its untrained value, the told sigma included."""
    lam = np.array([-1.5, -0.3, 0.9, 2.0])
    results = []
    for path in PATHS:
        schedule = [PATHS[path].at(value) for value in lam]
        trained = Amed(lam, np.array([[0.3, 1.1, 0.8], [0.6, 0.9, 1.2], [0.45, 1.05, 0.9]]), base)
        x = starting_noise((2, 3, 4, 4), PATHS["ve"].at(lam[0]).sigma, "ve") * schedule[0].alpha
        fn = k_diffusion_sampler(NAMES[base], path, trained=trained) if base in NAMES else None
        if fn is None:
            fn = k_diffusion_function(FAMILIES["amed"], path, {"trained": trained, "base": base})
        sigmas = torch.tensor([level.sigma for level in schedule], dtype=torch.float64)
        results.append(fn(Gaussian(path), x, sigmas, disable=True) / schedule[-1].alpha)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-9)


def error(what: Amed, base: str, model=None) -> float:
    """The rms error of 64 other images, to the converged solution."""
    model = model or reference_mixture("ve")[0]
    x = noises(64, seed=5)
    fn = k_diffusion_function(FAMILIES["amed"], "ve", {"trained": what, "base": base})
    result = fn(model, x, torch.tensor(SIGMAS, dtype=torch.float64), disable=True)
    fine = torch.tensor([60.0 * (0.02 / 60.0) ** (i / 400) for i in range(401)], dtype=torch.float64)
    return float(
        (result - k_diffusion_sampler("dpmpp_2m")(model, x, fine, disable=True)).square().mean().sqrt())


SHARE_LEFT = {"ipndm": 1.0, "ipndm_3": 1.0, "dpm_3m": 0.95}
"""Of the untrained error at most, and of other bases 0.8; for the first two nothing better is found, and
nothing is changed."""


@pytest.mark.parametrize("first_step", ["evaluate", "afs"])
@pytest.mark.parametrize("base", BASES)
def test_training_lowers_the_error_at_the_end_and_spends_its_budget_at_most(base: str,
                                                                            first_step: str) -> None:
    model = Counted(reference_mixture("ve")[0])
    trained = fit_amed(model, noises(48), SIGMAS, base=base, first_step=first_step, held_out=16)
    losses = trained.about["losses"]
    assert losses["trained"]["training"][-1] <= losses["untrained"]["training"][-1]
    generation = nfe(NAMES.get(base, "amed"), SIGMAS, first_step=first_step,
                     trained=replace(trained, base=None))
    assert model.calls == trained.about["evaluations"] <= BUDGET * generation
    share = SHARE_LEFT.get(base, 0.8) + 1e-9
    assert losses["trained"]["held out"][-1] <= share * losses["untrained"]["held out"][-1]
    assert error(trained,
                 base) <= share * error(Amed.untrained(levels(SIGMAS, PATHS["ve"]), base, first_step), base)


def test_amed_trained_is_far_better_than_untrained() -> None:
    trained = fit_amed(reference_mixture("ve")[0], noises(48), SIGMAS)
    assert error(trained, "amed") < 0.4 * error(Amed.untrained(base="amed"), "amed")


@pytest.mark.parametrize("steps", [2, 3, 5, 8, 12])
@pytest.mark.parametrize("first_step", ["evaluate", "afs"])
@pytest.mark.parametrize("learn", [("r", "c", "a"), ("r",), ("c",)])
def test_the_cost_is_told_beforehand(steps: int, first_step: str, learn: tuple) -> None:
    sigmas = [14.0 * (0.03 / 14.0) ** (i / (steps - 1)) for i in range(steps)] + [0.0]
    model = Counted(reference_mixture("ve")[0])
    trained = fit_amed(model, noises(4), sigmas, first_step=first_step, learn=learn)
    told = training_cost(levels(sigmas, PATHS["ve"]), first_step=first_step, learn=learn)
    assert model.calls == trained.about["evaluations"] <= told <= BUDGET * (2 * steps - 1 -
                                                                            (first_step == "afs"))


@pytest.mark.parametrize("first_step", ["evaluate", "afs"])
def test_short_and_long_schedules_spend_alike(first_step: str) -> None:
    for steps in range(2, 21):
        schedule = levels([14.0 * (0.03 / 14.0)**(i / (steps - 1)) for i in range(steps)] + [0.0],
                          PATHS["ve"])
        run = 2 * steps - 1 - (first_step == "afs")
        assert 0.7 * BUDGET * run < training_cost(schedule, first_step=first_step) <= BUDGET * run


def test_only_what_is_to_be_learned_moves() -> None:
    for learn in (("r",), ("c",), ("a",), ("r", "c")):
        table = fit_amed(reference_mixture("ve")[0], noises(8), SIGMAS, learn=learn).table
        for column, (name, untrained) in enumerate({"r": 0.5, "c": 1.0, "a": 1.0}.items()):
            assert (name in learn) == bool((np.abs(table[:, column] - untrained) > 1e-9).any())


@pytest.mark.parametrize("path", ["ve", "flow"])
def test_schedules_to_zero_and_from_pure_noise_are_trained_in_between(path: str) -> None:
    sigmas = {"ve": [14.6, 3.0, 0.5, 0.0], "flow": [1.0, 0.8, 0.4, 0.0]}[path]
    shape = reference_mixture(path)[1].shape[1:]
    x = torch.randn((8, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * sigmas[0]
    trained = fit_amed(reference_mixture(path)[0], x, sigmas, path=path)
    moved = (np.abs(trained.table - (0.5, 1.0, 1.0)) > 1e-6).any(1)
    assert moved.tolist() == {"ve": [True, True, False], "flow": [False, True, False]}[path]
    result = k_diffusion_sampler("amed", path, trained=trained)(reference_mixture(path)[0], x,
                                                                torch.tensor(sigmas), disable=True)
    assert result.isfinite().all()


def test_another_schedule_is_refused_by_name_unless_interpolation_is_allowed() -> None:
    model, x = reference_mixture("ve")[0], noises(2)
    trained = fit_amed(model, noises(8), SIGMAS)
    other = torch.tensor([60.0, 5.0, 0.5, 0.02], dtype=torch.float64)
    said = r"trained for 4 steps over sigma / alpha = 60, 8\.1.* schedule is 3 steps over .*60, 5, 0\.5"
    with pytest.raises(ValueError, match=said):
        k_diffusion_sampler("amed", trained=trained)(model, x, other, disable=True)
    assert k_diffusion_sampler("amed", trained=trained, interpolate=True)(model, x, other,
                                                                          disable=True).isfinite().all()
    same = [k_diffusion_sampler("amed", trained=trained, interpolate=how)(
        model, x, torch.tensor(SIGMAS, dtype=torch.float64), disable=True) for how in (False, True)]
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-6)


def test_another_base_or_first_step_than_the_trained_one_is_refused() -> None:
    schedule = levels(SIGMAS, PATHS["ve"])
    with pytest.raises(ValueError, match="trained on base dpmpp_2m, and amed is chosen"):
        k_diffusion_sampler("amed", trained=Amed.untrained(schedule, "dpmpp_2m"))
    with pytest.raises(ValueError, match="first_step = 'afs', but this AMED was trained with evaluate"):
        k_diffusion_sampler("amed", trained=Amed.untrained(schedule, "amed"), first_step="afs")
    assert nfe("amed", SIGMAS, trained=Amed.untrained(schedule, "amed", "afs")) == 7  # follows the training


@pytest.mark.parametrize(("how", "message"), [
    ({"base": "heun"}, "base = 'heun' is out of range: choose one of amed"),
    ({"form": "net"}, "form = 'net' is out of range: choose one of table, predictor"),
    ({"learn": ("q",)}, "learn = .'q',. is out of range: choose some of r, c, a"),
    ({"teacher": 1}, "teacher = 1 is out of range"),
    ({"held_out": 4}, "held_out = 4 is out of range: of 4 noises choose 0 to 3"),
    ({"form": "predictor"}, "middle block of a U-Net, and this model has none: choose the table"),
])
def test_what_cannot_be_trained_is_refused(how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_amed(reference_mixture("ve")[0], noises(4), SIGMAS, **how)


@pytest.mark.parametrize("path", PATHS)
def test_a_schedule_with_nothing_to_learn_is_refused_and_has_no_cost(path: str) -> None:
    sigmas = [1.0, 0.0]
    for refused in (lambda: fit_amed(reference_mixture(path)[0], noises(4), sigmas, path=path),
                    lambda: training_cost(levels(sigmas, PATHS[path]))):
        with pytest.raises(ValueError, match="no interval between two positive levels"):
            refused()


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("at", [1, 20, 25, 34, 45, 60, 70, 90])
def test_a_training_that_was_cut_short_goes_on_and_ends_alike(tmp_path, at: int) -> None:
    partial = tmp_path / "partial.safetensors"
    model = Counted(reference_mixture("ve")[0])

    def cancel(done, total, loss):
        if done == at:
            raise Cancelled

    how = {"base": "dpmpp_2m", "partial": partial, "partial_seconds": 0.0, "held_out": 2}
    whole = fit_amed(model, noises(8), SIGMAS, base="dpmpp_2m", held_out=2)
    all_calls, model.calls = model.calls, 0
    with pytest.raises(Cancelled):
        fit_amed(model, noises(8), SIGMAS, progress=cancel, **how)
    resumed = fit_amed(model, noises(8), SIGMAS, **how)
    np.testing.assert_array_equal(resumed.table, whole.table)
    for name, parts in whole.about["losses"].items():
        for part, values in parts.items():
            assert resumed.about["losses"][name][part] == values
    assert model.calls <= all_calls + at
    if at > 45:
        assert model.calls < all_calls + at - 20  # what was finished is not made again
    assert not partial.exists()


@pytest.mark.parametrize("other", ["noise", "model", "nothing"])
def test_what_was_kept_of_a_training_on_other_noise_or_another_model_is_not_used(tmp_path,
                                                                                 other: str) -> None:
    def cancel(done, total, loss):
        if done == 60:
            raise Cancelled

    partial = tmp_path / "partial.safetensors"
    with pytest.raises(Cancelled):
        fit_amed(reference_mixture("ve")[0], noises(8), SIGMAS, progress=cancel, partial=partial)
    model, x = {"noise": (reference_mixture("ve")[0], noises(8, seed=1)), "model": (Gaussian(), noises(8)),
                "nothing": (reference_mixture("ve")[0], noises(8))}[other]
    counted = Counted(model)
    resumed, whole = fit_amed(counted, x, SIGMAS, partial=partial), fit_amed(model, x, SIGMAS)
    assert (counted.calls < whole.about["evaluations"] - 20) == (other == "nothing")
    np.testing.assert_array_equal(resumed.table, whole.table)
    assert resumed.about["losses"] == whole.about["losses"]


def test_a_damaged_partial_file_is_not_used(tmp_path) -> None:
    partial = tmp_path / "partial.safetensors"
    partial.write_bytes(b"nothing")
    first = fit_amed(reference_mixture("ve")[0], noises(8), SIGMAS, partial=partial)
    np.testing.assert_allclose(first.table, fit_amed(reference_mixture("ve")[0], noises(8), SIGMAS).table)


def trained_file(tmp_path, predictor: Predictor | None = None):
    trained = replace(fit_amed(reference_mixture("ve")[0], noises(8), SIGMAS, about={"model": "m"}),
                      predictor=predictor)
    trained.save(tmp_path / "a.safetensors")
    return trained, tmp_path / "a.safetensors"


@pytest.mark.parametrize("predictor", [None, Predictor(3)])
def test_a_file_keeps_everything(tmp_path, predictor) -> None:
    trained, path = trained_file(tmp_path, predictor)
    loaded = Amed.load(path)
    np.testing.assert_array_equal(loaded.table, trained.table)
    np.testing.assert_array_equal(loaded.lam, trained.lam)
    assert (loaded.base, loaded.first_step) == ("amed", "evaluate")
    assert loaded.about["losses"] == trained.about["losses"] and loaded.about["model"] == "m"
    assert (loaded.predictor is None) == (predictor is None)
    if predictor:
        assert all(torch.equal(loaded.predictor.state_dict()[name], value)
                   for name, value in predictor.state_dict().items())
    with pytest.raises(FileExistsError):
        trained.save(path)


def test_a_file_cut_anywhere_is_refused(tmp_path) -> None:
    _, path = trained_file(tmp_path)
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(CalibrationError, match="damaged or was cut short"):
            Amed.load(path)


@pytest.mark.parametrize(("change", "message"), [
    ({"table": np.full((4, 3), np.nan)}, "table has 12 values that are not finite"),
    ({"table": np.full((4, 3), 1.5)}, "r must be between 0 and 1"),
    ({"table": np.ones((3, 3))}, r"table has shape \[3, 3\]"),
    ({"lam": np.array([0.0, 1.0, 1.0, 2.0, 3.0])}, "lam must increase"),
    ({"table": None}, "'table' is missing"),
    ({"predictor.trunk.0.weight": np.zeros((1, 1), np.float32)}, r"trunk.0.weight is \[1, 1\]"),
])
def test_a_file_with_impossible_content_is_refused(tmp_path, change: dict, message: str) -> None:
    _, path = trained_file(tmp_path)
    tensors = {name: value for name, value in {**load_file(path), **change}.items() if value is not None}
    about = {
        "format": "lambda-solvers amed 2", "about": json.dumps({"base": "amed", "first_step": "evaluate"})
    }
    write_sealed(tmp_path / "b.safetensors", tensors, about)
    with pytest.raises(CalibrationError, match=message):
        Amed.load(tmp_path / "b.safetensors")


def test_statistics_are_not_taken_for_amed_nor_the_other_way_round(tmp_path) -> None:
    _, path = trained_file(tmp_path)
    Statistics.constant().save(tmp_path / "s.safetensors")
    with pytest.raises(CalibrationError,
                       match="not a file of lambda-solvers statistics, but of lambda-solvers amed 2"):
        Statistics.load(path)
    with pytest.raises(CalibrationError,
                       match="not a file of lambda-solvers amed, but of lambda-solvers statistics 1"):
        Amed.load(tmp_path / "s.safetensors")


# --- predictor ----------------------------------------------------------------------------------------------

class SmallUNet(torch.nn.Module):
    """A denoiser with a middle block, smooth in x and in sigma."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        conv = lambda i, o, s=1: torch.nn.Conv2d(i, o, 3, s, 1, dtype=torch.float64)  # noqa: E731
        self.down, self.middle, self.up = conv(4, 16, 2), conv(16, 16), torch.nn.ConvTranspose2d(
            16, 3, 4, 2, 1, dtype=torch.float64)
        self.seen = None

    def forward(self, x, sigma):
        sigma = sigma.reshape(-1, 1, 1, 1)
        level = (sigma.log() / 4).expand(-1, 1, *x.shape[2:])
        y = torch.tanh(self.down(torch.cat([x / (1 + sigma**2).sqrt(), level], 1)))
        y = self.seen = torch.tanh(self.middle(y))
        return x / (1 + sigma**2) + sigma / (1 + sigma**2).sqrt() * self.up(y)


@pytest.mark.parametrize("base", ["amed", "euler"])
def test_the_gradient_by_forward_differences_is_that_of_back_propagation(base: str) -> None:
    """Of a whole run's error, in the weights of the predictor; what it looks at counts as given."""
    net = SmallUNet()
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10
    path, schedule = PATHS["ve"], levels([10.0, 2.0, 0.4], PATHS["ve"])
    network = Predictor(2, torch.float64)
    network.heads.weight.copy_(torch.randn(3, 12, generator=torch.Generator().manual_seed(4),
                                           dtype=torch.float64) * 0.2)
    denoise = lambda x, sigma: net(x, per_image(sigma, x))  # noqa: E731
    table = np.zeros((2, 3))
    with torch.no_grad():
        targets = _teacher(denoise, x, schedule, 8, path)
        student = Student(denoise, Insertion(Amed.untrained(), BASES[base]), schedule, path, targets,
                          differences=(1e-4, 1e-4, 1e-4))
        places, seen = watched(student, x, table, network, lambda: net.seen)
    ours, theirs = (deepcopy(network).requires_grad_() for _ in range(2))
    predictor_loss(ours, seen, slice(0, 3)).backward()

    state = x
    for (_, features, lams, row), s, t in zip(seen.looks, (10.0, 2.0), (2.0, 0.4)):
        u = theirs(features, 3, *lams, row)
        r, c, a = torch.sigmoid(u[:, 0]), 1 + 0.5 * torch.tanh(u[:, 1]), 1 + 0.5 * torch.tanh(u[:, 2])
        m = t**r * s ** (1 - r)
        column, c = m.reshape(-1, 1, 1, 1), c.reshape(-1, 1, 1, 1)
        y = state + (column - s) * (state - net(state, per_image(s, state))) / s
        inner = (y - net(y, a * m)) / column
        state = state + c * (t - s) * inner if base == "amed" else y + c * (t - column) * inner
    torch.testing.assert_close(state.detach(), places[-1].x, rtol=0, atol=1e-9)
    e = (state - targets[2]).square().flatten(1).mean(1)
    (e / (e + FLOOR * e.mean()).detach()).mean().backward()
    for (name, own), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = their.grad.norm()
        assert scale > 0 and (own.grad - their.grad).norm() < 0.01 * scale, name


def test_a_predictor_is_no_worse_than_its_table_and_runs_every_image_by_itself(tmp_path) -> None:
    net = SmallUNet()
    x = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10
    sigmas = [10.0, 2.0, 0.4]
    model = Counted(net)
    trained = fit_amed(model, x, sigmas, form="predictor", features=lambda: net.seen, held_out=4)
    losses = trained.about["losses"]
    assert losses["trained"]["selection"][-1] <= losses["table"]["selection"][-1]
    assert model.calls == trained.about["evaluations"] <= 200 * 4
    trained.save(tmp_path / "p.safetensors")
    loaded = replace(Amed.load(tmp_path / "p.safetensors"), features=lambda: net.seen)
    sampler = k_diffusion_sampler("amed", trained=loaded)
    whole = sampler(net, x[:3], torch.tensor(sigmas, dtype=torch.float64), disable=True)
    for k in range(3):
        alone = sampler(net, x[k:k + 1], torch.tensor(sigmas, dtype=torch.float64), disable=True)
        torch.testing.assert_close(alone, whole[k:k + 1], rtol=0, atol=1e-6)
    table = k_diffusion_sampler("amed", trained=replace(loaded, predictor=None))(
        net, x[:3], torch.tensor(sigmas, dtype=torch.float64), disable=True)
    if loaded.predictor.heads.weight.any():
        assert not torch.allclose(table, whole, atol=1e-6)


def test_a_predictor_of_zero_is_its_table() -> None:
    net = SmallUNet()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10
    sigmas = torch.tensor([10.0, 2.0, 0.4, 0.0], dtype=torch.float64)
    for base in ("amed", "dpmpp_2m", "ipndm"):
        for first_step in ("evaluate", "afs"):
            table = np.array([[0.4, 1.1, 0.9], [0.6, 0.95, 1.05], [0.5, 1.0, 1.0]])
            plain = Amed(np.array([level.lam for level in levels(sigmas.tolist(), PATHS["ve"])]), table, base,
                         first_step)
            results = [
                k_diffusion_sampler(NAMES[base], trained=what)(net, x, sigmas, disable=True)
                for what in (plain, replace(plain, predictor=Predictor(), features=lambda: net.seen))
            ]
            torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


def moving(first_step: str = "evaluate", base: str = "amed", steps: int = 3):
    """A U-Net, x, sigmas, and an AMED with a predictor that moves every number by what the middle block
    holds."""
    net = SmallUNet()
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10
    sigmas = torch.tensor([10.0 * 0.2**i for i in range(steps)] + [0.0], dtype=torch.float64)
    predictor = Predictor(2)
    predictor.heads.weight.copy_(torch.randn(3, 12, generator=torch.Generator().manual_seed(4)))
    untrained = Amed.untrained(levels(sigmas.tolist(), PATHS["ve"]), base, first_step)
    return net, x, sigmas, replace(untrained, predictor=predictor)


def test_a_predictor_that_nothing_shows_the_middle_block_is_refused() -> None:
    net, x, sigmas, trained = moving()
    with pytest.raises(
            ValueError, match=
            "a predictor, which looks at the model's middle block, and nothing shows it: give it features"):
        k_diffusion_sampler("amed", trained=trained)(net, x, sigmas, disable=True)
    assert nfe("amed", sigmas.tolist(), trained=trained) == 5  # to plan, none is needed


@pytest.mark.parametrize("base", ["amed", "dpmpp_2m", "ipndm"])
def test_a_first_step_that_the_model_did_not_answer_is_planned_without_its_middle_block(
        base: str) -> None:
    """Whatever runs before has left behind there."""
    net, x, sigmas, trained = moving("afs", base)
    seen = []

    def run() -> torch.Tensor:
        watched = replace(trained, features=lambda: seen.append(net.seen) or net.seen)
        fn = k_diffusion_sampler(NAMES[base], trained=watched, first_step="afs")
        return fn(net, x, sigmas, disable=True)

    results = []
    for before in (x, 3 - x):
        net(before, per_image(0.5, x))
        results.append(run())
    assert torch.equal(*results) and len(seen) == 2  # of two learned intervals each, only the second


@pytest.mark.parametrize("base", ["amed", "dpmpp_2m", "ipndm"])
def test_a_planned_list_of_steps_serves_one_x_after_another(base: str) -> None:
    net, x, sigmas, trained = moving(base=base, steps=4)
    solver = Insertion(replace(trained, features=lambda: net.seen), BASES[base])
    steps, denoise = solver.steps(levels(sigmas.tolist(), PATHS["ve"]),
                                  PATHS["ve"]), lambda x, sigma: net(x, per_image(sigma, x))
    with torch.no_grad():
        alone = [
            sample(denoise, y, solver.steps(levels(sigmas.tolist(), PATHS["ve"]), PATHS["ve"]))
            for y in (x, 3 - x)
        ]
        again = [sample(denoise, y, steps) for y in (x, 3 - x)]
    assert not torch.allclose(*alone)
    for one, other in zip(alone, again):
        assert torch.equal(one, other)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("base", BASES)
def test_the_plan_of_a_batch_is_that_of_each_of_its_images(base: str, path: str) -> None:
    schedule = [PATHS[path].at(lam) for lam in (-1.5, -0.3, 0.9, 1.9)]
    solver = Insertion(Amed.untrained(schedule), BASES[base])
    u = np.random.default_rng(1).normal(0.0, 0.5, (3, 5, 3))  # of three intervals and five images

    def coefficients(images: slice, i: int) -> list:
        step = solver.step(schedule, PATHS[path], i, [Inner.of(row[images], 4) for row in u])
        return [c for evaluation in step.evaluations for c in (*evaluation.at, *evaluation[1:])
                ] + [c for update in step.updates for c in (update.decay, *sum(update.terms, ()))]

    for i in range(3):
        for image in range(5):
            for all_of_it, own in zip(coefficients(slice(None), i), coefficients(slice(image, image + 1), i),
                                      strict=True):
                its = np.broadcast_to(all_of_it, (5, 1, 1, 1))[image]
                np.testing.assert_allclose(its, own, rtol=1e-13)  # newest numpy rounds one and several apart


def test_a_last_step_that_is_long_for_one_image_is_of_order_1_for_all() -> None:
    schedule = [PATHS["ve"].at(lam) for lam in (-2.0, 0.0, 3.0)]
    solver = Insertion(Amed.untrained(schedule), BASES["dpmpp_2m"])
    for r, terms in ((0.3, 1), (0.6, 2), (np.array([0.6, 0.3]), 1)):
        last = solver.step(schedule, PATHS["ve"], 1, [Inner(), Inner(r)]).updates[-1]
        assert len(last.terms) == terms
        np.testing.assert_allclose(sum(c for _, c in last.terms), 1 - np.exp((r - 1) * 3))  # exact for 1


@NEEDS_FORK
@EVERY_PLACE
def test_a_training_killed_within_a_write_goes_on_from_what_it_had_saved(tmp_path, place: str) -> None:
    partial, model = tmp_path / "x.part", reference_mixture("ve")[0]
    whole = fit_amed(model, noises(8), SIGMAS, base="dpmpp_2m")

    def until_killed(write: int) -> None:
        kill_within_write(write, place)
        fit_amed(slow(model), noises(8), SIGMAS, base="dpmpp_2m", partial=partial)

    for write in (2, 1):
        assert ended(copy(lambda: until_killed(write))) == KILLED
        left = [path for path in tmp_path.iterdir() if path != partial]
        assert len(left) == (place != IN_PLACE)  # the kill came within a write
        for path in left:
            path.unlink()
    counted = Counted(model)
    resumed = fit_amed(counted, noises(8), SIGMAS, base="dpmpp_2m", partial=partial)
    np.testing.assert_allclose(resumed.table, whole.table, rtol=1e-9)
    # the teacher at least was kept
    assert counted.calls <= whole.about["evaluations"] - 20 and not partial.exists()
