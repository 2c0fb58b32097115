"""What is recorded of training: the console, log.txt, metrics.jsonl, TensorBoard, Weights & Biases, alarms, traces."""
