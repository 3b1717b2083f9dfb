"""The authority: access, audit, cells, metering."""
