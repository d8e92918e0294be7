"""Vision Transformers: timm models and the hybrid, trainable parts and adapters, checkpoints, ONNX export."""
