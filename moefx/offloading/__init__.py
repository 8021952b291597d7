"""Experts of which only some are on the device: the others lie in host memory or in files and stream through.

``offload`` the entry and its undo, ``pins`` which experts stay, ``layout`` one expert as bytes, ``store`` where the
others lie, ``stream`` what is loaded when, ``experts`` what stands in place of the experts of a layer.
"""

from moefx.offloading.experts import OffloadedExperts
from moefx.offloading.offload import offload, offload_stats, onload
from moefx.offloading.stream import OffloadStats

__all__ = ["OffloadStats", "OffloadedExperts", "offload", "offload_stats", "onload"]
