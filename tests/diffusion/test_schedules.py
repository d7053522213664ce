import numpy as np
import pytest
from conftest import golden
from hypothesis import given
from hypothesis import strategies as st

from diffusion import create_diffusion, space_timesteps


@pytest.fixture(scope="module")
def vectors():
    return golden("diffusion.pt")


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_schedules_match_the_published_implementation(vectors, name):
    diffusion = create_diffusion(noise_schedule=name)
    for array, expected in vectors[name].items():
        np.testing.assert_allclose(getattr(diffusion, array), expected.numpy(), rtol=1e-12, atol=1e-12, err_msg=array)


def test_spacing_matches_the_published_implementation(vectors):
    for spacing, expected in vectors["space"].items():
        assert create_diffusion(spacing).timestep_map == list(expected), spacing
    np.testing.assert_allclose(create_diffusion("50").betas, vectors["respaced_betas_50"].numpy(), rtol=1e-12)


@pytest.mark.parametrize("spacing", ["0", "1001", "ddim999", "ten", "600,600", "", "5,,5"])
def test_invalid_spacing(spacing):
    with pytest.raises(ValueError):
        space_timesteps(1000, spacing)


def test_respacing_keeps_the_marginals():
    original, respaced = create_diffusion(), create_diffusion("10,15,20")
    np.testing.assert_allclose(respaced.alphas_cumprod, original.alphas_cumprod[respaced.timestep_map], rtol=1e-12)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="unknown noise schedule"):
        create_diffusion(noise_schedule="cubic")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 2000))
def test_spaced_timesteps_are_ascending_and_as_many_as_requested(counts, steps):
    try:
        timesteps = space_timesteps(steps, counts)
    except ValueError:
        assert any(count > steps // len(counts) for count in counts)
    else:
        assert len(timesteps) == sum(counts)
        assert timesteps == sorted(set(timesteps))
        assert timesteps[0] >= 0
        assert timesteps[-1] < steps
