"""The other name of `dicomnode.server.node`."""

from dicomnode.server.node import AbstractPipeline

__all__ = ["AbstractPipeline"]
