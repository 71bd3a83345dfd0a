"""What ranks tell each other out of turn: notices that any thread may post and read at any time.

Collectives want all ranks at one place. Where that cannot be, as while a checkpoint is written behind the steps, or
when a rank has come to its end, ranks speak through the store by which torch.distributed has brought them together.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

SECONDS = 20  # that the store's machine may take to answer


class BoardGone(RuntimeError):
    """Say that the store cannot be reached any more: the process that keeps it has ended."""


class Board:
    """Hold notices by name; a value is what JSON can say, and not None."""

    def __init__(self) -> None:
        """Reach the store that torchrun, or rank 0, keeps; `torch.distributed` has been initialized.

        Raises:
            BoardGone: It cannot be reached.
        """
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            # A connection of its own: the one of torch.distributed may wait for something else.
            store = dist.TCPStore(
                host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SECONDS)
            )
        except RuntimeError as error:
            raise BoardGone(str(error)) from error
        # A torchrun that starts its processes again keeps the store.
        self._store = dist.PrefixStore(f"notices {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def post(self, name: str, value: Any) -> None:
        """Put up a notice, in place of one of this name.

        Raises:
            BoardGone: The store cannot be reached.
        """
        try:
            self._store.set(name, json.dumps(value))
        except RuntimeError as error:
            raise BoardGone(str(error)) from error

    def read(self, name: str) -> Any:
        """Return a notice; None where there is none.

        Raises:
            BoardGone: The store cannot be reached.
        """
        try:
            return json.loads(self._store.get(name)) if self._store.check([name]) else None
        except RuntimeError as error:
            raise BoardGone(str(error)) from error

    def post_first(self, name: str, value: Any) -> Any:
        """Put up a notice where there is none of this name; returns the one that is there then.

        Raises:
            BoardGone: The store cannot be reached.
        """
        try:
            return json.loads(self._store.compare_set(name, "", json.dumps(value)))
        except RuntimeError as error:
            raise BoardGone(str(error)) from error
