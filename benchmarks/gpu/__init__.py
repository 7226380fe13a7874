"""The parts of `benchmarks/gpu_day.py`: units of work on a GPU, their schedule and their report."""
