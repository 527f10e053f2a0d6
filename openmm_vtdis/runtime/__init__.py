"""What the machine needs: processes, GPUs, memory, progress."""
