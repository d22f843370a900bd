"""Models of others in, ours out: OpenCLIP, Hugging Face, ONNX; the same logits on both sides."""
