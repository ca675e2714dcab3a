"""Files made for one download: in a folder of their own that nobody else can read, and gone soon.

They lie below Gradio's own folder, so that it serves them as they are and keeps no copy.
"""

import atexit
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

SECONDS = 120.0  # a download has begun by then, and goes on although the name is gone


class Downloads:
    """Makes the files.

    Args:
        root: where the app may serve from; made when it does not exist.
        seconds: that a file stays.
    """

    def __init__(self, root: Path, seconds: float = SECONDS) -> None:
        self._root = root
        self._seconds = seconds
        self._lock = threading.Lock()
        self._folders: dict[Path, threading.Timer] = {}
        atexit.register(self.close)

    def put(self, name: str, write: Callable[[Path], object]) -> Path:
        """A file that is removed by itself.

        Args:
            name: what the browser calls it.
            write: makes it, at the path it is given.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self._root, prefix="export-"))  # mode 0700
        timer = threading.Timer(self._seconds, self._remove, [folder])
        timer.daemon = True
        with self._lock:
            self._folders[folder] = timer
        try:
            write(folder / name)
            (folder / name).chmod(0o600)
        except BaseException:
            self._remove(folder)
            raise
        timer.start()
        return folder / name

    def _remove(self, folder: Path) -> None:
        with self._lock:
            self._folders.pop(folder, None)
        shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Remove all that is left."""
        with self._lock:
            left = dict(self._folders)
        for folder, timer in left.items():
            timer.cancel()
            self._remove(folder)
