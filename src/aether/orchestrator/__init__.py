"""The churn: jobs, engines, artifacts."""
