"""Leaf tools: they know DICOM and nothing of servers."""
