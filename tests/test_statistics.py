"""Statistics and their files: what is written is read, whole, and nothing else is."""
from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from problems import gaussian_statistics, smooth_statistics
from processes import EVERY_PLACE, HALF, IN_PLACE, KILLED, NEEDS_FORK, copy, ended, kill_within_write
from samplers import Statistics, CalibrationError, k_diffusion_sampler
from samplers.learning.statistics import FORMAT
from sealed import write_sealed


def small(**changes) -> Statistics:
    parts = {
        "lam": np.linspace(-2, 3, 6), "l": np.linspace(1, 0.4, 6), "s": np.zeros(6), "b": np.ones(6),
        **changes
    }
    return Statistics(**{name: np.asarray(value, dtype=np.float64) for name, value in parts.items()})


def test_what_is_saved_is_loaded(tmp_path) -> None:
    whole = Statistics(np.linspace(-2, 3, 6), *np.random.default_rng(0).normal(size=(3, 6, 4, 1, 1)),
                       s_alone=np.ones(6), about={"model": "SD15", "guidance": 3.0, "patches": ["a"]})
    whole.save(tmp_path / "x.safetensors")
    again = Statistics.load(tmp_path / "x.safetensors")
    assert again.about == whole.about
    for name in ("lam", "l", "s", "b", "s_alone"):
        assert np.array_equal(getattr(again, name), getattr(whole, name))


def test_a_file_is_never_overwritten_silently(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    small().save(path)
    with pytest.raises(FileExistsError, match="x.safetensors exists: choose another name, or overwrite it"):
        small(b=np.zeros(6)).save(path)
    assert Statistics.load(path).b[0] == 1.0
    small(b=np.zeros(6)).save(path, overwrite=True)
    assert Statistics.load(path).b[0] == 0.0 and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"lam": [0, 1, 2, 2, 3, 4]}, r"lam must increase, but lam\[3\] = 2 after lam\[2\] = 2"),
    ({"lam": [0]}, "lam has shape .*at least two"),
    ({"l": np.ones(5)}, r"l has shape \[5\]: it must be \[6, ...\]"),
    ({"s": np.ones((6, 3, 1, 1))}, "s has shape .*must agree"),
    ({"b": [1, np.nan, 1, 1, np.inf, 1]}, "b has 2 values that are not finite"),
    ({"l": np.full(6, 1e3)}, r"the integral of .l. over lam is 5e[+]03: no model has more than 300"),
    ({"root": np.ones((0, 13, 13))}, r"root has shape \[0, 13, 13\]: it must be \[trajectories, 13, 13\]"),
    ({"damping": np.ones((6, 2))}, r"damping has shape \[6, 2\]: it must be \[6\]"),
    ({"b": [1, 1e20, 1, 1, 1, -1e300]}, "b has 2 values that are not finite, or beyond 2e[+]19"),
])
def test_impossible_curves_are_refused_each_with_its_message(changes: dict, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        small(**changes)


def written(path: Path, tensors: dict, metadata: dict) -> Path:
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in tensors.items()}
    write_sealed(path, arrays, metadata)
    return path


@pytest.mark.parametrize(
    ("break_it", "message"),
    [(lambda p, t, m: written(p, t, {**m, "format": "lambda-solvers statistics 9"}),
      "format 'lambda-solvers statistics 9'.*update"),
     (lambda p, t, m: written(p, t, {"format": "pt"}),
      "is not a file of lambda-solvers statistics, but of pt"),
     (lambda p, t, m: written(p, t, {}), "is not a file of lambda-solvers statistics"),
     (lambda p, t, m: written(p, {k: v for k, v in t.items()
                                  if k != "s"}, m), "the tensor 's' is missing; it has b, l, lam"),
     (lambda p, t, m: written(p, {**t, "l": np.ones(4)}, m), "l has shape"),
     (lambda p, t, m: written(p, {**t, "l": np.full(6, np.nan)}, m), "l has 6 values that are not finite"),
     (lambda p, t, m: written(p, {**t, "lam": t["lam"][::-1].copy()}, m), "lam must increase"),
     (lambda p, t, m: written(p, t, {**m, "about": "{"}), "damaged or was cut short"),
     (lambda p, t, m: written(p, t, {**m, "about": "[1]"}), "about is .1.: it must be an object"),
     (lambda p, t, m: written(p, t, {**m, "about": '{"guidance": "7"}'}),
      "about.guidance is '7': it must be a finite number"),
     (lambda p, t, m: p.mkdir(), "cannot be read|damaged"),
     (lambda p, t, m: written(p, t, {**m, "about": '{"guidance": NaN}'}),
      "damaged or was cut short: NaN is no number"),
     (lambda p, t, m: written(p, t, {**m, "about": "[" * 100_000}), "damaged or was cut short"),
     (lambda p, t, m: save_file({k: torch.tensor(v).bfloat16()
                                 for k, v in t.items()}, p, m), "damaged or was cut short.*bfloat16"),
     (lambda p, t, m: p.write_bytes(written(p, t, m).read_bytes()[:-9]), "damaged or was cut short"),
     (lambda p, t, m: p.write_bytes(written(p, t, m).read_bytes()[:40]), "damaged or was cut short"),
     (lambda p, t, m: p.write_bytes(b""), "damaged or was cut short"),
     (lambda p, t, m: p.write_bytes(b"\xff" * 4096), "damaged or was cut short"),
     (lambda p, t, m: None, "does not exist"), ])
def test_a_broken_file_is_refused_by_its_fault(tmp_path, break_it, message: str) -> None:
    path = tmp_path / "x.safetensors"
    break_it(path, {"lam": np.linspace(-2, 3, 6), "l": np.ones(6), "s": np.zeros(6), "b": np.zeros(6)},
             {"format": FORMAT, "about": json.dumps({})})
    with pytest.raises(CalibrationError, match=message):
        Statistics.load(path)


def test_every_truncation_of_a_file_is_refused(tmp_path) -> None:
    small().save(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    for length in range(0, len(content), 7):
        (tmp_path / "y.safetensors").write_bytes(content[:length])
        with pytest.raises(CalibrationError):
            Statistics.load(tmp_path / "y.safetensors")


@NEEDS_FORK
def test_of_two_processes_that_save_one_name_one_wins_whole(tmp_path) -> None:
    """Each waits until the other too has written all it has and would put it in place."""
    path, fsync = tmp_path / "x.safetensors", os.fsync

    def save(n: int, here: int, there: int) -> None:
        def together(file: int) -> None:
            fsync(file)
            os.write(there, b".")
            os.read(here, 1)

        os.fsync = together
        curve = np.full(2_000, float(n))
        try:
            Statistics(np.linspace(-1, 1, 2_000), curve, curve, curve).save(path)
        except FileExistsError:
            os._exit(3)

    for _ in range(20):
        path.unlink(missing_ok=True)
        (a, to_a), (b, to_b) = os.pipe(), os.pipe()
        racers = [copy(lambda: save(1, a, to_b)), copy(lambda: save(2, b, to_a))]
        ends = [ended(racer) for racer in racers]
        for end in (a, to_a, b, to_b):
            os.close(end)
        assert sorted(ends) == [0, 3]
        found = Statistics.load(path)
        assert {*found.l, *found.s, *found.b} == {ends.index(0) + 1}
        assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@NEEDS_FORK
@EVERY_PLACE
def test_a_kill_within_a_write_leaves_the_old_file_or_the_new_one_and_never_a_part(tmp_path,
                                                                                   place: str) -> None:
    path, new = tmp_path / "x.safetensors", small()
    old = Statistics(new.lam, new.l + 1, new.s, new.b)
    old.save(path)
    assert ended(copy(lambda: (kill_within_write(0, place), new.save(path, overwrite=True)))) == KILLED
    assert np.array_equal(Statistics.load(path).l, (new if place == IN_PLACE else old).l)
    [left] = [p for p in tmp_path.iterdir() if p != path] or [None]
    assert (left is None) == (place == IN_PLACE)
    if place == HALF:
        with pytest.raises(CalibrationError):
            Statistics.load(left)


def test_published_npz_folders_are_read(tmp_path) -> None:
    curves = np.random.default_rng(1).normal(size=(3, 121, 3, 1, 1))
    np.savez(tmp_path / "l.npz", l=curves[0])
    np.savez(tmp_path / "sb.npz", s=curves[1], b=curves[2])
    read = Statistics.from_npz(tmp_path, (-4.4, 4.6), {"model": "cifar10"})
    assert np.array_equal(read.l, curves[0]) and np.array_equal(read.b, curves[2])
    assert (read.lam[0], read.lam[-1], len(read.lam)) == (-4.4, 4.6, 121) and read.about["model"] == "cifar10"
    read.save(tmp_path / "x.safetensors")
    assert np.array_equal(Statistics.load(tmp_path / "x.safetensors").s, curves[1])
    (tmp_path / "sb.npz").unlink()
    with pytest.raises(CalibrationError, match="sb.npz does not exist"):
        Statistics.from_npz(tmp_path, (-4.4, 4.6))


def test_a_schedule_outside_the_grid_is_refused_with_both_ranges() -> None:
    statistics = Statistics(*(np.asarray(v) for v in ([-2.0, 2.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0])))
    sampler = k_diffusion_sampler("dpm_solver_v3", statistics=statistics)
    with pytest.raises(
            ValueError,
            match=r"cover lambda from -2.000 to 2.000 .*goes to lambda = -2.679 \(sigma = 14.57\)"):
        sampler(lambda x, sigma: x, torch.zeros(1, 1), torch.tensor([14.57, 1.0, 0.0]), disable=True)


def test_without_statistics_the_solver_is_refused() -> None:
    with pytest.raises(ValueError,
                       match="statistics = None: give the model's statistics: samplers.estimate_statistics"):
        k_diffusion_sampler("dpm_solver_v3")


def test_curves_are_linear_between_grid_points_and_rows_of_channels_stay_rows() -> None:
    statistics = Statistics(np.array([0.0, 1.0, 3.0]), *np.arange(18.0).reshape(3, 3, 2))
    assert np.allclose(statistics.at("l", 2.0), (statistics.l[1] + statistics.l[2]) / 2)
    assert statistics.at("l", np.array([0.5, 1.0])).shape == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 4, 4)], ids=["channels", "elements"])
def test_statistics_by_channel_or_element_that_agree_are_those_of_one_number(shape, dtype) -> None:
    one = gaussian_statistics()
    many = Statistics(one.lam, *(np.broadcast_to(curve[:, None, None, None], (len(one.lam), *shape)).copy()
                                 for curve in (one.l, one.s, one.b)))
    x = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    results = [
        k_diffusion_sampler("dpm_solver_v3", statistics=statistics)(lambda x, sigma: x * 0.3, x,
                                                                    torch.tensor([9.0, 3.0, 1.0, 0.2, 0.0]),
                                                                    disable=True)
        for statistics in (one, many)
    ]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)
    assert results[0].dtype == dtype


@pytest.mark.parametrize(("curves", "x"), [((4, 1, 1), (2, 3, 4, 4)), ((3, 1, 1), (2, 3, 5, 4, 4)),
                                           ((3, 1, 1), (2, 1, 4, 4)), ((3, 4, 4), (2, 3, 8, 8)),
                                           ((1, 3, 1, 1, 1), (2, 3, 4, 4))])
def test_statistics_by_channel_or_element_are_refused_for_other_latents(curves: tuple, x: tuple) -> None:
    one = gaussian_statistics()
    many = Statistics(
        one.lam,
        *(np.broadcast_to(curve.reshape(-1, *[1] * len(curves)), (len(one.lam), *curves)).copy()
          for curve in (one.l, one.s, one.b)))
    with pytest.raises(
            ValueError,
            match=r"do not fit x of shape .*: statistics by channel or element serve only latents like those"
    ):
        k_diffusion_sampler("dpm_solver_v3", statistics=many)(lambda x, sigma: x, torch.ones(x),
                                                              torch.tensor([9.0, 1.0, 0.0]), disable=True)


@pytest.mark.parametrize("shape", [(), (3, 1, 1)], ids=["one number", "channels"])
def test_v3_needs_no_number_from_the_device(shape) -> None:
    one = smooth_statistics()
    statistics = Statistics(
        one.lam,
        *(np.broadcast_to(curve.reshape(-1, *[1] * len(shape)), (len(one.lam), *shape)).copy()
          for curve in (one.l, one.s, one.b)))
    result = k_diffusion_sampler("dpm_solver_v3", "flow",
                                 statistics=statistics)(lambda x, sigma: x * 0.5,
                                                        torch.empty(1, 3, 4, 4, device="meta"),
                                                        torch.tensor([1.0, 0.9, 0.5, 0.1, 0.0]), disable=True)
    assert result.is_meta
