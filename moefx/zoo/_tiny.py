"""Configs of the tiny denoisers: entries of each class's ``__init__`` that differ from its defaults.

Widths are chosen so that model width, FFN width, text width and token counts differ where the class allows.
"""

from __future__ import annotations

from typing import Any

from moefx.zoo._image import IMAGE
from moefx.zoo._other import OTHER
from moefx.zoo._video import VIDEO

TINY: dict[str, dict[str, Any]] = {**IMAGE, **VIDEO, **OTHER}
