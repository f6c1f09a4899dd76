"""What is planned for a memory budget, and what a fit then really needs."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeRun, correlated
from hypothesis import given
from hypothesis import strategies as st
from test_fit import assert_same

from trajkit import Run, fit
from trajkit.blocks import BlockWork, plan_blocks
from trajkit.errors import InputError, MemoryBudgetError, TrajkitError


def work(**changes: Any) -> BlockWork:
    plain = {"n_epochs": 40, "n_modes": 10, "n_weights": 10_000_000, "block": 131_072}
    return BlockWork(**plain | {"whole_blocks": False, "every": False, "step1_bytes": 16_000_000} | changes)


@given(
    n_epochs=st.integers(2, 20_000),
    n_weights=st.integers(1, 10**10),
    workers=st.integers(1, 128),
    budget=st.integers(10**6, 10**11),
    every=st.booleans(),
    whole_blocks=st.booleans(),
)
def test_a_plan_stays_in_its_budget_and_covers_the_block(
    n_epochs: int, n_weights: int, workers: int, budget: int, every: bool, whole_blocks: bool
) -> None:
    job = work(
        n_epochs=n_epochs, n_weights=n_weights, every=every, whole_blocks=whole_blocks, block=min(n_weights, 131_072)
    )
    try:
        plan = plan_blocks(job, workers, budget)
    except MemoryBudgetError:
        with pytest.raises(MemoryBudgetError):
            plan_blocks(job, 1, budget)
        return
    assert plan.planned_bytes <= budget
    assert 1 <= plan.workers <= workers
    block = slice(7 * job.block, 8 * job.block)
    pieces = plan.pieces(block)
    assert (pieces[0].start, pieces[-1].stop) == (block.start, block.stop)
    assert all(one.stop == later.start for one, later in itertools.pairwise(pieces))


def test_a_plan_does_not_depend_on_the_number_of_weights() -> None:
    plans = {plan_blocks(work(n_weights=n), 4, 2 << 30) for n in (10**6, 10**9, 10**12)}
    assert len(plans) == 1


def test_less_memory_first_reads_less_at_a_time_then_works_less_at_a_time() -> None:
    plans = [plan_blocks(work(n_epochs=200), 8, budget << 20) for budget in (2000, 200, 100, 50, 20)]
    assert [plan.width for plan in plans] == sorted((plan.width for plan in plans), reverse=True)
    assert [plan.workers for plan in plans] == sorted((plan.workers for plan in plans), reverse=True)
    assert plans[0].workers == 8
    assert plans[-1].workers == 1


def test_workers_of_a_cluster_read_less_at_a_time_all_of_them() -> None:
    budget = 40 << 20
    assert plan_blocks(work(n_epochs=200), 4, budget).workers == 2
    plan = plan_blocks(work(n_epochs=200), 4, budget, at_least_workers=4)
    assert (plan.workers, plan.planned_bytes <= budget) == (4, True)


def test_coded_chunks_are_read_whole_where_that_fits() -> None:
    assert plan_blocks(work(whole_blocks=True), 2, 1 << 30).width == 131_072
    assert plan_blocks(work(whole_blocks=True), 2, 30 << 20).width < 131_072


@pytest.mark.parametrize(
    ("changes", "budget", "message"),
    [
        ({}, 1 << 20, r"to cluster the samples takes 15 MiB, the budget is 1 MiB; .*\(--memory\) or ask for fewer"),
        ({"step1_bytes": 0}, 1 << 20, r"to fit blocks of weights takes 8 MiB, the budget is 1 MiB; .* or fit fewer"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(changes: dict[str, Any], budget: int, message: str) -> None:
    with pytest.raises(MemoryBudgetError, match=message) as refused:
        plan_blocks(work(**changes), 8, budget)
    assert isinstance(refused.value, MemoryError)
    assert isinstance(refused.value, TrajkitError)


def test_a_fit_is_refused_before_any_work(digits_run: Run) -> None:
    before = sorted(digits_run.path.rglob("*"))
    with pytest.raises(MemoryBudgetError, match="the budget is 1 MiB"):
        fit(digits_run, memory="1MiB")
    assert sorted(digits_run.path.rglob("*")) == before


@pytest.mark.parametrize("memory", ["lots", "", 0, -5, "-2GiB", True, [1], float("inf"), "1e400"])
def test_what_is_no_budget_is_refused(memory: Any, digits_run: Run) -> None:
    with pytest.raises(InputError, match=r"memory is .*, expected bytes or a text such as '2GiB'; correct it"):
        fit(digits_run, memory=memory)


@pytest.mark.parametrize("updatable", [False, True])
def test_the_budget_does_not_change_a_bit(updatable: bool, make_run: MakeRun) -> None:
    run = make_run(correlated(40, 140_000), sizes=(70_001, 69_999))
    ample, tight = (fit(run, modes=6, samples=200, memory=memory, updatable=updatable) for memory in ("2GiB", "21MiB"))
    assert_same(ample, tight)
    assert ample.quality_by_tensor == tight.quality_by_tensor


PEAK = """
import sys
import numpy as np
import trajkit
from trajkit.pipeline import fit
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
run = trajkit.open_run(sys.argv[1])
before = peak()
fit(run, modes=4, samples=400, name="peak", memory=sys.argv[2], updatable=True)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_the_peak_of_a_fit_stays_in_its_budget(tmp_path: Path) -> None:
    from conftest import vector_layout

    from trajkit import RunWriter

    rng = np.random.default_rng(0)
    with RunWriter(tmp_path / "run", fsync=False) as writer:
        for epoch in range(150):  # 300 MB of weights
            writer.append(vector_layout(500_000), epoch, rng.normal(size=500_000).astype(np.float32), {})
    budget = 48 << 20
    output = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "run"), str(budget)], check=True, capture_output=True, text=True
    )
    assert int(output.stdout) < budget + (100 << 20)  # compiled code and the libraries that a fit imports
