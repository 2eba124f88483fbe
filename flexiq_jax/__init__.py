"""Adaptive mixed-precision quantization for vision models: one 8-bit model, any 4-bit ratio."""
