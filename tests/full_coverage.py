"""After the tests: is each module of the ground, and the ledger, covered to the last branch by its own test file?

By its own, since a line that only a journey passes is run but not tested. Coverage keeps for each line which test ran
it (`--cov-context=test`); lines run while importing have the empty context.
"""

import io
import sys

from coverage import Coverage
from coverage.exceptions import NoDataError

from tests.test_house import FULLY_COVERED


def shortfall(coverage: Coverage, module: str) -> str | None:
    """What coverage says of a module that its own tests don't cover; of one that they do, nothing."""
    said = io.StringIO()
    contexts = ["^$", rf"^tests/test_{module}\.py::"]
    try:
        percent = coverage.report(include=[f"proxy/{module}.py"], contexts=contexts, file=said, skip_covered=False)
    except NoDataError:
        return "There is no such file, or the tests ran without --cov.\n"
    return None if percent == 100 else said.getvalue()


def main() -> int:
    """0 when all are; else what is missing is printed."""
    coverage = Coverage()
    coverage.load()
    short = {module: said for module in FULLY_COVERED if (said := shortfall(coverage, module))}
    for module, said in short.items():
        print(f"proxy/{module}.py by tests/test_{module}.py alone:\n{said}")
    covered = f"{len(FULLY_COVERED) - len(short)} of {len(FULLY_COVERED)}"
    print(f"Of the modules that their own tests must cover to the last branch, {covered} are.")
    if short:
        print("Add tests of what is missing to the module's own file, or take out what nothing needs.")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
