"""What a training loop needs of a routed model."""

from moefx.training.aux_loss import aux_loss, routing_records
from moefx.training.health import Health, health
from moefx.training.prior import DiffusionPrior
from moefx.training.schedules import Scheduled, step_schedules, update_biases

__all__ = [
    "DiffusionPrior",
    "Health",
    "Scheduled",
    "aux_loss",
    "health",
    "routing_records",
    "step_schedules",
    "update_biases",
]
