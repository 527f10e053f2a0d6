"""Processes, GPUs, memory and progress bars."""
