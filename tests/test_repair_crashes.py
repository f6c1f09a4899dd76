"""A repair that dies anywhere loses nothing, and the next one ends where it would have ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from counting import append
from faults import Disk, Tree, not_waiting_for_the_disk, tree_of, write_tree

from trajkit import RunWriter, fit, open_run, repair, verify

N_EPOCHS = 5


def damage(path: Path) -> None:
    """A run with damage of every kind that a repair knows."""
    with RunWriter(path, fsync=False) as writer:
        for epoch in range(N_EPOCHS):
            append(writer, epoch)
    fit(path, modes=1, samples=10, name="broken", scheduler="synchronous", memory="1GiB")
    for key in ("weights/c/1/0", "epoch/commits/00000002.json", "zarr.json", "probe/c/3/0", "fits/broken/0/mode/c/0"):
        (path / key).write_bytes(b"damaged " + key.encode())
    shutil.copytree(path / "weights/c/0", path / f"weights/c/{N_EPOCHS}")
    (path / f"weights/c/{N_EPOCHS}/0").write_bytes(b"left over")


def contents(tree: Tree) -> set[bytes]:
    """What must never be gone: all but locks and files that are not whole yet."""
    return {
        data
        for key, data in tree.items()
        if data is not None and not key.startswith(("run/epoch/locks/", "run/epoch/tmp/"))
    }


def assert_repaired(path: Path) -> None:
    """Usable, with the two epochs marked that cannot be made again."""
    run = open_run(path)
    assert run.epochs.tolist() == list(range(N_EPOCHS))
    assert run.bad_epochs == (1, 2)
    np.testing.assert_array_equal(run.weights[[0, 3, 4]][:, 0], [0, 3, 4])
    assert run.fits == ()
    found = verify(path, "full")
    assert {item.row for item in found.damages} == {1, 2}
    assert found.leftovers == ()


def test_a_repair_that_dies_anywhere_can_be_done_again(fast_folder: Path) -> None:
    with not_waiting_for_the_disk():
        damage(fast_folder / "disk/run")
        before = contents(tree_of(fast_folder / "disk"))
        with Disk(fast_folder / "disk", power_cuts=True) as disk:
            repair(fast_folder / "disk/run")
        assert_repaired(fast_folder / "disk/run")
        points = 0
        seen: list[Tree] = []
        for moment in disk.moments:
            for number, tree in enumerate((moment.killed, *moment.power_cut)):
                missing = before - contents(tree)
                assert not missing, f"after {moment.after}, {missing} is gone"
                if number == 0 and tree not in seen[-1:]:
                    seen.append(tree)
        for number, tree in enumerate(seen):
            points += 1
            place = fast_folder / f"again{number}"
            write_tree(tree, place)
            repair(place / "run")
            assert before <= contents(tree_of(place))
            assert_repaired(place / "run")
            shutil.rmtree(place)
    assert points >= 40
