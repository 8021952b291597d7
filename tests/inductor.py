"""Where torch's own C++ back end can link: it splits its command line at spaces, also inside torch's install path."""

import pytest
import torch

linkable = pytest.mark.skipif(
    any(c.isspace() for c in str(torch.__file__)), reason="inductor cannot link against a torch whose path has a space"
)
