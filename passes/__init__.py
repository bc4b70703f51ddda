"""Graph rewrites, one file each, named by its verb; `snn_compile.pipeline` is their order."""
