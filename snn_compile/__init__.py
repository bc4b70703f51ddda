"""`torch.compile(model, backend="snn")`: plain Python time loops become one kernel."""
