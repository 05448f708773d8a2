"""Dev measurements: when they are due, and when they end training."""

from __future__ import annotations

from raytower.training.config import DevConfig


def due(num_steps: int, rows_per_step: int, num_rows: int, **settings: float | None) -> list[int]:
    dev = DevConfig.model_validate({"path": "x", "metric": "auc", **settings})
    return [step for step in range(1, num_steps + 1) if dev.is_due(step, rows_per_step, num_rows)]


def test_measurements_are_due_by_steps_or_by_epochs() -> None:
    assert due(450, 8, 1000) == [200, 400]
    assert due(30, 8, 1000, every_steps=12) == [12, 24]
    # 6.25 steps an epoch: the steps that bring the rows seen to 100, 200, 300 and 400.
    assert due(30, 16, 100, every_epochs=1) == [7, 13, 19, 25]
    # 3 of 10 steps; 0.3 × 100 in floating point is not 30.
    assert due(13, 10, 100, every_epochs=0.3) == [3, 6, 9, 12]
    # Oftener than every step is every step.
    assert due(4, 10, 100, every_epochs=0.01) == [1, 2, 3, 4]


def test_without_patience_nothing_stops_training() -> None:
    patient = DevConfig(path="x", metric="auc", patience=None)
    assert not patient.is_over(10_000)
    assert [DevConfig(path="x", metric="auc", patience=2).is_over(stale) for stale in (1, 2)] == [False, True]
