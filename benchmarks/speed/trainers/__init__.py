"""One file a library: a process of its own trains and is timed by bench_training."""
