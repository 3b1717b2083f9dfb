"""Images: root trees of cells, unpacked once from OCI layouts."""
