"""`gpulab reap`: tears down what runs left behind whose session is dead."""

from __future__ import annotations

from pytest_gpulab.kube.ledger import Ledger, ledgers
from pytest_gpulab.kube.state import state_folder
from pytest_gpulab.kube.teardown import tear_down


def reap_runs(run: str | None = None, *, dead: bool = False) -> int:
    """Tear down every dead run, or the one that is named. 0: nothing is left; 1: the list says what is.

    `dead`: sessions that cannot be seen from here are.
    """
    found = [ledger for ledger in ledgers(state_folder()) if run in (None, ledger.run)]
    if run is not None and not found:
        print(f"run {run} has left nothing")
    left = [ledger.run for ledger in found if not _reap(ledger, dead)]
    if not found and run is None:
        print("no run has left anything")
    return 1 if left else 0


def _reap(ledger: Ledger, dead: bool) -> bool:
    """Whether nothing is left of the run that should not be."""
    unseen = ledger.out_of_sight()
    if unseen and not dead:
        print(
            f"run {ledger.run}: {unseen}; left alone. `gpulab reap --run {ledger.run} --dead` if its session is dead"
        )
        return False
    if not unseen and ledger.owner_lives():
        print(f"run {ledger.run}: its session is alive; left alone")
        return True
    ended = tear_down(ledger)
    print(f"run {ledger.run}: {', '.join(ended.removed) or 'had nothing'}; removed")
    for problem in ended.problems:
        print(f"  {problem}")
    return not ledger.path.exists()
