"""A disk that dies or is full at a chosen step, to try every one of them."""

from __future__ import annotations

import io
import os

from itda import disk


class Killed(BaseException):
    """The process ends here: nothing that it would do afterwards happens."""


class Machine:
    """Counts the steps that change a disk, and at step `fails_at` dies, or finds the disk full (`error`)."""

    def __init__(self, monkeypatch, fails_at: int, error: BaseException | None = None):
        self.left, self.error, self.failed = fails_at, error, False
        calls = ("mkdir",) if error else ("mkdir", "replace", "rename", "unlink", "rmdir", "fsync")
        for name in calls:
            monkeypatch.setattr(os, name, self.watched(getattr(os, name)))
        monkeypatch.setattr(disk, "open", self.open, raising=False)

    def step(self):
        self.left -= 1
        if self.failed and not self.error:  # the dead stay dead, a disk may have room for something smaller
            raise Killed
        if self.left < 0 and not self.failed:
            self.failed = True
            raise self.error or Killed

    def watched(self, function):
        def watched(*args, **kwargs):
            self.step()
            return function(*args, **kwargs)

        return watched

    def open(self, path, mode="r"):
        if mode == "rb":
            return open(path, mode)
        self.step()
        machine = self

        class File(io.FileIO):
            def write(self, data):
                try:
                    machine.step()
                except BaseException:
                    super().write(memoryview(data)[: memoryview(data).nbytes // 2])
                    raise
                return super().write(data)

        return File(path, mode)
