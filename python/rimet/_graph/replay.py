"""Replay: a model's runs recorded, verified and repeated.

A program is a guess until its result has equalled the model's own, bit for bit, on a real batch:
:func:`verify`. :class:`Replay` records, verifies and replays in the place of a model.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from rimet._graph.inputs import ForwardFn, forward
from rimet._graph.live import MeasuredTensors, bytes_of
from rimet._graph.program import (
    Program,
    Reason,
    ReplayError,
    bits_equal,
    geometry_of,
    own_run,
    signature_of,
)
from rimet._graph.program_recorder import record_program
from rimet._graph.structure import Structure, flatten

logger = logging.getLogger(__name__)

__all__ = ["Replay", "verify"]

_COSTLY = (nn.Linear, nn.modules.conv._ConvNd)


def verify(
    program: Program,
    model: nn.Module,
    batch: Any,
    forward_fn: ForwardFn = forward,
    keep_bytes: int = 0,
) -> None:
    """Runs a batch both ways, and trusts the program from then on if the results are the same bits.

    Best done with another batch than the recorded one.

    Args:
        program: not trusted yet.
        model: that it is a record of.
        batch: of its signature.
        forward_fn: runs the model on the batch.
        keep_bytes: memory for keeping what linear layers and convolutions are given and give in the
            model's own run. Where the replay gives one of them the same bits, it need not run again.

    Raises:
        ReplayError: they are not, or a guard does not hold.
    """
    _, error = _compare(program, model, batch, forward_fn, keep_bytes)
    if error is not None:
        raise error


@dataclass
class _Call:
    """A module's call: what went in and came out, and how often either had been written to."""

    inputs: list[torch.Tensor]
    structure: Structure
    output: torch.Tensor
    versions: list[int]

    def is_as_it_was(self) -> bool:
        tensors = (*self.inputs, self.output)
        return all(
            not tensor.is_inference() and tensor._version == version
            for tensor, version in zip(tensors, self.versions, strict=True)
        )

    def has(self, tensors: list[torch.Tensor], structure: Structure) -> bool:
        """Whether it was made with these arguments, to the last bit."""
        return structure.matches(self.structure) and all(
            geometry_of(own) == geometry_of(other) and bits_equal(own, other)
            for own, other in zip(self.inputs, tensors, strict=True)
        )


class _KeptCalls:
    """Calls of the costly modules of a program, in a run of the model."""

    def __init__(self, program: Program, model: nn.Module, keep_bytes: int) -> None:
        names = {step.name for step in program.steps if step.kind == "module"}
        modules = {name: model.get_submodule(name) for name in names}
        self._modules = {n: m for n, m in modules.items() if isinstance(m, _COSTLY)}
        # Of what is written to afterwards, as by an activation in place, a copy is kept.
        self._copied = {
            step.name
            for step in program.steps
            if step.kind == "module" and not program.mutable.isdisjoint(step.outputs)
        }
        self._left = keep_bytes
        self._calls: dict[str, deque[_Call | None]] = {name: deque() for name in self._modules}

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Within this context, calls are kept."""

        versions: list[int] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = flatten((args, kwargs))[0]
            # Inference tensors do not tell whether they were written to.
            versions[:] = [-1 if x.is_inference() else x._version for x in inputs]

        def after(
            name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            inputs, structure = flatten((args, kwargs))
            call = None
            if isinstance(output, torch.Tensor) and not output.is_inference():
                self._left -= bytes_of([*inputs, output])
                if self._left >= 0 and name in self._copied:
                    output = _copy(output)
                if self._left >= 0:
                    call = _Call(inputs, structure, output, [*versions, output._version])
            self._calls[name].append(call)

        with contextlib.ExitStack() as stack:
            for name, module in self._modules.items():
                hooks = (
                    module.register_forward_pre_hook(before, with_kwargs=True),
                    module.register_forward_hook(partial(after, name), with_kwargs=True),
                )
                for hook in hooks:
                    stack.callback(hook.remove)
            yield

    def outcome(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module's next call gave, if it was made with the same bits; None: not known."""
        calls = self._calls.get(name)
        call = calls.popleft() if calls else None
        known = call is not None and call.is_as_it_was() and call.has(*flatten((args, kwargs)))
        return call.output if call is not None and known else None


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    # Not seen by the modes of a simulation, which watch the functions that the model calls.
    with torch._C.DisableTorchFunction():
        return tensor.clone()


def _compare(
    program: Program, model: nn.Module, batch: Any, forward_fn: ForwardFn, keep_bytes: int = 0
) -> tuple[Any, ReplayError | None]:
    """The model's own result on a batch, and what speaks against the replay's."""
    calls = _KeptCalls(program, model, keep_bytes)
    copied = batch
    if program.written_inputs:  # both runs need inputs that the other has not written to
        tensors, structure = flatten(batch)
        copied = structure.build([tensor.clone() for tensor in tensors])
    with own_run(model), calls.keeping():
        own = forward_fn(model, batch)
    written = program.written_state
    if written:
        return own, ReplayError(Reason.WRITTEN, ", ".join(written))
    values = MeasuredTensors(program.outside)
    try:
        with own_run(model):
            replayed = program.run(model, copied, values, calls.outcome)
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
