"""Bars that are shown, and those that are not."""

from __future__ import annotations

import threading

import pytest
from tqdm import tqdm

from openmm_vtdis.runtime.progress import progress_bar


def work(show: bool) -> None:
    with progress_bar(3, "work", show) as bar:
        for k in range(3):
            bar.update()
            bar.set_postfix(loss=f"{k}")
    bar.close()


@pytest.mark.parametrize("show", [True, False])
def test_what_is_shown(show: bool, capsys: pytest.CaptureFixture[str]) -> None:
    work(show)
    text = capsys.readouterr().err
    assert ("work: 100%" in text and "3/3" in text and "loss=2" in text) if show else not text


@pytest.mark.parametrize("show", [True, False])
def test_only_a_bar_that_is_shown_waits_for_the_lock_that_processes_share(show: bool) -> None:
    """Held by another, as by one that was killed with it."""
    thread = threading.Thread(target=work, args=(show,), daemon=True)
    with tqdm.get_lock():
        thread.start()
        thread.join(1.0 if show else 20.0)
        assert thread.is_alive() == show
    thread.join(20.0)
    assert not thread.is_alive()
