"""Replay: a model's runs recorded, verified and repeated.

A program is a guess until its result has equalled the model's own, bit for bit, on a real batch:
:func:`verify`. :class:`Replay` records, verifies and replays in the place of a model.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Any

from torch import nn

from rimet._graph.inputs import ForwardFn, forward
from rimet._graph.live import MeasuredTensors, bytes_of
from rimet._graph.program import (
    Program,
    Reason,
    ReplayError,
    bits_equal,
    own_run,
    signature_of,
)
from rimet._graph.program_recorder import record_program
from rimet._graph.structure import flatten

logger = logging.getLogger(__name__)

__all__ = ["Replay", "verify"]


def verify(program: Program, model: nn.Module, batch: Any, forward_fn: ForwardFn = forward) -> None:
    """Runs a batch both ways, and trusts the program from then on if the results are the same bits.

    Best done with another batch than the recorded one.

    Raises:
        ReplayError: they are not, or a guard does not hold.
    """
    _, error = _compare(program, model, batch, forward_fn)
    if error is not None:
        raise error


def _compare(
    program: Program, model: nn.Module, batch: Any, forward_fn: ForwardFn
) -> tuple[Any, ReplayError | None]:
    """The model's own result on a batch, and what speaks against the replay's."""
    copied = batch
    if program.written_inputs:  # both runs need inputs that the other has not written to
        tensors, structure = flatten(batch)
        copied = structure.build([tensor.clone() for tensor in tensors])
    with own_run(model):
        own = forward_fn(model, batch)
    written = program.written_state
    if written:
        return own, ReplayError(Reason.WRITTEN, ", ".join(written))
    values = MeasuredTensors(program.outside)
    try:
        with own_run(model):
            replayed = program.run(model, copied, values)
    except ReplayError as error:
        return own, error
    tensors, structure = flatten(own)
    program.working_set = max(program.working_set, values.peak + bytes_of(tensors))
    others, other_structure = flatten(replayed)
    if not structure.matches(other_structure):
        return own, ReplayError(Reason.OUTPUT, "other containers or values")
    for position, (tensor, other) in enumerate(zip(tensors, others, strict=True)):
        if not bits_equal(tensor, other):
            return own, ReplayError(Reason.OUTPUT, f"output {position}")
    program.trusted = True
    return own, None


class Replay:
    """Runs a model by its records where that is proven to be the same, and itself elsewhere.

    The first batch of a signature is recorded, the second verifies the record, later ones are
    replayed. Where the model cannot be replayed it runs itself, the log says why, and
    :attr:`reasons` keeps it.

    Args:
        model: run in evaluation mode and without gradients.
        forward_fn: runs the model on a batch.

    Attributes:
        programs: by signature.
        reasons: by signature, why there is no use in replaying.
        replayed: how many batches were replayed.
    """

    def __init__(self, model: nn.Module, forward_fn: ForwardFn = forward) -> None:
        self.model = model
        self.forward_fn = forward_fn
        self.programs: dict[Hashable, Program] = {}
        self.reasons: dict[Hashable, ReplayError] = {}
        self.replayed = 0

    def __call__(self, batch: Any) -> Any:
        """``forward_fn(model, batch)``."""
        try:
            signature = signature_of(batch)
        except ReplayError as error:
            signature = None
            self._give_up(signature, error)
        if signature not in self.reasons:
            return self._by_record(signature, batch)
        with own_run(self.model):
            return self.forward_fn(self.model, batch)

    def _by_record(self, signature: Hashable, batch: Any) -> Any:
        program = self.programs.get(signature)
        try:
            if program is None:
                recorded = record_program(self.model, batch, self.forward_fn)
                self.programs[signature], result = recorded
                return result
            if program.trusted:
                with own_run(self.model):
                    result = program.run(self.model, batch)
                self.replayed += 1
                return result
        except ReplayError as error:
            self._give_up(signature, error)
            with own_run(self.model):
                return self.forward_fn(self.model, batch)
        result, obstacle = _compare(program, self.model, batch, self.forward_fn)
        if obstacle is not None:
            self._give_up(signature, obstacle)
        return result

    def _give_up(self, signature: Hashable, error: ReplayError) -> None:
        logger.warning("%s runs itself: %s", type(self.model).__name__, error)
        self.reasons[signature] = error
