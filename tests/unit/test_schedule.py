"""Step lists, solver grids and the two formulas, against recorded values."""
import json
from pathlib import Path

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.schedule import (
    CLEAN,
    Level,
    clean,
    levels,
    nearest_sigma,
    renoise,
    table,
    unipc_levels,
    warp_timestep,
    x0_from_velocity,
)

RECORDED = json.loads((Path(__file__).resolve().parents[1] / "goldens" / "schedules.json").read_text())


def name(case):
    return f"{case['step_list']}-shift{case['shift']:g}-{'warped' if case['warp'] else 'plain'}"


@pytest.mark.parametrize("case", RECORDED["few_step"], ids=name)
def test_step_lists(case):
    """A table of another length, sigma interpolated instead of looked up, or sigma taken as t/1000 in an unwarped
    list all differ from the recorded values."""
    ours = levels(case["step_list"], case["shift"], case["warp"])
    # timesteps are 1000 times larger than sigmas: relative 1e-7 is below one float32 step of either
    assert [level.timestep for level in ours] == pytest.approx(case["timesteps"], rel=1e-7, abs=0)
    assert [level.sigma for level in ours] == pytest.approx(case["sigmas"], rel=0, abs=1e-7)


@pytest.mark.parametrize("case", RECORDED["solver"], ids=lambda c: f"n{c['n']}-shift{c['shift']:g}")
def test_unipc_grids(case):
    """Rounded instead of truncated timesteps, or a grid from 1 instead of 0.999, differ."""
    ours = unipc_levels(case["n"], case["shift"])
    assert [level.timestep for level in ours] == case["timesteps"]
    assert [level.sigma for level in ours] == pytest.approx(case["sigmas"][:-1], rel=0, abs=1e-7)


@pytest.mark.parametrize("case", RECORDED["table_check"], ids=lambda c: f"shift{c['shift']:g}")
def test_table(case):
    timesteps, sigmas = table(case["shift"])
    assert timesteps.shape == sigmas.shape == (1000,) and sigmas.dtype == torch.float32
    for row, entry in case["entries"].items():
        assert float(timesteps[int(row)]) == pytest.approx(entry["timestep"], rel=1e-7, abs=0)
        assert float(sigmas[int(row)]) == pytest.approx(entry["sigma"], rel=0, abs=1e-7)


def test_a_trailing_zero_is_dropped():
    """CausVid's lists end with 0; kept, it would be one more forward at a timestep nobody trained."""
    assert levels([1000, 757, 522, 0], 8.0, warp=False) == levels([1000, 757, 522], 8.0, warp=False)


@pytest.mark.parametrize("steps", [[], [0], [500, 750], [750, 750], [1001, 500], [500, -1], [500, 0, 250]])
def test_unusable_lists_are_refused(steps):
    """A rising list would renoise less than what is there; the message must say what to give instead."""
    with pytest.raises(ForcingError, match="Give falling whole numbers"):
        levels(steps, 5.0)


def test_sigma_lookup_is_nearest_and_first():
    """No interpolation, and the first of two equally near entries, as published."""
    timesteps, sigmas = table(5.0)
    middle = float((timesteps[10].double() + timesteps[11].double()) / 2)
    assert nearest_sigma(float(timesteps[10]) + 1e-3, 5.0) == float(sigmas[10])
    assert nearest_sigma(middle, 5.0) in (float(sigmas[10]), float(sigmas[11]))
    assert nearest_sigma(0.0, 5.0) == float(sigmas[999])
    assert nearest_sigma(500.0, 1.0) == 0.5


def test_warp_of_zero_is_zero():
    assert warp_timestep(0, 5.0) == 0.0
    assert warp_timestep(1000, 5.0) == 1000.0


def test_clean_levels_add_no_noise():
    """A context timestep changes what the network is told, never the latents (sigma stays 0)."""
    assert clean(100) == Level(100.0, 0.0) and CLEAN == Level(0.0, 0.0)


def test_x0_is_computed_in_float64():
    """In float32 the product is rounded before the difference: with x = s*v + tiny the answer is lost."""
    sigma, velocity = 0.1, torch.full((1, 1, 2, 1, 1), 3.0)
    x = torch.tensor([sigma * 3.0, 1.0], dtype=torch.float32).view(1, 1, 2, 1, 1)
    ours = x0_from_velocity(x, velocity, [sigma, 0.5])
    exact = float(x[0, 0, 0, 0, 0].double()) - sigma * 3.0
    assert float(ours[0, 0, 0, 0, 0]) == pytest.approx(exact, rel=1e-6, abs=0)
    assert float(x[0, 0, 0, 0, 0] - torch.tensor(sigma) * 3.0) != pytest.approx(exact, rel=0.1, abs=0)
    assert float(ours[0, 0, 1, 0, 0]) == -0.5
    assert ours.dtype == torch.float32
    assert x0_from_velocity(x, velocity.bfloat16(), [sigma, 0.5]).dtype == torch.bfloat16


def test_renoise():
    x0, noise = torch.full((1, 1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1, 1), -1.0)
    assert float(renoise(x0, noise, 0.25)) == 0.75 * 2 - 0.25
    assert torch.equal(renoise(x0, noise, 0.0), x0) and torch.equal(renoise(x0, noise, 1.0), noise)
    assert renoise(x0, noise.half(), 0.25).dtype == torch.float16
