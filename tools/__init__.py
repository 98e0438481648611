"""What is not the product: verification, benchmarks, exporters, dashboards, training."""
