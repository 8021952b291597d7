"""Makers for audio and one-dimensional denoisers."""
