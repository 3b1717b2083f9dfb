"""Source of the CfC-JEPA world model package: data, training, calibration, export, validation, report."""
