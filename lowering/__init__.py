"""From a recurrence to kernel source and a registered op, one folder a target."""
