"""What a run will take before it starts (plan), and sweeps over sizes and budgets with their fitted law (sweep)."""
