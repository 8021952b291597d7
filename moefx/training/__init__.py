"""What a training loop needs of a routed model."""

from moefx.training.aux_loss import aux_loss, routing_records
from moefx.training.health import Health, health

__all__ = ["Health", "aux_loss", "health", "routing_records"]
