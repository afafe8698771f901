"""The library against the reference of the fuzzer, on random models.

``python -m pytest tests/fuzz/test_fuzz.py -s --fuzz-models 10000 --fuzz-seed 200`` goes on from
where the default run ends; a failure prints the seed that brings it back.
"""

import pytest

from tests.fuzz.cases import Case
from tests.fuzz.compare import Report
from tests.fuzz.draw import draw_case
from tests.fuzz.driver import run

SHOWN = 5


def test_library_gives_what_the_reference_gives(pytestconfig: pytest.Config) -> None:
    first, count = pytestconfig.getoption("fuzz_seed"), pytestconfig.getoption("fuzz_models")
    report, failures = Report(), dict[int, str]()
    for seed in range(first, first + count):
        case = draw_case(seed)
        try:
            report.add(run(case))
        except Exception as error:  # Whatever a case raises is a finding.
            failures[seed] = _told(case, error)
    print(f"\nfuzzer: {count} models, {report}")
    assert not failures, _summary(failures, count)
    assert report.compared > report.skipped.total()


def _told(case: Case, error: Exception) -> str:
    return f"{type(error).__name__}: {error}\n    {case}"


def _summary(failures: dict[int, str], count: int) -> str:
    shown = "\n\n".join(
        f"python -m pytest tests/fuzz/test_fuzz.py --fuzz-models 1 --fuzz-seed {seed}\n{told}"
        for seed, told in list(failures.items())[:SHOWN]
    )
    return f"{len(failures)} of {count} models differ, seeds {[*failures]}\n\n{shown}"
