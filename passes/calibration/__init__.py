"""Calibration: what the feed-forward networks of a model do on data, by layer, noise level and guidance branch.

``collect`` runs a model and fills a `Calibration`; ``layer`` holds the statistics of one network, ``moments`` the
arithmetic that makes them mergeable, ``file`` reads and writes them.
"""

from moefx.passes.calibration.calibration import Calibration
from moefx.passes.calibration.collect import calibrate
from moefx.passes.calibration.layer import LayerStatistics

__all__ = ["Calibration", "LayerStatistics", "calibrate"]
