"""Style sheets and scripts of the app, sent inline: nothing is fetched from anywhere."""

from functools import cache
from pathlib import Path


@cache
def text_of(name: str) -> str:
    """The text of a file in this folder."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
