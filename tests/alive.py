"""How much is held at once: tensors that a function returned, while they live."""

import weakref
from typing import Any

import pytest


class Alive:
    """How many of the tensors that a function returned are alive at once, at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def watch(self, owner: Any, name: str, patch: pytest.MonkeyPatch) -> "Alive":
        original = getattr(owner, name)

        def watched(*args: Any) -> Any:
            found = original(*args)
            self.now += 1
            self.most = max(self.most, self.now)
            weakref.finalize(found, self._gone)
            return found

        patch.setattr(owner, name, watched)
        return self

    def _gone(self) -> None:
        self.now -= 1
