"""The archive on disk: the only floor that knows zarr."""
