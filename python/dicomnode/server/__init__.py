"""The node: receives, routes, waits, runs, exports."""
