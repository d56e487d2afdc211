"""What shows, predicts and records a run: nothing that samples imports it, so that it takes no sampler down.

plan foresees a run from a workflow, runs keeps what the last ones did, panel says both, web serves it to the
interface, and metadata notes in the image which calibration made it. A run tells events.listeners.
"""
from ...hosting import events
from . import metadata, runs, web


def register() -> None:
    """Listen to runs, and answer the interface."""
    events.listeners[:] = [runs, metadata]
    web.register()
    metadata.register()
