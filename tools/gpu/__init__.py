"""The parts of `tools/gpu_check.sh`, each a process of its own: `python -m gpu.PART RESULT.json [--tiny]`."""

NOT_HELD = 3
"""The exit status of a part that ran through and found something wrong."""
SECONDS = "GPU_CHECK_SECONDS"
"""The variable that tells a part how long it may take before it is killed."""
