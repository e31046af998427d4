"""From a trained network to a bundle that can be served. Floor 3; it needs torch, serving does not."""

from .bundle import write_bundle
from .step_graph import ExportError, Parity, export_step_graph

__all__ = ["ExportError", "Parity", "export_step_graph", "write_bundle"]
