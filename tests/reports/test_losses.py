"""The heat maps of the experts' errors."""

import numpy as np
import pytest

from remix import RemixDiT_models
from reports import losses


def test_losses_are_relative_to_the_pretrained_model_and_to_the_best_expert(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(losses, "save_png", lambda figure, path: drawn.append(figure))
    errors = np.array([[-0.5, 0.2, 0.1], [0.0, -0.1, 0.1], [0.5, 0.3, 0.0]])
    model = RemixDiT_models["RemixDiT-T/4"](input_size=8, n_basis=2, n_experts=3)
    losses.draw_losses(tmp_path / "a.png", np.ones(3), errors, model, "name")
    left, right = (axis.images[0].get_array() for axis in drawn[0].axes[:2])
    np.testing.assert_allclose(left, 100 * errors)
    assert right.diagonal().tolist() == [0, 0, 0]
    assert right[2].tolist() == pytest.approx([200, 100 * (1.3 / 0.9 - 1), 0])
