"""The parts of `tools/gpu_check.sh`, each a process of its own: `python -m gpu.PART RESULT.json [--tiny]`."""
