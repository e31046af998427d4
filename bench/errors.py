"""What ends a benchmark before it measured anything."""


class BenchError(ValueError):
    """One line: the option or the target, what is wrong, what would be right."""
