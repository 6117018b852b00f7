"""Settings for every test: flax in tree mode, so that a graph-only feature fails at once; quick compilation."""

import gc
import importlib.metadata
import os
import tempfile

os.environ.setdefault("NNX_GRAPH_MODE", "false")
os.environ.setdefault("NNX_GRAPH_UPDATES", "false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny models compile for much longer than they run. Compiled whole and not in 32 parts, a program takes a quarter less
# work where every core has a test of its own; what stands below makes it four times as quick again.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jax").startswith("0.10."):  # later versions have no such flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Compiled programs go to a folder of this run of tests: its workers and the commands that it starts compile each once.
# It starts empty and is removed, and the user's cache folder is neither read nor written.
if "JAX_CCM_TEST_PROGRAMS" not in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory(prefix="jax_ccm_tests_", ignore_cleanup_errors=True)
    os.environ["JAX_CCM_TEST_PROGRAMS"] = PROGRAMS.name
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["JAX_CCM_TEST_PROGRAMS"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

from jax_ccm.config import cli  # noqa: F401  it names its folder by what the processor can do
from jax_ccm.numerics import precision
from tests import selection

# A plugin may have imported JAX before.
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_disable_most_optimizations", True)


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, help="of each parametrised test run so many cases at most, spread over all")


@pytest.hookimpl(trylast=True)  # of those that are marked to run
def pytest_collection_modifyitems(config, items):
    """Leaves so many cases of each parametrised test, the same in each run, and others of each test."""
    most = config.getoption("--cases")
    if most is None:
        return
    kept = set(selection.spread([item.nodeid for item in items], most))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


def pytest_collection_finish():
    """What is imported by now stays: the collector, which tracing calls all the time, need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


# A few thousand compiled programs take gigabytes, and as many memory maps as Linux gives a process (65,530); beyond
# that the compiler crashes. They are dropped in time.
MOST_BYTES, MOST_MAPS = 3 * 2**30, 20_000


@pytest.fixture(scope="session", autouse=True)
def _float32():
    """`auto` is float32 whatever processor tests run on; those of another precision ask for it by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "processor_flags", lambda: frozenset())
        yield


# After each test: the common tests of all methods alone would go beyond.
@pytest.fixture(autouse=True)
def _drop_programs():
    yield
    try:
        with open("/proc/self/statm") as statm, open("/proc/self/maps") as maps:
            used, mapped = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), sum(1 for _ in maps)
    except OSError:  # no such files but on Linux
        return
    if used > MOST_BYTES or mapped > MOST_MAPS:
        jax.clear_caches()
