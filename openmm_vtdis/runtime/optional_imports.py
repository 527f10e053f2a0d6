"""Imports of other packages without their banners."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def quiet_pymbar() -> Iterator[Any]:
    """The pymbar module, without banner and warnings, and with numpy's settings as they were."""
    names = ("pymbar.mbar_solvers", "pymbar.timeseries")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pymbar
            import pymbar.timeseries

            yield pymbar
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
