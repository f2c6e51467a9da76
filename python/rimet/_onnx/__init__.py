"""From a simulated model to ONNX.

``trace`` exports the model through ``torch.onnx`` with one node ``rimet::QuantizeDequantize`` for each
use of a quantizer; ``marked`` is that graph and what is rewritten in it; ``qdq`` turns the nodes into
``QuantizeLinear`` and ``DequantizeLinear``, ``encodings`` takes them out and writes an encodings file
beside the floating-point graph.

Everything here needs the packages of the extra ``rimet[onnx]``; :mod:`rimet.onnx` and
:mod:`rimet.onnx_utils` are the interface.
"""
