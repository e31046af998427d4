"""fewstep: an inference serving runtime for fast students."""

__version__ = "0.1.0"
