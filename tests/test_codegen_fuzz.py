"""300 random epilogue graphs, forward and gradient, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_codegen_kernels import interpret, why_no_interpreter


@pytest.mark.skipif(why_no_interpreter() is not None, reason=str(why_no_interpreter()))
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_epilogues_in_the_interpreter(tmp_path: Path) -> None:
    interpret("interpreted_fuzz.py", tmp_path)
