"""Doors that other libraries open: moefx's operators behind their interfaces."""

from __future__ import annotations

from moefx.integrations.transformers import register_experts

__all__ = ["register_experts"]
