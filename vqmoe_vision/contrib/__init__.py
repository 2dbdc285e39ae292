"""What is kept working and not promised: MoCLE, TGR-MoE, V-MoE's checkpoints, int8."""
