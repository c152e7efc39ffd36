from __future__ import annotations

import numpy as np
import pytest

from sts_fast.forecast.length import LengthEffect, length_effect

RNG = np.random.default_rng(3)
LENGTHS = [RNG.integers(5, 20 + 30 * i, 12).astype(float) for i in range(6)]


def test_text_that_is_alike_in_every_prompt_is_found() -> None:
    sums = [7.0 + 0.1 * (1 + i) * lengths for i, lengths in enumerate(LENGTHS)]
    effect = length_effect(sums, LENGTHS)
    total = sum(of_domain.sum() for of_domain in sums)
    assert effect.constant_share == pytest.approx(7.0 * 6 * 12 / total)


def test_scores_of_the_content_alone_have_no_constant_share() -> None:
    sums = [(1.0 + i) * lengths for i, lengths in enumerate(LENGTHS)]
    assert length_effect(sums, LENGTHS).constant_share == pytest.approx(0, abs=1e-12)


def test_order_by_inverse_length() -> None:
    effect = length_effect([np.full(len(lengths), 7.0) for lengths in LENGTHS], LENGTHS)
    assert effect.constant_share == pytest.approx(1)
    assert effect.r_inverse_length == pytest.approx(1)
    slopes = [7.0 / lengths.mean() * (1 + 0.5 * (i % 2)) for i, lengths in enumerate(LENGTHS)]
    effect = length_effect([slope * lengths for slope, lengths in zip(slopes, LENGTHS, strict=True)], LENGTHS)
    expected = np.corrcoef(slopes, [1 / lengths.mean() for lengths in LENGTHS])[0, 1]
    assert effect.r_inverse_length == pytest.approx(expected)


def test_nothing_is_said_where_nothing_can_be() -> None:
    alike = [np.full(9, 5.0)] * 4
    assert length_effect(alike, alike) == LengthEffect(None, None)
    assert length_effect(LENGTHS[:2], LENGTHS[:2]).r_inverse_length is None
    silent = [np.zeros(9)] * 4
    assert length_effect(silent, [np.arange(1.0, 10.0)] * 4) == LengthEffect(None, None)


@pytest.mark.parametrize(
    ("effect", "n_domains", "warns"),
    [
        (LengthEffect(0.8, 0.99), 5, True),
        (LengthEffect(0.8, 0.99), 4, False),
        (LengthEffect(0.2, 0.99), 20, False),
        (LengthEffect(0.8, 0.5), 20, False),
        (LengthEffect(None, 0.99), 20, False),
        (LengthEffect(0.8, None), 20, False),
    ],
)
def test_warning(effect: LengthEffect, n_domains: int, warns: bool) -> None:
    warning = effect.warning("STS_icl", n_domains, "template")
    assert (warning is not None) == warns
    if warning:
        assert "STS_icl" in warning
        assert "r = 0.99" in warning
        assert "80%" in warning
        assert "--tokens query" in warning
        assert "--tokens query" not in (effect.warning("STS_icl", n_domains, "query") or "")
