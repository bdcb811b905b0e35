"""Machinery that nobody needs to open in order to run or change an experiment."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
