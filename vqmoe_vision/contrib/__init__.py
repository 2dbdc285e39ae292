"""What is kept working and not promised: MoCLE, V-MoE's checkpoints, int8."""
