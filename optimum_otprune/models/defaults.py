"""Defaults of passes and searches; nothing is imported here, since the command line shows them."""

BATCH_SIZE = 8  # samples per forward pass
HIDDEN_MEMORY = 4 * 10**9  # bytes of hidden states that wait in main memory; others wait in files
TRIALS = 20  # of a search over configurations
VALIDATION_SHARE = 0.25  # of the calibration samples, on which trials are judged
SWEEP_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # of a quality curve
SWEEP_FILE, SWEEP_PLOT = "sweep.json", "sweep.png"  # what a folder of results holds of it
# What a saved model is exported to, with the types of weights, the folder's own where it is among them.
EXPORT_TYPES = {"gguf": ("f32", "f16", "bf16", "q8_0"), "onnx": ("f32",), "openvino": ("f32", "f16", "int8")}
SCHEMES = ("int8", "int4", "nf4")  # of quantization
