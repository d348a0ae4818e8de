"""Executes each launch on the CPU, as the IR that Triton compiles for sm_90, and prints what ran and what was found.

Memory that nobody wrote is NaN; accesses outside a tensor, races between programs and undefined results are faults.
"""

import ast
import inspect
import pkgutil
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from triton.runtime.jit import JITFunction

from fusionreid import kernels

# Buffers that programs hand to each other by a counter, `atomic_add` with release and acquire: that order is not
# modelled. What orders them in the compiled code is checked in test_triplet_counter.py.
GUARDED = {("triplet.forward_kernel", "state_ptr"), ("triplet.forward_kernel", "pairs_ptr")}
Launch = tuple[str, str, float]  # kernel, type of the case, seconds


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if "sanitize" in config.option.markexpr else True


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """A test of `triton_path` runs in a session of the sanitizer."""
    if "triton_path" not in pyfuncitem.fixturenames:
        return (yield)
    from ttsem import sanitize

    dtype = str(pyfuncitem.callspec.params["dtype"]).removeprefix("torch.")
    launches: list[Launch] = []
    with sanitize.session(cuda_is_cpu=False, races="record") as session, pytest.MonkeyPatch.context() as patch:
        run = JITFunction.run

        def timed(self: JITFunction, *args: Any, **options: Any) -> Any:
            start = perf_counter()
            try:
                return run(self, *args, **options)
            finally:
                launches.append((_name(self), dtype, perf_counter() - start))

        patch.setattr(JITFunction, "run", timed)
        try:
            result = yield
        except AssertionError as wrong:
            _show(session.races, launches, wrong)
            raise
        finally:
            pyfuncitem.user_properties.append(("launches", launches))
    _show(session.races, launches)
    assert session.races_unchecked == 0, "a launch has too many accesses to be checked for races: take a smaller case"
    return result


def _show(races: list[Any], launches: list[Launch], wrong: AssertionError | None = None) -> None:
    """Raise the first race that no counter orders, before wrong values, which may come of it."""
    from ttsem import sanitize

    for race in races:
        if (launches[race.launch][0], race.buffer) not in GUARDED:
            raise AssertionError(sanitize.message(race)) from wrong


def _name(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def launched_kernels() -> Iterator[str]:
    """Names of all kernels that the package launches, as `kernel[grid](...)`."""
    for info in pkgutil.iter_modules(kernels.__path__, "fusionreid.kernels."):
        module = import_module(info.name)
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernel = eval(ast.unparse(node.func.value), {"tl": None}, vars(module))
                if isinstance(kernel, JITFunction):
                    yield _name(kernel)


class Table:
    """Collects the launches of all tests, in whichever process they ran."""

    def __init__(self) -> None:
        self.cases: Counter[tuple[str, str]] = Counter()
        self.faults: Counter[tuple[str, str]] = Counter()
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        launches = dict(report.user_properties).get("launches", []) if report.when == "call" else []
        rows = {(kernel, dtype) for kernel, dtype, _ in launches}
        self.cases.update(rows)
        self.faults.update(rows if report.failed else ())
        for kernel, dtype, seconds in launches:
            self.seconds[kernel, dtype] += seconds

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.cases:
            return
        terminalreporter.section("kernels as compiled")
        lines = [("kernel", "type", "cases", "failed", "seconds")]
        lines += [(*row, n, self.faults[row], f"{self.seconds[row]:.1f}") for row, n in sorted(self.cases.items())]
        for kernel, dtype, *numbers in lines:
            terminalreporter.write_line(f"{kernel:36}{dtype:10}" + "".join(f"{number:>9}" for number in numbers))
        for kernel in self.missing():
            terminalreporter.write_line(f"{kernel:36}did not run")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.cases and self.missing() and not session.config.option.keyword and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def missing(self) -> list[str]:
        return sorted(set(launched_kernels()) - {kernel for kernel, _ in self.cases})


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(), "kernels as compiled")
