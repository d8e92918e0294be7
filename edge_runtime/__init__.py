"""The vehicle's process: releases, inference on ONNX Runtime, heartbeats. It loads neither torch nor Ray."""
