"""Recording what a model does when it runs once; the record itself lives in the engine."""

from rimet._graph.inputs import bind_inputs, example_inputs, move_to, tensors_in, without_labels
from rimet._graph.recorder import Recording, Twin, class_key, record

__all__ = [
    "Recording",
    "Twin",
    "bind_inputs",
    "class_key",
    "example_inputs",
    "move_to",
    "record",
    "tensors_in",
    "without_labels",
]
