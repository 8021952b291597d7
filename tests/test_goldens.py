"""The golden fixture itself: compares, explains, writes on request only, and never in CI."""

import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Set up a folder with this suite's golden fixture and one test that owns one golden file."""
    monkeypatch.delenv("CI", raising=False)
    shutil.copy(HERE / "golden_files.py", pytester.path / "conftest.py")
    pytester.makepyfile(
        test_dump="""
        def test_dump(golden):
            golden("dump.txt", "block 0\\nblock 1")

        def test_other():
            raise AssertionError("not a golden test")
        """
    )
    return pytester


def run(suite: pytest.Pytester, *args: str) -> pytest.RunResult:
    return suite.runpytest_subprocess("-q", "-p", "no:xdist", "-p", "no:cov", *args)


def write(suite: pytest.Pytester, text: str) -> None:
    (suite.path / "goldens").mkdir(exist_ok=True)
    (suite.path / "goldens" / "dump.txt").write_text(text)


def test_a_missing_file_fails_and_names_the_command(suite: pytest.Pytester) -> None:
    result = run(suite, "-k", "dump and not other")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*no golden file dump.txt*make goldens*"])
    assert not (suite.path / "goldens").exists()


def test_update_writes_the_file_and_runs_no_other_test(suite: pytest.Pytester) -> None:
    run(suite, "--update-goldens").assert_outcomes(passed=1, deselected=1)
    assert (suite.path / "goldens" / "dump.txt").read_bytes() == b"block 0\nblock 1\n"
    run(suite, "-k", "dump and not other").assert_outcomes(passed=1, deselected=1)


def test_a_difference_is_shown_and_the_file_kept(suite: pytest.Pytester) -> None:
    write(suite, "block 0\nblock 2\n")
    result = run(suite, "-k", "dump and not other")
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines(["-block 2", "+block 1"])
    assert (suite.path / "goldens" / "dump.txt").read_text() == "block 0\nblock 2\n"


def test_ci_refuses_to_update(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    write(suite, "block 9\n")
    monkeypatch.setenv("CI", "1")
    result = run(suite, "--update-goldens")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert (suite.path / "goldens" / "dump.txt").read_text() == "block 9\n"


def test_a_name_outside_the_folder_is_refused(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_dump="def test_dump(golden):\n    golden('../out.txt', 'x')\n")
    run(suite, "--update-goldens").assert_outcomes(failed=1)
    assert not (suite.path / "out.txt").exists()
